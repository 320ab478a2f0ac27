"""Probabilities that mean what they say: a temperature fitted on held-out pictures, and how to judge it.

Sums of squared errors over thousands of numbers make a softmax that is all but certain, means over them one that is
flat; one number fitted on labelled pictures mends both (arXiv 1706.04599, section 4.2; arXiv 2303.15233, section 4).

Shapes: P pictures, K classes, B bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LARGEST = 12.0
"""Natural logarithm of how far the inverse temperature is sought, either way from one over the spread of the logits."""
GOLDEN = (math.sqrt(5) - 1) / 2


class Reliability(NamedTuple):
    """How often a classifier of a given confidence is right, in equal bins of the confidence, each `(B,)`.

    Args:
        counts: pictures in each bin, int64.
        confidences: mean of the largest probability, float64; NaN in an empty bin.
        accuracies: share of right answers, float64; NaN in an empty bin. A tie of k classes counts 1/k.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean over pictures of |accuracy - confidence| of their bin, in [0, 1]."""
        seen = self.counts > 0
        gaps = np.abs(self.accuracies[seen] - self.confidences[seen])
        return float((gaps * self.counts[seen]).sum() / self.counts.sum())


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities `(..., K)` float64 of logits `(..., K)` over a temperature.

    They are the posterior where logits are log-likelihoods and all classes as likely.
    """
    odds = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    return odds / odds.sum(axis=-1, keepdims=True)


def mean_nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean of -log p(label) in nats.

    Args:
        logits: `(P, K)` float64.
        labels: `(P,)` int64.
    """
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature above 0 of the least mean negative log-likelihood of the labels.

    It is convex in the inverse temperature, so that a golden-section search finds it; 1e-6 of its value.

    Args:
        logits: `(P, K)`, of pictures that nothing else is judged on.
        labels: `(P,)` int64.

    Raises:
        ValueError: for shapes that do not fit, logits that are not finite, or labels for which no temperature is best.
    """
    logits, labels = _checked(logits, labels)
    spread = float(np.sqrt(np.var(logits, axis=1).mean()))
    if spread == 0:
        raise ValueError("no temperature can be fitted: the logits of every picture are equal")
    low, high = -math.log(spread) - LARGEST, -math.log(spread) + LARGEST

    def nll(inverse: float) -> float:
        return mean_nll(logits, labels, math.exp(-inverse))

    start, end = low, high
    first, second = end - GOLDEN * (end - start), start + GOLDEN * (end - start)
    at_first, at_second = nll(first), nll(second)
    while end - start > 1e-6:
        if at_first <= at_second:
            end, second, at_second = second, first, at_first
            first = end - GOLDEN * (end - start)
            at_first = nll(first)
        else:
            start, first, at_first = first, second, at_second
            second = start + GOLDEN * (end - start)
            at_second = nll(second)
    if (logits.max(axis=1) == logits[np.arange(len(labels)), labels]).all():
        raise ValueError(
            f"no temperature can be fitted: the label has the best logit on each of {len(labels)} pictures, so that "
            "the lower the temperature, the better; use more pictures, or harder ones"
        )
    if start - low < 1e-3 or nll(start) >= math.log(logits.shape[1]):
        raise ValueError(
            "no temperature can be fitted: the labels are no likelier than chance under the logits, so that the higher "
            "the temperature, the better; check that labels and classes are in one order"
        )
    return math.exp(-(start + end) / 2)


def measure_reliability(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> Reliability:
    """How often a classifier of a given confidence is right (arXiv 1706.04599, section 2).

    Args:
        probabilities: `(P, K)` float64.
        labels: `(P,)` int64.
        num_bins: equal bins of (0, 1]; a confidence on an edge belongs to the lower one.

    Raises:
        ValueError: for shapes that do not fit, probabilities that do not sum to one, or no bins.
    """
    probabilities, labels = _checked(probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; at least one bin is needed")
    sums = probabilities.sum(axis=1)
    if np.abs(sums - 1).max() > 1e-6 or probabilities.min() < 0:
        raise ValueError(f"probabilities of picture {np.abs(sums - 1).argmax()} are no distribution over the classes")
    confidences = probabilities.max(axis=1)
    is_top = probabilities == confidences[:, None]
    credit = is_top[np.arange(len(labels)), labels] / is_top.sum(axis=1)
    bins = np.clip(np.ceil(confidences * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    shares = np.where(counts > 0, counts, np.nan)
    return Reliability(
        counts,
        np.bincount(bins, confidences, num_bins) / shares,
        np.bincount(bins, credit, num_bins) / shares,
    )


def _checked(table: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table, labels = np.asarray(table, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or labels.shape != table.shape[:1] or not len(labels):
        raise ValueError(
            f"calibration: {labels.shape} labels for a table {table.shape}; give (pictures, classes) and a label each"
        )
    if labels.min() < 0 or labels.max() >= table.shape[1]:
        raise ValueError(
            f"calibration: labels go from {labels.min()} to {labels.max()}, classes from 0 to {table.shape[1] - 1}"
        )
    broken = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(broken):
        raise ValueError(
            f"calibration: {len(broken)} pictures have values that are not finite, the first is {broken[0]}"
        )
    return table, labels.astype(np.int64)
