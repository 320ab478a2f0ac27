"""What records add up to: intervals against published figures, ties, confusion, calibration, shift and cues."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.classification.summary import (
    Rate,
    describe_drop,
    draw_figures,
    place_counts,
    summarise,
    summarise_cues,
    top_credit,
)

LABELS = ["a", "b", "c"]


def entry(label: str | None, scores: list[float | None], tied: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A record of as many classes as scores, called by letters."""
    names = [chr(ord("a") + place) for place in range(len(scores))]
    known = np.array([-np.inf if score is None else score for score in scores])
    odds = np.exp(known - known.max())
    tied = tied or [names[place] for place in np.flatnonzero(known == known.max())]
    found = {"label": label, "prediction": tied[0], "tied": tied, "scores": scores, "evaluations": [2] * len(scores)}
    return {**found, "probabilities": (odds / odds.sum()).tolist(), **more}


def right(label: str) -> dict[str, Any]:
    return entry(label, [float(name == label) for name in LABELS])


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), 857 to 872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_wilson(hits: int, total: int, low: float, high: float) -> None:
    assert Rate(hits, total).interval == pytest.approx((low, high), abs=5e-5)  # as many digits as are published
    assert Rate(total - hits, total).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), 873 to 890, table II, method 10
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 10), 0.6075, 1.0)],
)
def test_a_drop_has_the_interval_of_newcombe(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    near, far = ({"accuracy": Rate(*pair).to_dict()} for pair in (first, second))
    found = describe_drop(near, far)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-5)  # as many digits as are published
    assert found["value"] == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert describe_drop(near, {"accuracy": None}) is None


def test_a_tie_earns_its_share() -> None:
    entries = [
        entry("a", [1, 1, 0]),
        entry("b", [0, 1, 0]),
        entry("a", [0, 1, 0]),
        entry(None, [1, 0, 0]),
        {"label": "a", "skipped": "broken picture", "error": "x"},
    ]
    found = summarise(entries, LABELS)
    assert (found["num_pictures"], found["num_labelled"], found["num_ties"]) == (4, 3, 1)
    assert (found["accuracy"]["hits"], found["accuracy"]["value"]) == (1.5, 0.5)
    assert found["skipped"] == {"broken picture": 1}
    assert found["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 1}}
    assert place_counts(found["confusion"], LABELS).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["mistakes"] == [{"label": "a", "prediction": "b", "pictures": 1}]
    assert found["evaluations"] == {"mean": 6, "min": 6, "max": 6, "total": 24}
    assert found["top_5"] is None


def test_every_class_weighs_the_same_in_the_mean_per_class() -> None:
    found = summarise([right("a")] * 3 + [entry("b", [1, 0, 0])], LABELS)
    assert found["accuracy"]["value"] == 0.75
    assert found["mean_per_class"] == 0.5  # of a and b; there are no pictures of c
    assert {label: rate["value"] for label, rate in found["per_class"].items()} == {"a": 1.0, "b": 0.0}


def test_pictures_without_labels_have_no_accuracy(tmp_path: Path) -> None:
    found = summarise([entry(None, [1, 0, 0])], LABELS)
    assert all(found[name] is None for name in ("accuracy", "mean_per_class", "calibration"))
    draw_figures(found, LABELS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scores", "label", "expected"),
    [
        ([9, 8, 7, 6, 5, 4, 3], "e", 1),
        ([9, 8, 7, 6, 5, 4, 3], "f", 0),
        ([9, 8, 7, 6, 5, 5, 3], "f", 1 / 2),
        ([9, 8, 7, 6, 5, 5, 5], "f", 1 / 3),
        ([9, 8, 7, 5, 5, 5, 5], "g", 2 / 4),
        ([1, 1, 1, 1, 1, 1, 1], "d", 5 / 7),
        ([9, 8, 7, None, None, None, None], "g", 2 / 4),
    ],
)
def test_top_5_shares_places_among_equals(scores: list[float | None], label: str, expected: float) -> None:
    assert top_credit(entry(label, scores), "abcdefg".index(label)) == pytest.approx(expected)
    found = summarise([entry(label, scores)], list("abcdefg"))
    assert found["top_5"]["value"] == pytest.approx(expected)


def test_rounding_does_not_tell_tied_classes_apart() -> None:
    near = entry("b", [1.000001, 1.0, 0.0], tied=["a", "b"])
    found = summarise([near], LABELS)
    (bin,) = [one for one in found["calibration"]["bins"] if one["pictures"]]
    assert bin["accuracy"] == found["accuracy"]["value"] == 0.5
    seven = entry("f", [2 - 1e-9 * place for place in range(6)] + [0], tied=list("abcdef"))
    assert top_credit(seven, 5) == pytest.approx(5 / 6)


def test_calibration_compares_confidence_and_accuracy() -> None:
    sure = [entry(label, [np.log(0.9), np.log(0.05), np.log(0.05)]) for label in "aaaab"]
    found = summarise(sure, LABELS)["calibration"]
    assert found["expected_error"] == pytest.approx(0.9 - 4 / 5)
    assert sum(one["pictures"] for one in found["bins"]) == 5
    assert [one["confidence"] for one in found["bins"] if one["pictures"]] == pytest.approx([0.9])
    assert all(one["accuracy"] is None for one in found["bins"] if not one["pictures"])


def test_a_temperature_of_other_pictures_takes_off_confidence() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = [LABELS[generator.choice(3, p=row)] for row in chances]
    found = summarise([entry(label, (8 * row).tolist()) for label, row in zip(labels, logits)], LABELS)["calibration"]
    assert found["fitted"]["temperatures"] == pytest.approx([8, 8], rel=0.25)
    assert found["fitted"]["expected_error"] < 0.1 < 0.3 < found["expected_error"]


def test_where_no_temperature_is_best_it_is_said_why() -> None:
    found = summarise([right(label) for label in "abcabc"], LABELS)["calibration"]
    assert found["fitted"] is None
    assert "the lower the temperature, the better" in found["why_not_fitted"]


@pytest.mark.parametrize("num_classes", [3, 400])
def test_figures_are_pictures_whatever_the_number_of_classes(num_classes: int, tmp_path: Path) -> None:
    labels = [f"class {number}" for number in range(num_classes)]
    scores: list[float | None] = [2.0, 1.0, *[0.0] * (num_classes - 2)]
    made = entry("a", scores) | {"prediction": labels[0], "tied": labels[:1]}
    draw_figures(summarise([made | {"label": labels[0]}, made | {"label": labels[1]}], labels), labels, tmp_path)
    with PIL.open(tmp_path / "confusion.png") as confusion, PIL.open(tmp_path / "reliability.png") as reliability:
        assert 100 < confusion.width < 1500
        assert len(confusion.convert("RGB").getcolors(1 << 16) or ()) > 2
        assert reliability.size[0] > 300


def test_shape_bias_is_the_share_of_shape_among_decisions_for_either() -> None:
    entries = [
        entry("a", [1, 0, 0], texture="b"),
        entry("a", [1, 0, 0], texture="c"),
        entry("a", [1, 1, 0], texture="b"),
        entry("a", [0, 1, 0], texture="b"),
        entry("a", [0, 0, 1], texture="b"),
        entry("a", [1, 0, 0], texture="a"),
        {"label": "a", "texture": "b", "skipped": "broken picture", "error": "x"},
    ]
    found = summarise_cues(entries)
    assert (found["shape"], found["texture"], found["other"], found["num_agreeing"]) == (2.5, 1.5, 1, 1)
    assert found["shape_bias"]["value"] == 2.5 / 4
    assert (found["shape_bias"]["low"], found["shape_bias"]["high"]) == Rate(2.5, 4).interval
    assert found["skipped"] == {"broken picture": 1}
    assert summarise_cues([entry("a", [0, 0, 1], texture="b")])["shape_bias"] is None
