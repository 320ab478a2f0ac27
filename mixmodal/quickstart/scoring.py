"""Rates that say what a sample shows: the nearest demo picture, the caption chosen.

The distance between pictures is the root mean square difference of their RGB values in [0, 1], at the size of the image
tokenizer. It is taken to every demo picture, of both styles and both splits, never to the wanted ones only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DISTANCE = "root mean square difference of RGB values in [0, 1]"


class Label(NamedTuple):
    """What a demo picture shows. `heldout` tells whether training has left out this pair of concept and style."""

    key: str
    concept: str
    style: str
    category: str
    caption: str
    heldout: bool


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


def split_rate(items: Sequence[Mapping[str, Any]], key: str, heldout: bool) -> Rate:
    """How many items of one split have `key` true."""
    return rate(bool(item[key]) for item in items if item["label"]["heldout"] == heldout)


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


def draw_candidates(labels: Sequence[Label], index: int, num_others: int, rng: np.random.Generator) -> list[int]:
    """Indices of the captions that a classifier chooses from: `index` first, then other concepts in the same style.

    Raises:
        ValueError: where the style has too few other concepts.
    """
    true = labels[index]
    pool = {label.concept: i for i, label in enumerate(labels) if label.style == true.style}
    pool.pop(true.concept)
    if len(pool) < num_others:
        raise ValueError(
            f"classification: style {true.style!r} has {len(pool)} other concepts; {num_others} are needed"
        )
    return [index, *rng.choice(sorted(pool.values()), size=num_others, replace=False).tolist()]


class Confusion(NamedTuple):
    """Counts `(n, n)`: row the true category, column that of the chosen caption, sorted by name."""

    names: list[str]
    counts: np.ndarray


def confusion_by_category(true: Sequence[Label], chosen: Sequence[Label]) -> Confusion:
    names = sorted({label.category for label in (*true, *chosen)})
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for left, right in zip(true, chosen, strict=True):
        counts[names.index(left.category), names.index(right.category)] += 1
    return Confusion(names, counts)


def top_confusions(true: Sequence[Label], chosen: Sequence[Label], num: int) -> list[tuple[str, str, int]]:
    """The most frequent mistakes as (true concept, chosen concept, times)."""
    pairs = zip(true, chosen, strict=True)
    wrong = Counter((left.concept, right.concept) for left, right in pairs if left.concept != right.concept)
    return [(*pair, times) for pair, times in wrong.most_common(num)]
