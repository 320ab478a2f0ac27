"""What a sample shows: the nearest known picture, and what is left of a caption without its concept.

The distance between pictures is the root mean square difference of their RGB values in [0, 1], at the size of the image
tokenizer. It is taken to every known picture, of all concepts and styles, never to the wanted ones only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixmodal.evaluation.captioning import named_concept
from mixmodal.tokenization.codec import Codec

DISTANCE = "root mean square difference of RGB values in [0, 1]"


class Rate(NamedTuple):
    """A share with the numbers behind it."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        """Between 0 and 1; nan without a trial."""
        return self.hits / self.trials if self.trials else float("nan")


def rate(outcomes: Iterable[bool]) -> Rate:
    outcomes = list(outcomes)
    return Rate(sum(outcomes), len(outcomes))


class Nearest(NamedTuple):
    """For each of N pictures the nearest of M others: int64 `(N,)` indices and float32 `(N,)` distances."""

    indices: Tensor
    distances: Tensor


def nearest_pictures(pictures: Tensor, others: Tensor) -> Nearest:
    """The nearest of `others` `(M, 3, H, W)` to each of `pictures` `(N, 3, H, W)`, both in [-1, 1].

    Raises:
        ValueError: for pictures of unequal size, or none to compare with.
    """
    if pictures.shape[1:] != others.shape[1:] or not len(others):
        raise ValueError(f"nearest picture: {tuple(pictures.shape)} can not be compared with {tuple(others.shape)}")
    values = pictures[0].numel() if len(pictures) else 1
    left, right = (batch.flatten(1).float().clamp(-1, 1) / 2 for batch in (pictures, others))
    distances, indices = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    return Nearest(indices, distances / values**0.5)


def rest_of(caption: str, concepts: Sequence[str]) -> str:
    """The caption without the concept that it names, so that the word for a style is not sought in a name."""
    concept = named_concept(caption, concepts)
    start = caption.casefold().find(concept.casefold()) if concept else -1
    return caption if concept is None or start < 0 else caption[:start] + caption[start + len(concept) :]


def redraw(codec: Codec, images: Tensor) -> Tensor:
    """Images through the image tokenizer and back, `(N, 3, H, W)` in [-1, 1], on the CPU."""
    tokenizer = codec.image_tokenizer
    parts = [tokenizer.decode(tokenizer.encode(part.to(codec.device))).cpu() for part in images.split(256)]
    return torch.cat(parts)
