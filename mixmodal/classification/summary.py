"""What the records of pictures add up to: accuracies with intervals, confusion, calibration, and how sets differ.

Shapes: P pictures, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from mixmodal.classification.calibration import Reliability, fit_temperature, measure_reliability, softmax
from mixmodal.classification.figures import draw_confusion, draw_reliability
from mixmodal.classification.result import TIE

LEVEL = 0.95
"""Of every interval."""
TOP = 5
NUM_MISTAKES = 20
"""Most frequent mistakes that are listed."""

Entry = Mapping[str, Any]
"""A line that `Recorder` has written."""


class Rate(NamedTuple):
    """A share of `total` trials; a tie of k classes earns 1/k, so hits need not be whole."""

    hits: float
    total: float

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Journal of the American Statistical Association 22, 1927)."""
        z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
        weight = z * z / self.total
        middle = (self.value + weight / 2) / (1 + weight)
        reach = z / (1 + weight) * sqrt(self.value * (1 - self.value) / self.total + weight / (4 * self.total))
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def to_dict(self) -> dict[str, float] | None:
        """Plain data; None without trials."""
        if not self.total:
            return None
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "total": self.total}


def summarise(entries: Iterable[Entry], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, ties, confusion and costs of scored pictures; those without a label count for ties and costs alone.

    Args:
        entries: in the order of pictures; sums depend on it in the last digits.
        labels: of the K classes.

    Returns:
        Plain data: `num_pictures`, `num_labelled`, `num_ties`, `skipped` (by reason), `accuracy` and `top_5` (value,
        95 % Wilson interval, hits, total; a tie of k classes earns its share; the second needs more than 5 classes),
        `mean_per_class` (of the classes with pictures), `per_class`, `confusion` (counts by label, then prediction;
        zeros left out), `mistakes` (the most frequent), `calibration` (expected error, the bins behind it, and the
        error once a temperature is fitted on other pictures), `evaluations` of a picture, and where records have the
        scores `before` the classifier was adapted, `accuracy_before`.
    """
    places = {label: place for place, label in enumerate(labels)}
    scored, skipped, chances, logits, true, before = [], Counter(), [], [], [], []
    hits, totals = np.zeros(len(labels)), np.zeros(len(labels))
    confusion, top, num_ties = np.zeros((len(labels), len(labels)), dtype=np.int64), 0.0, 0
    for entry in entries:
        if "skipped" in entry:
            skipped[entry["skipped"]] += 1
            continue
        scored.append(sum(entry["evaluations"]))
        num_ties += len(entry["tied"]) > 1
        if entry["label"] is not None:
            place = places[entry["label"]]
            hits[place] += credit(entry, entry["label"])
            totals[place] += 1
            top += top_credit(entry, place)
            confusion[place, places[entry["prediction"]]] += 1
            chances.append(level_ties(entry, places))
            logits.append([-np.inf if score is None else score for score in entry["scores"]])
            true.append(place)
            if "before" in entry:
                best = np.array(entry["before"]) >= max(entry["before"]) - TIE
                before.append(float(best[place] / best.sum()))
    rates = [Rate(*pair) for pair in zip(hits.tolist(), totals.tolist())]
    num_labelled = int(totals.sum())
    return {
        "num_pictures": len(scored),
        "num_labelled": num_labelled,
        "num_ties": num_ties,
        "skipped": dict(sorted(skipped.items())),
        "accuracy": Rate(float(hits.sum()), num_labelled).to_dict(),
        "top_5": Rate(top, num_labelled).to_dict() if len(labels) > TOP else None,
        "mean_per_class": float(np.mean([rate.value for rate in rates if rate.total])) if num_labelled else None,
        "per_class": {label: rate.to_dict() for label, rate in zip(labels, rates) if rate.total},
        "confusion": name_counts(confusion, labels),
        "mistakes": list_mistakes(confusion, labels),
        "calibration": describe_calibration(np.stack(chances), np.array(logits), np.array(true)) if true else None,
        "evaluations": describe_costs(scored),
        **({"accuracy_before": Rate(sum(before), len(before)).to_dict()} if before else {}),
    }


def credit(entry: Entry, label: str) -> float:
    """1 where the picture is taken for the class, 1/k where k classes are tied and it is one of them."""
    return 1 / len(entry["tied"]) if label in entry["tied"] else 0.0


def top_credit(entry: Entry, place: int) -> float:
    """The share of orders of equal classes in which the one at `place` is among the best five."""
    scores = np.array([-np.inf if score is None else score for score in entry["scores"]])
    better, equal = int((scores > scores[place]).sum()), int((scores == scores[place]).sum())
    if entry["label"] in entry["tied"]:  # rounding may tell them apart
        better, equal = 0, len(entry["tied"])
    return min(1.0, max(0.0, (TOP - better) / equal))


def level_ties(entry: Entry, places: Mapping[str, int]) -> np.ndarray:
    """The probabilities `(K,)` with those of tied classes made equal, where rounding has told them apart."""
    chances, tied = np.array(entry["probabilities"]), [places[label] for label in entry["tied"]]
    chances[tied] = chances[tied].mean()
    return chances


def describe_calibration(chances: np.ndarray, logits: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Plain data: reliability as it stands, and once a temperature is fitted (arXiv 1706.04599, section 4.2).

    Each half of the pictures, every second one, is judged by the temperature of the other; `fitted` has both and the
    expected error then, or is None and `why_not_fitted` says why.

    Args:
        chances: probabilities `(P, K)`.
        logits: `(P, K)`; -inf for a class without a score.
        true: `(P,)` int64.
    """
    found = describe_reliability(measure_reliability(chances, true))
    halves = [np.arange(len(true)) % 2 == half for half in (0, 1)]
    try:
        temperatures = [fit_temperature(logits[~half], true[~half]) for half in halves]
    except ValueError as error:
        return {**found, "fitted": None, "why_not_fitted": str(error)}
    scaled = np.zeros_like(logits)
    for half, temperature in zip(halves, temperatures):
        scaled[half] = softmax(logits[half], temperature)
    expected_error = measure_reliability(scaled, true).expected_error
    return {**found, "fitted": {"temperatures": temperatures, "expected_error": expected_error}}


def describe_reliability(found: Reliability) -> dict[str, Any]:
    """Plain data; bins without pictures have no confidence and accuracy."""
    rows = zip(found.counts.tolist(), found.confidences.tolist(), found.accuracies.tolist())
    bins = [
        {"pictures": count, "confidence": confidence if count else None, "accuracy": accuracy if count else None}
        for count, confidence, accuracy in rows
    ]
    return {"expected_error": found.expected_error, "bins": bins}


def name_counts(confusion: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts `(K, K)` above 0, by label and then prediction."""
    return {
        labels[number]: {labels[place]: int(row[place]) for place in map(int, np.flatnonzero(row))}
        for number, row in enumerate(confusion)
        if row.any()
    }


def place_counts(named: Mapping[str, Mapping[str, int]], labels: Sequence[str]) -> np.ndarray:
    """Counts `(K, K)` int64 of what `name_counts` gave."""
    return np.array([[named.get(label, {}).get(other, 0) for other in labels] for label in labels], dtype=np.int64)


def list_mistakes(confusion: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent first, of equals in the order of classes."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:NUM_MISTAKES], wrong.shape)
    return [
        {"label": labels[row], "prediction": labels[column], "pictures": int(wrong[row, column])}
        for row, column in zip(rows, columns)
        if wrong[row, column]
    ]


def describe_costs(totals: Sequence[int]) -> dict[str, float] | None:
    """Evaluations of a picture: mean, least and most."""
    if not totals:
        return None
    return {"mean": sum(totals) / len(totals), "min": min(totals), "max": max(totals), "total": sum(totals)}


def describe_drop(near: Mapping[str, Any], far: Mapping[str, Any]) -> dict[str, float] | None:
    """How much lower the accuracy of the second summary is; None where one has no labels.

    The interval is the hybrid of two Wilson intervals (Newcombe, Statistics in Medicine 17, 1998, method 10), for
    pictures of two sets that are drawn independently.
    """
    if near["accuracy"] is None or far["accuracy"] is None:
        return None
    one, other = (Rate(found["accuracy"]["hits"], found["accuracy"]["total"]) for found in (near, far))
    (low, high), (other_low, other_high) = one.interval, other.interval
    value = one.value - other.value
    return {
        "value": value,
        "low": value - sqrt((one.value - low) ** 2 + (other_high - other.value) ** 2),
        "high": value + sqrt((high - one.value) ** 2 + (other.value - other_low) ** 2),
    }


def summarise_cues(entries: Iterable[Entry]) -> dict[str, Any]:
    """Shape bias: shape decisions / (shape + texture decisions) (arXiv 1811.12231, section 2.2).

    Returns:
        Plain data: `num_pictures`, `skipped`, `num_agreeing` (both cues of one class: they decide nothing), decisions
        for `shape`, `texture` and `other` (a tie of k classes gives 1/k to each of the two), and `shape_bias` with its
        95 % Wilson interval, None where no decision is for either.
    """
    shape = texture = 0.0
    num, num_agreeing, scored, skipped = 0, 0, [], Counter()
    for entry in entries:
        if "skipped" in entry:
            skipped[entry["skipped"]] += 1
            continue
        num += 1
        scored.append(sum(entry["evaluations"]))
        if entry["label"] == entry["texture"]:
            num_agreeing += 1
            continue
        shape += credit(entry, entry["label"])
        texture += credit(entry, entry["texture"])
    return {
        "num_pictures": num,
        "skipped": dict(sorted(skipped.items())),
        "num_agreeing": num_agreeing,
        "shape": shape,
        "texture": texture,
        "other": num - num_agreeing - shape - texture,
        "shape_bias": Rate(shape, shape + texture).to_dict(),
        "evaluations": describe_costs(scored),
    }


def draw_figures(summary: Mapping[str, Any], labels: Sequence[str], folder: Path) -> None:
    """`confusion.png` and `reliability.png` of what `summarise` gave; nothing where no picture has a label."""
    if not summary["num_labelled"]:
        return
    draw_confusion(place_counts(summary["confusion"], labels), labels, folder / "confusion.png")
    found = summary["calibration"]
    names = ("pictures", "confidence", "accuracy")
    columns = [np.array([one[name] for one in found["bins"]], dtype=np.float64) for name in names]
    title = f"expected error {found['expected_error']:.3f}, {summary['num_labelled']} pictures"
    draw_reliability(Reliability(columns[0].astype(np.int64), *columns[1:]), title, folder / "reliability.png")
