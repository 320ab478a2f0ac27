"""Rates of the demo: by split, captions to choose from, and what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixmodal.evaluation.concepts import Rate, rate


class Label(NamedTuple):
    """What a demo picture shows. `heldout` tells whether training has left out this pair of concept and style."""

    key: str
    concept: str
    style: str
    category: str
    caption: str
    heldout: bool


def split_rate(items: Sequence[Mapping[str, Any]], key: str, heldout: bool) -> Rate:
    """How many items of one split have `key` true."""
    return rate(bool(item[key]) for item in items if item["label"]["heldout"] == heldout)


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
