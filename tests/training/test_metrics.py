"""Sums and counts, the metrics file and what the terminal shows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mixmodal.objectives.loss import Sums
from mixmodal.training.metrics import MetricsLog, MetricSums, Peak


def sums(total: float, count: float) -> Sums:
    return Sums(torch.tensor(total), torch.tensor(count))


def log(folder: Path, first_step: int = 0, tensorboard: bool = False, active: bool = True) -> MetricsLog:
    return MetricsLog(folder, first_step=first_step, max_steps=9, tensorboard=tensorboard, active=active)


def test_each_counted_thing_weighs_the_same() -> None:
    metrics = MetricSums()
    metrics.add({"loss": sums(10.0, 1.0), "loss_image": sums(0.0, 0.0)})
    metrics.add({"loss": sums(2.0, 3.0), "loss_image": sums(0.0, 0.0)})
    assert metrics.means() == {"loss": 3.0, "loss_image": None}
    assert metrics.means() == {}


def test_sums_do_not_lose_small_addends() -> None:
    metrics = MetricSums()
    for _ in range(100):
        metrics.add({"loss": sums(1e8 + 8, 1.0)})
    assert metrics.means() == {"loss": 1e8 + 8}


def test_of_peaks_the_largest_counts() -> None:
    metrics = MetricSums()
    for value in (2.0, 5.0, 3.0):
        metrics.add({"logit": Peak(torch.tensor(value)), "none": Peak(torch.tensor(-math.inf)), "loss": sums(1.0, 4.0)})
    assert metrics.means() == {"logit": 5.0, "none": None, "loss": 0.25}
    metrics.add({"logit": Peak(torch.tensor(1.0))})
    assert metrics.means() == {"logit": 1.0}


def test_a_line_is_a_json_object_and_the_terminal_gets_a_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with log(tmp_path) as writer:
        writer.write({"step": 3, "loss": 1.25, "loss_image": None, "eval_loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3, "loss": 1.25, "loss_image": None, "eval_loss": 2.0
    }  # fmt: skip
    assert capsys.readouterr().out == "step 3/9  loss 1.25  eval_loss 2\n"


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log(tmp_path, first_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_no_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'3\nnull\n{"step": "x"}\n{"loss": 1}\n\xff\xfe\n{"step": 1}\n')
    log(tmp_path, first_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path, active=False) as writer:
        writer.write({"step": 1, "loss": 1.0})
        writer.say("hello")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    with log(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 1, "loss": 1.0, "mfu": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with log(tmp_path) as writer:
        writer.write({"step": 3, "loss": 1.25})
        writer.advance(4)
        writer.say("saved")
