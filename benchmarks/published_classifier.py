"""The published Diffusion Classifier as a plain loop (arXiv 2303.16203, section 3, and what its code does).

It is what the scorer and the engine are compared with, in numbers and in time: one picture after another, batches of
(class, step) pairs of that picture alone, the same noise for all classes at a step. `compare` replays it in the engine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixmodal.classification.adapters import build_adapter
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.elimination import Elimination, EliminationConfig, Outcome
from mixmodal.classification.policies import Staged
from mixmodal.classification.units import Scorer, Unit, draw_noise

BATCH = 32
CLASSES = ("cat", "dog", "red apple", "blue pear")
PROMPT = "a photo of a {}."


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Texts, padded to the tokenizer's length, `(K, T, D)`."""
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


class Replay(NamedTuple):
    """What the loop found: the prediction, and errors by class and time step, in the order of evaluation."""

    prediction: int
    errors: dict[tuple[int, int], float]


@torch.no_grad()
def classify(
    pipe: Any,
    texts: Tensor,
    image: Tensor,
    draw: Callable[[int], Tensor],
    samples: Sequence[int],
    keep: Sequence[int],
    loss: str = "l2",
) -> Replay:
    """One picture: stages of an even grid of steps; after each the classes of least mean error stay.

    Everything is in float32: the latents are the posterior's mean times 0.18215, and an error is the element mean of
    the loss between the noise and what the U-Net says it is.

    Args:
        texts: of the classes, see `encode`.
        image: `(3, H, W)` in [-1, 1].
        draw: the noise of a step.
        samples: steps by the end of each stage.
        keep: classes that stay after each.
    """
    num_steps, largest = 1000, max(samples)
    grid = list(range(num_steps))[num_steps // largest // 2 :: num_steps // largest][:largest]
    latent = pipe.vae.encode(image[None]).latent_dist.mean * 0.18215
    squares = pipe.scheduler.alphas_cumprod
    errors: dict[tuple[int, int], float] = {}
    noises: dict[int, Tensor] = {}
    alive, seen = list(range(len(texts))), set()
    for num, kept in zip(samples, keep):
        stride = largest // num
        chosen = grid[stride // 2 :: stride][:num]
        pairs = [(one, step) for one in alive for step in chosen if step not in seen]
        noises.update({step: draw(step) for step in chosen if step not in seen})
        seen.update(chosen)
        for start in range(0, len(pairs), BATCH):
            some = pairs[start : start + BATCH]
            steps = torch.tensor([step for _, step in some])
            eps = torch.stack([noises[step] for _, step in some])
            noisy = latent * (squares[steps] ** 0.5).view(-1, 1, 1, 1) + eps * ((1 - squares[steps]) ** 0.5).view(
                -1, 1, 1, 1
            )
            out = pipe.unet(noisy, steps, encoder_hidden_states=texts[[one for one, _ in some]]).sample
            found = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[loss](eps, out, reduction="none")
            errors.update(zip(some, found.mean(dim=(1, 2, 3)).tolist()))
        means = {one: statistics.fmean(error for (k, _), error in errors.items() if k == one) for one in alive}
        alive = sorted(alive, key=lambda one: means[one])[:kept]
    return Replay(alive[0], errors)


class RecordingScorer:
    """A scorer whose costs are kept: of each picture by class and time step, as the loop keeps its errors."""

    def __init__(self, scorer: Scorer, num_steps: int = 1000) -> None:
        self.scorer, self.num_steps = scorer, num_steps
        self.costs: dict[int, dict[tuple[int, int], float]] = {}

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        found = self.scorer.cost(pictures, classes, units)
        for picture, one, unit, cost in zip(pictures, classes, units, found.tolist()):
            self.costs.setdefault(picture, {})[one, int(unit.time * self.num_steps)] = cost
        return found


class Comparison(NamedTuple):
    """One picture in the engine and in the loop: outcome, replay, and the largest relative difference of errors.

    It is infinite where they did not evaluate the same (class, step) pairs.
    """

    outcome: Outcome
    replay: Replay
    difference: float


def compare(pipe: Any, images: Tensor, samples: tuple[int, ...], keep: tuple[int, ...]) -> list[Comparison]:
    """The published schedule by the engine, pictures together in batches of 16, and by the loop, with the same noises.

    Args:
        images: `(P, 3, H, W)` in [-1, 1].
        samples: steps by the end of each stage.
        keep: classes that stay after each.
    """
    policy = Staged(samples=samples, keep=keep)
    scorer = DiffusionScorer(build_adapter(pipe), CLASSES, [PROMPT], free_text_encoders=False)
    scorer.set_pictures(images)
    recording = RecordingScorer(scorer)
    outcomes = Elimination(recording, len(CLASSES), policy, EliminationConfig(batch_size=16)).score(range(len(images)))
    texts = encode(pipe, [PROMPT.replace("{}", one) for one in CLASSES])
    of_step = {int(unit.time * 1000): unit for unit in policy.build_units(seed=0)}
    shape = scorer.adapter.latent_shape
    compared = []
    for picture, (image, outcome) in enumerate(zip(images, outcomes)):
        loop = classify(pipe, texts, image, lambda step: draw_noise(0, of_step[step], shape), samples, keep)
        costs, worst = recording.costs[picture], float("inf")
        if costs.keys() == loop.errors.keys():
            worst = max(abs(costs[pair] / error - 1) for pair, error in loop.errors.items())
        compared.append(Comparison(outcome, loop, worst))
    return compared
