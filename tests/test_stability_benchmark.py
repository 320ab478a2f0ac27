"""The benchmark of stability: what its arms change, what it reads from a run, and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
Load = Callable[[str], ModuleType]


@pytest.fixture
def stability(load: Load) -> ModuleType:
    return load("stability")


def test_arms_differ_in_what_they_are_named_after_and_in_nothing_else(stability: ModuleType, tmp_path: Path) -> None:
    configs = {arm: stability.build_config(arm, 0, 50, 0.03, tmp_path) for arm in stability.ARMS}
    assert len({config.trainer.run_dir for config in configs.values()}) == len(configs)
    for arm, config in configs.items():
        assert config.model.qk_norm == ("QK-norm" in arm)
        assert (config.z_loss_weight > 0) == ("z-loss" in arm)
        assert (config.model.norm_placement == "post_sublayer") == arm.startswith("post-norm")
        same = {**vars(config.model), "qk_norm": None, "norm_placement": None}
        assert same == {**vars(stability.SHAPE), "qk_norm": None, "norm_placement": None}
        assert (config.optimizer, config.data) == (configs["pre-norm"].optimizer, configs["pre-norm"].data)


def test_figures_are_those_of_the_curves(stability: ModuleType) -> None:
    curves = {name: [(5, 1.0), (10, 2.0), (15, 7.0)] for name in stability.WATCHED}
    curves["loss"] = [(step, value) for step, value in zip(range(5, 45, 5), [9.0, 6.0, 5.0, 4.0, 3.0, 3.5, 5.0, 4.0])]
    run = {"curves": curves, "held_out": 3.25, "alarms": 2, "failed": False}
    found = stability.figures(run)
    assert found["held-out loss"] == (3.25, "nats")
    assert found["largest rise of the loss"] == (2.0, "nats")  # from 3 to 5; the warm-up is left out
    assert found["largest attention logit max"] == (7.0, "")
    assert (found["alarms"], found["stopped, not finite"]) == ((2, ""), (0.0, ""))
    curves["loss"].append((45, math.nan))
    assert stability.figures({**run, "held_out": math.inf, "failed": True})["stopped, not finite"] == (1.0, "")


@pytest.mark.slow
def test_a_short_ablation_trains_records_and_draws(
    stability: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    lines: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(stability, "record", lambda _, subject, repeats, *rest: lines.append((subject, repeats)))
    monkeypatch.setattr(stability, "PICTURE", tmp_path / "stability.png")
    monkeypatch.setattr(stability, "NUM_DOCUMENTS", {"train": 60, "held_out": 10})
    arms = ["pre-norm, QK-norm", "pre-norm"]
    options = {"steps": 30, "lr": 0.03, "seeds": 2, "arms": arms, "no_record": False}
    stability.main(argparse.Namespace(runs=tmp_path / "runs", **options))
    found = dict(lines)
    assert {subject.split(": ")[0] for subject in found} == set(arms)
    logits = {arm: found[f"{arm}: largest attention logit max"] for arm in arms}
    assert max(logits["pre-norm, QK-norm"]) < min(logits["pre-norm"])  # seen: 6 against 70
    metrics = sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
    assert len(metrics) == 4
    before = [path.stat().st_mtime_ns for path in metrics]
    stability.main(argparse.Namespace(runs=tmp_path / "runs", **options))  # trains nothing again
    assert [path.stat().st_mtime_ns for path in metrics] == before
    with Image.open(tmp_path / "stability.png") as picture:
        assert picture.width > 900


@pytest.fixture
def colors(load: Load, tmp_path: Path) -> set[tuple[int, int, int]]:
    curves = load("curves")
    rows = [(1, 5.0), (2, 3.0), (3, math.nan), (4, 1e9)]
    curves.draw_curves({"loss": {"one": [rows], "two": [[(1, 2.0), (4, 2.0)]]}, "norm": {}}, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        return {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}  # type: ignore[misc]


def test_every_arm_has_its_colour(load: Load, colors: set[tuple[int, int, int]]) -> None:
    curves = load("curves")
    for color in curves.COLORS[:2]:
        assert any(
            max(abs(a - b) for a, b in zip(color, found)) <= 20 for found in colors
        )  # seen: 12, for lines are smoothed
    assert not any(max(abs(a - b) for a, b in zip(curves.COLORS[2], found)) <= 20 for found in colors)


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "expected"),
    [
        (1.5, 30.0, True, [1, 2, 5, 10, 20, 50]),
        (0.02, 0.02, True, [0.02, 0.05]),
        (3.0, 40000.0, True, [2, 10, 100, 1000, 10000, 50000]),
        (0.0, 3.0, False, [0, 1, 2, 3]),
    ],
)
def test_axes_enclose_the_values_with_round_numbers(
    load: Load, low: float, high: float, logarithmic: bool, expected: list[float]
) -> None:
    found = load("curves").axis(low, high, logarithmic)
    assert found == pytest.approx(expected)
    assert found[0] <= low
    assert found[-1] >= high


def test_the_page_on_stability_shows_the_picture_and_names_what_is_logged() -> None:
    from mixmodal.training.alarms import REMEDIES

    page = (ROOT / "docs" / "stability.md").read_text()
    assert all(f"`{name}`" in page for name in REMEDIES)
    assert "python benchmarks/stability.py" in page
    assert "(stability.png)" in page
