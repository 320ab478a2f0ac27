"""Seconds a picture of diffusion classifiers, against a plain loop of the published one; and evaluations a second.

    python benchmarks/diffusion_classifier.py [--pictures 2] [--classes 100] [--repeats 3] [--dry]

On a CPU: a tiny Stable Diffusion with random weights, one thread, CPU-seconds, arms in turn. Its decisions mean
nothing, so what this tells is what an evaluation and a picture cost; how many evaluations a policy needs for the same
decisions is measured on exact denoisers and trained ones elsewhere. On a GPU: a U-Net of the size of Stable Diffusion
1.5 with random weights, on which speed does not depend, eager and compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import published_classifier
import torch
from record import record
from tiny_diffusion import STABLE, build
from torch import Tensor

from mixmodal.classification.adapters import StableDiffusion, build_adapter
from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer
from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.policies import Adaptive, Policy, Staged
from mixmodal.classification.units import Unit, low_discrepancy_times

BENCHMARK = "diffusion_classifier"
LOOP = "plain loop, published schedule"
TEMPLATE = "a photo of a {}."
SCHEDULES = {37: ((25, 250), (5, 1)), 100: ((20, 50, 100, 500), (20, 10, 5, 1))}
"""Published samples and classes kept, by number of classes: Pets; Food, Aircraft and Flowers."""
BATCH = 32


class Pass(NamedTuple):
    """All pictures scored once: CPU-seconds and evaluations."""

    seconds: float
    evaluations: int


def class_names(num: int) -> list[str]:
    """Made-up words of three letters, all with tokens of their own."""
    return [f"{chr(97 + place % 26)}{chr(97 + place // 26)}x" for place in range(num)]


def pass_plain(pipe: Any, names: Sequence[str], images: Tensor) -> Pass:
    """The published algorithm: its fixed schedule, noise that is new for each picture, batches of one picture."""
    samples, keep = SCHEDULES[len(names)]
    began, evaluations = time.process_time(), 0
    texts = published_classifier.encode(pipe, [TEMPLATE.replace("{}", name) for name in names])
    for image in images:
        shape = (4, image.shape[1] // 2, image.shape[2] // 2)
        found = published_classifier.classify(pipe, texts, image, lambda _: torch.randn(*shape), samples, keep)  # noqa: B023
        evaluations += len(found.errors)
    return Pass(time.process_time() - began, evaluations)


def pass_engine(pipe: Any, names: Sequence[str], images: Tensor, policy: Policy) -> Pass:
    """Our scorer under a policy, from prompts and pixels on."""
    began = time.process_time()
    config = DiffusionConfig(batch_size=BATCH)
    scorer = DiffusionScorer(build_adapter(pipe), names, [TEMPLATE], config, free_text_encoders=False)
    scorer.set_pictures(images)
    Elimination(scorer, len(names), policy, EliminationConfig(batch_size=BATCH)).score(range(len(images)))
    return Pass(time.process_time() - began, scorer.num_evaluations)


def measure_cpu(num_pictures: int, num_classes: int, repeats: int, write: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    pipe, names = build("sd_epsilon"), class_names(num_classes)
    images = torch.rand((num_pictures, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples, keep = SCHEDULES[num_classes]
    policies = {"published schedule": Staged(samples=samples, keep=keep), "adaptive": Adaptive()}
    arms: dict[str, Callable[[], Pass]] = {LOOP: lambda: pass_plain(pipe, names, images)}
    for name, policy in policies.items():
        arms[f"engine, {name}"] = partial(pass_engine, pipe, names, images, policy)
    pass_engine(pipe, names[:2], images[:1], Staged(samples=(2,), keep=(1,)))  # what is built at the first call
    found: dict[str, list[Pass]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, score in arms.items():
            found[arm].append(score())
    settings = {
        "pictures": num_pictures,
        "classes": num_classes,
        "samples": samples,
        "keep": keep,
        "batch_size": BATCH,
        "model": "tiny Stable Diffusion, random weights",
        "parameters": sum(one.numel() for one in pipe.unet.parameters()),
        "threads": 1,
    }
    for arm, passes in found.items():
        each = [one.seconds / num_pictures for one in passes]
        write(BENCHMARK, f"a picture, {arm}", each, "CPU-s", "cpu", settings)
        counts = [one.evaluations / num_pictures for one in passes]
        write(BENCHMARK, f"evaluations of a picture, {arm}", counts, "evaluations", "cpu", settings)
        milliseconds = [1000 * one.seconds / one.evaluations for one in passes]
        write(BENCHMARK, f"an evaluation, {arm}", milliseconds, "CPU-ms", "cpu", settings)
        if arm != LOOP:
            fewer = [loop.evaluations / one.evaluations for loop, one in zip(found[LOOP], passes)]
            write(BENCHMARK, f"evaluations, ratio, plain loop to {arm}", fewer, "times", "cpu", settings)
            faster = [loop.seconds / one.seconds for loop, one in zip(found[LOOP], passes)]
            write(BENCHMARK, f"CPU-seconds, ratio, plain loop to {arm}", faster, "times", "cpu", settings)


class RandomPrompts(StableDiffusion):
    """A U-Net alone: prompts are random numbers of the size of CLIP's."""

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[object, ...]]:
        return [(prompt,) for prompt in prompts]

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        shape = (len(prompts), 77, self.network.config.cross_attention_dim)
        return {"embeddings": torch.randn(shape, device=self.device, dtype=self.dtype)}


def measure_cuda(repeats: int, write: Callable[..., Any], seconds: float = 5.0) -> None:
    """Evaluations a second through the scorer, with all that it does on the host."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(torch.bfloat16).eval()
    unet.requires_grad_(False)
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler(**STABLE))
    units = [Unit(j, time, j, 1, 0, 1.0) for j, time in enumerate(low_discrepancy_times(64).tolist())]
    generator = np.random.default_rng(0)
    for compiled in (False, True):
        for batch_size in (32, 64, 128):
            torch.compiler.reset()
            torch.cuda.reset_peak_memory_stats()
            config = DiffusionConfig(batch_size=batch_size, compile=compiled)
            scorer = DiffusionScorer(RandomPrompts(pipe), class_names(100), config=config)
            scorer.set_latents(torch.randn(8, 4, 64, 64))
            rates = []
            for repeat in range(repeats + 1):
                began, done = time.perf_counter(), 0
                while not done or time.perf_counter() - began < (seconds if repeat else 0):
                    chosen = [units[one] for one in generator.integers(64, size=batch_size)]
                    pictures, classes = generator.integers(8, size=batch_size), generator.integers(100, size=batch_size)
                    scorer.cost(pictures.tolist(), classes.tolist(), chosen)
                    done += batch_size
                rates.append(done / (time.perf_counter() - began))
            settings = {
                "model": "U-Net of Stable Diffusion 1.5's size, random weights, 64 x 64 latents",
                "dtype": "bfloat16",
                "parameters": sum(one.numel() for one in unet.parameters()),
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
            how = "compiled" if compiled else "eager"
            subject = f"Stable Diffusion 1.5's size, batch {batch_size}, {how}"
            write(BENCHMARK, subject, rates[1:], "evaluations/s", "cuda", settings)


def show(benchmark: str, subject: str, repeats: Sequence[float], unit: str, *_: object) -> None:
    values = ", ".join(f"{one:.4g}" for one in repeats)
    print(f"{benchmark}, {subject}: {statistics.median(repeats):,.4g} {unit} ({values})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--classes", type=int, default=100, choices=SCHEDULES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print figures and record nothing")
    arguments = parser.parse_args()
    write: Callable[..., Any] = show if arguments.dry else record
    measure_cpu(arguments.pictures, arguments.classes, arguments.repeats, write)
    if torch.cuda.is_available():
        measure_cuda(arguments.repeats, write)
