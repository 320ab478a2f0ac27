"""Figures in docs come from recorded measurements, and from nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mixmodal.quickstart import environment

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_is_that_of_the_recorded_lines() -> None:
    render = load("render")
    assert render.PAGE.read_text() == render.render(render.read_lines()), "run: python benchmarks/render.py"


def test_a_line_says_all_that_is_needed_and_the_newest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, render = load("record"), load("render")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/measure_decode.py", "--repeats", "3"])
    record.record("decode", "ours", [9.0, 1.0, 2.0], "tokens/s", "cpu", {"batch": 1})
    line = record.record("decode", "ours", [3.0, 50.0, 40.0], "tokens/s", "cpu", {"batch": 1})
    assert {"commit", "command", "device", "versions", "config", "repeats", "median"} <= set(line)
    page = render.render(render.read_lines(tmp_path))
    (shown,) = [row for row in page.splitlines() if row.startswith("| ours |") and "not run" not in row]
    assert "| 40 | tokens/s | 3 |" in shown
    assert "benchmarks/measure_decode.py --repeats 3" in shown or "measure_decode.py --repeats 3" in shown


def test_devices_without_a_measurement_say_not_run() -> None:
    assert "| all | GPU | not run |" in load("render").render([])


def test_environment_names_versions_and_device() -> None:
    found = environment.versions()
    assert set(environment.PACKAGES) < set(found)
    assert environment.device()
    assert environment.num_cores() >= 1


def test_commit_is_unknown_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "mixmodal" / "quickstart" / "environment.py"))
    assert environment.commit() == "unknown"
