"""Which captions with the same words are told apart: a generative model against a contrastive one, and a blind reader.

    python benchmarks/swap_test.py [--runs runs/swaps] [--scale 1.0] [--lines 400] [--seed 0] [--arm NAME ...] [--dry]

Draws pictures of two coloured shapes (`mixmodal.data.relations`), trains on one part of the combinations, and asks of
the others which of two captions is true of a picture, where things, or their colours, have changed places. The models
are trained on the same pictures, by the recipe of the quickstart with the changes below: an image tokenizer with a
transformer, a denoiser, and a CLIP. What is trained already in `--runs` is not trained again, nor what no `--arm` asks
for. `--scale` multiplies all steps.

Intervals are Wilson's at 95 %: of accuracies they take the two pictures of a line as independent, which they nearly
are; those of `text`, `image` and `group` are of lines.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL.Image import Image as Picture
from record import record

from mixmodal.classification.compositional import (
    ScorePairs,
    ScorePictures,
    evaluate_compositions,
    read_compositions,
)
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.classification.loading import load_model
from mixmodal.classification.pair_scores import by_costs, by_encoder, by_image_alone, by_likelihood, by_text_alone
from mixmodal.classification.policies import Full
from mixmodal.classification.summary import Rate
from mixmodal.config import load_config
from mixmodal.data.relations import TASK_NAME, RelationsConfig, write_relations
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.launch import launch, mixmodal_command
from mixmodal.quickstart.recipe import DEEPSPEED, ENTRIES, Entry, config_path, read_packaged, write_config
from mixmodal.quickstart.tokens import write_token_shards
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.training.text_tokenizer import train_text_tokenizer_on_shards

NUM_TRAIN = 8000
CHANGES: dict[str, dict[str, Any]] = {
    "text_tokenizer": {"vocab_size": 300},
    "image_tokenizer": {"augment": {"flip_share": 0.5}, "trainer": {"max_steps": 400}},
    "tokens": {"num_variants": 2},
    "encoder": {
        "data": {"caption_until": None},
        "model": {"vocab_size": 300, "text": {"dim": 96, "num_layers": 2, "num_heads": 4, "ffn_dim": 288}},
        "augment": {"hue_share": 0.0, "max_hue": 0},
        "trainer": {"max_steps": 400},
    },
    "pretrain": {
        "model": {"dropout": 0.0},
        "data": {"first_part_weight": 0.5},
        "trainer": {"max_steps": 3000, "micro_batch_size": 8},
        "card": {"title": "mixmodal swaps", "data": "Drawn shapes", "attribution": "none", "limits": "A test."},
    },
}
"""What differs from the quickstart's recipe: colours mean something here, and pictures are simpler."""
DENOISER = Path(__file__).parents[1] / "configs" / "train" / "demo_diffusion.yaml"
DENOISER_CHANGES = {
    "model": {"block_channels": [16, 32, 64], "head_dim": 16, "text": {"max_text_tokens": 32}},
    "optimizer": {"lr": 2.0e-3},
    "trainer": {"max_steps": 8000},
}
COMMANDS = {
    "image_tokenizer": "train-image-tokenizer",
    "pretrain": "pretrain",
    "encoder": "train-encoder",
    "diffusion": "train-diffusion",
}
Arm = tuple[ScorePairs, ScorePictures | None]
TRANSFORMER = ("text tokenizer", "image tokenizer", "tokens", "transformer")
NEEDS: dict[str, tuple[str, ...]] = {
    "log p(image given text)": TRANSFORMER,
    "log p(image given text), pictures less log p(image)": TRANSFORMER,
    "log p(text given image)": TRANSFORMER,
    "log p(text given image) - log p(text)": TRANSFORMER,
    "diffusion": ("text tokenizer", "denoiser"),
    "CLIP": ("text tokenizer", "encoder"),
    "log p(text), blind": TRANSFORMER,
}
"""Each kind of score, and what is trained for it."""
Write = Callable[..., Any]


def prepare(options: argparse.Namespace) -> None:
    """Pictures, and a config for each stage."""
    data = options.runs / "data"
    if not (data / TASK_NAME).exists():
        share = min(1.0, options.scale)
        numbers = {"num_train": max(64, round(NUM_TRAIN * share)), "num_held_out": max(16, round(200 * share))}
        write_relations(RelationsConfig(out=data, num_lines=options.lines, seed=options.seed, **numbers))
    (options.runs / "configs").mkdir(exist_ok=True)
    (options.runs / "configs" / DEEPSPEED).write_text(read_packaged(DEEPSPEED), encoding="utf-8")
    for name, changes in CHANGES.items():
        settings = merged(yaml.safe_load(read_packaged(f"{name}.yaml")), changes)
        if "trainer" in settings:
            settings["trainer"]["max_steps"] = max(4, round(settings["trainer"]["max_steps"] * options.scale))
            settings["trainer"]["seed"] = options.seed
        write_config(options.runs, name, entry_of(name), settings)
    write_denoiser_config(options)


def write_denoiser_config(options: argparse.Namespace) -> None:
    """The demo denoiser's, on these pictures."""
    runs = options.runs
    settings = merged(yaml.safe_load(DENOISER.read_text(encoding="utf-8")), DENOISER_CHANGES)
    settings["data"] = {
        "train": [str(runs / "data" / "train")],
        "held_out": [str(runs / "data" / "heldout")],
        "text_tokenizer": str(runs / "text_tokenizer" / "text_tokenizer.model"),
    }
    settings["trainer"] |= {
        "run_dir": str(runs / "diffusion"),
        "max_steps": max(4, round(settings["trainer"]["max_steps"] * options.scale)),
        "seed": options.seed,
    }
    config_path(runs, "diffusion").write_text(yaml.safe_dump(settings), encoding="utf-8")


def entry_of(name: str) -> Entry:
    """The quickstart's, without the pictures that only the quickstart has."""
    entry = ENTRIES[name]
    if name == "image_tokenizer":
        return entry._replace(paths={**entry.paths, "data.train": ["data/train"]})
    return entry


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes at any depth; None takes a key away."""
    found = dict(settings)
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict):
            found[key] = merged(found.get(key) or {}, value)
        else:
            found[key] = value
    return found


def load(options: argparse.Namespace, name: str) -> Any:
    entry = ENTRIES[name]
    config_type = getattr(importlib.import_module(entry.module), entry.config)
    return load_config(config_type, config_path(options.runs, name))


def train(options: argparse.Namespace) -> dict[str, float]:
    """Trains what the arms need and is missing, each network in a process of its own; seconds of each stage."""
    needed = {stage for name in options.arm for stage in NEEDS[name]}
    seconds: dict[str, float] = {}
    stages: dict[str, tuple[Path, Callable[[], None]]] = {
        "text tokenizer": (
            options.runs / "text_tokenizer" / "text_tokenizer.model",
            lambda: train_text_tokenizer_on_shards(load(options, "text_tokenizer")),
        ),
        "image tokenizer": (trained(options, "image_tokenizer"), lambda: train_network(options, "image_tokenizer")),
        "tokens": (
            options.runs / "tokens" / "heldout" / "manifest.json",
            lambda: write_token_shards(options.runs, load(options, "tokens"), lambda done, total: None),
        ),
        "transformer": (trained(options, "pretrain"), lambda: train_network(options, "pretrain")),
        "encoder": (trained(options, "encoder"), lambda: train_network(options, "encoder")),
        "denoiser": (trained(options, "diffusion"), lambda: train_network(options, "diffusion")),
    }
    for name, (result, complete) in stages.items():
        if name not in needed or result.exists():
            continue
        started = time.monotonic()
        complete()
        seconds[name] = time.monotonic() - started
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    return seconds


def trained(options: argparse.Namespace, name: str) -> Path:
    return options.runs / name / "export" / ("denoiser.json" if name == "diffusion" else "config.json")


def train_network(options: argparse.Namespace, name: str) -> None:
    launch(mixmodal_command(COMMANDS[name], "--config", str(config_path(options.runs, name))))
    if not trained(options, name).exists():
        raise ValueError(f"{name} stopped before its end; run this again and it goes on")


def build_arms(options: argparse.Namespace) -> Iterator[tuple[str, Arm]]:
    """The arms that are asked for."""
    wanted = set(options.arm)
    if autoregressive := wanted & {name for name, needs in NEEDS.items() if needs == TRANSFORMER}:
        model = MixedModal.from_pretrained(options.runs / "pretrain" / "export", "cpu")
        scorer, codec = SequenceScorer(model.model, model.format), model.codec
        forward = by_likelihood(scorer, codec, "image_given_text")
        found: dict[str, Arm] = {
            "log p(image given text)": (forward, None),
            "log p(image given text), pictures less log p(image)": (forward, by_image_alone(scorer, codec)),
            "log p(text given image)": (by_likelihood(scorer, codec, "text_given_image"), None),
            "log p(text given image) - log p(text)": (
                by_likelihood(scorer, codec, "text_given_image", debias=1.0),
                None,
            ),
            "log p(text), blind": (by_text_alone(scorer), None),
        }
        yield from ((name, arm) for name, arm in found.items() if name in autoregressive)
    if "diffusion" in wanted:
        yield "diffusion", (build_denoising(options), None)
    if "CLIP" in wanted:
        yield "CLIP", (by_encoder(load_encoder(options.runs / "encoder" / "export")), None)


def build_denoising(options: argparse.Namespace) -> ScorePairs:
    """Of the trained denoiser."""
    adapter = load_model(options.runs / "diffusion" / "export").adapter
    units = Full(num_times=options.times).build_units(seed=options.seed)

    def denoise(pictures: Sequence[Picture], captions: Sequence[str]) -> DiffusionScorer:
        found = DiffusionScorer(adapter, captions)
        found.set_pictures(pictures)
        return found

    return by_costs(denoise, units)


def report(options: argparse.Namespace, seconds: dict[str, float], write: Write) -> None:
    """Scores the task by every arm and writes down what came out."""
    task = read_compositions(options.runs / "data" / TASK_NAME)
    settings = {"scale": options.scale, "seed": options.seed, "train_seconds": seconds}
    for name, (score, score_pictures) in build_arms(options):
        started = time.monotonic()
        found = evaluate_compositions(task, score, score_pictures)
        took = time.monotonic() - started
        for kind, one in found["kinds"].items():
            counts = {"accuracy": (one["num_correct"], one["num_pictures"])}
            counts |= {what: (one[what], one["num_grids"]) for what in ("text", "image", "group")}
            for what, (hits, trials) in counts.items():
                shape = {"correct": hits, "of": trials, "wilson_95": Rate(hits, trials).interval}
                shape |= {"ties": one["num_ties"], "seconds": took, **settings}
                write("swap_test", f"{name}: {kind}, {what}", [hits / trials], "", "cpu", shape)


def show(
    benchmark: str, subject: str, repeats: list[float], unit: str, device_kind: str, config: dict[str, Any]
) -> None:
    """What `record` would write, in short."""
    low, high = config["wilson_95"]
    print(f"{subject}: {repeats[0]:.3f} ({low:.3f} .. {high:.3f}), {config['correct']:g} of {config['of']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/swaps"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all steps")
    parser.add_argument("--lines", type=int, default=400, help="of the task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append", choices=NEEDS, help="all by default; may be given several times")
    parser.add_argument("--times", type=int, default=24, help="at which the denoiser scores every pair")
    parser.add_argument("--dry", action="store_true", help="print instead of recording")
    options = parser.parse_args()
    options.arm = options.arm or list(NEEDS)
    prepare(options)
    report(options, train(options), show if options.dry else record)


if __name__ == "__main__":
    main()
