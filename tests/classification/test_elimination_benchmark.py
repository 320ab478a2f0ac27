"""The comparison of policies: its arms, what it counts, and that a dry run leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mixmodal.classification.policies import Adaptive, Full, Staged


@pytest.fixture
def policies(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("elimination_policies")


def test_ratios_are_those_of_the_formulas(policies: ModuleType) -> None:
    reference = policies.Found(np.array([True, False, True]), np.ones(3, bool), np.array([50.0, 60.0, 70.0]))
    ours = policies.Found(np.array([True, True, True]), np.ones(3, bool), np.array([10.0, 20.0, 30.0]))
    compared = policies.compare(reference, ours)
    assert compared["ratio"] == 3
    assert [compared["accuracy_difference"], compared["standard_error"]] == pytest.approx([1 / 3, 1 / 3])


def test_a_small_comparison_counts_the_pilot_and_records_only_when_asked(
    policies: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorded: dict[str, float] = {}
    monkeypatch.setattr(policies, "record", lambda name, subject, values, *_: recorded.update({subject: values[0]}))
    monkeypatch.setattr(policies, "WORLD", {**policies.WORLD, "num_classes": 4, "dim": 4})
    monkeypatch.setattr(policies, "WORLD_SEEDS", (1,))
    monkeypatch.setattr(policies, "FIGURE", tmp_path / "curves.png")
    arms = [
        policies.Arm(policies.REFERENCE, "staged", Staged(samples=(5, 20), keep=(2, 1))),
        policies.Arm(policies.OURS, "adaptive", Adaptive(max_times=8), importance=True),
        policies.Arm("full", "full", Full(num_times=8)),
    ]
    monkeypatch.setattr(policies, "build_arms", lambda: arms)
    policies.main(25, dry=True)
    assert not recorded
    assert not list(tmp_path.iterdir())
    policies.main(25, dry=False)
    assert recorded["full: evaluations per class"] == 8
    assert recorded[f"{policies.REFERENCE}: evaluations per class"] == (4 * 5 + 2 * 15) / 4
    pilot = policies.NUM_PILOT * policies.NUM_PILOT_TIMES / 25
    assert pilot + 7 <= recorded[f"{policies.OURS}: evaluations per class"] <= pilot + 15
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_compared_arms_are_in_the_table_and_are_the_defaults(policies: ModuleType) -> None:
    arms = {arm.name: arm for arm in policies.build_arms()}
    assert arms[policies.REFERENCE].policy == Staged()
    assert arms[policies.OURS].policy == Adaptive()
