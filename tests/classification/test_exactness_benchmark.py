"""How exact classifiers are: what the script counts as a difference, and what meets a bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def exactness(load: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("diffusers")
    return load("classifier_exactness")


def test_jobs_differ_by_predictions_and_by_their_worst_score(exactness: ModuleType, tmp_path: Path) -> None:
    whole = {"0.png": {"prediction": "a", "scores": [-1.0, -2.0]}, "1.png": {"prediction": "b", "scores": [-4.0, -3.0]}}
    other = {**whole, "1.png": {"prediction": "a", "scores": [-3.0, -3.0]}}
    assert exactness.classify_jobs.differ(whole, whole) == (0, 0)
    assert exactness.classify_jobs.differ(other, whole) == (1, 0.25)
    with pytest.raises(ValueError, match="1 pictures are recorded, not the 2 of the whole job"):
        exactness.classify_jobs.differ({"0.png": whole["0.png"]}, whole)
    (tmp_path / "records-0-of-1.jsonl").write_text('{"key": "0.png"}\n{"key": "1.pn')
    assert list(exactness.classify_jobs.read_records(tmp_path)) == ["0.png"]  # the last line was cut off


def test_bars_are_met_by_the_worst_of_the_repeats(exactness: ModuleType) -> None:
    def meets(values: list[float], unit: str, **config: float) -> bool:
        return exactness.meets(exactness.Row("what", values, unit, config))

    assert meets([0.0], "", bar=0)
    assert not meets([0.0, 1e-9], "", bar=0)
    assert meets([1.0, 1.0], "share", bar=1.0)
    assert not meets([1.0, 0.9], "share", bar=1.0)
    assert meets([5.0], "nats")


@pytest.mark.slow  # ten jobs, two of which are killed
def test_jobs_done_otherwise_find_the_same(exactness: ModuleType, tmp_path: Path) -> None:
    jobs = exactness.classify_jobs.measure("autoregressive", tmp_path)
    assert len(jobs.differences) == 7
    assert all(found.predictions == 0 and found.scores < 1e-6 for found in jobs.differences.values())  # worst 4.4e-8
    first, second = jobs.killed_after
    assert 0 < first < second < exactness.classify_jobs.NUM_PICTURES
