"""The published Diffusion Classifier as a plain loop (arXiv 2303.16203, section 3, and what its code does).

It is what the scorer and the engine are compared with, in numbers and in time: one picture after another, batches of
(class, step) pairs of that picture alone, the same noise for all classes at a step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 32


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
