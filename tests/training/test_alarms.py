"""Alarms on growth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_task import Rows, ToyLoss, ToyTask

from mixmodal.objectives.loss import Sums
from mixmodal.training.alarms import MAX_KEPT, Alarms

Fit = Callable[..., Any]


def warned(alarms: Alarms, values: list[float], name: str = "logit_norm") -> list[int]:
    return [step for step, value in enumerate(values) if name in alarms.watch({"step": step, name: value})]


def test_a_spike_names_the_quantity_the_growth_and_a_remedy() -> None:
    alarms = Alarms(3.0, 0)
    assert warned(alarms, [2.0] * 10) == []
    (message,) = alarms.watch({"step": 10, "logit_norm": 6.5, "loss": 99.0}).values()
    assert message.startswith("step 10: logit_norm is 6.5, 3.2 times the median so far (2)")
    assert "z_loss_weight" in message


def test_an_excursion_is_told_once_and_the_next_one_again() -> None:
    assert warned(Alarms(3.0, 0), [1.0] * 20 + [9.0, 9.0, 9.0, 1.0, 9.0]) == [20, 24]


def test_steady_growth_is_no_alarm_and_exponential_growth_is() -> None:
    assert warned(Alarms(3.0, 0), [float(step) for step in range(1, 2000)]) == []
    # e^(0.01 t) is 3 times its median, the value at half the time, where t / 2 = log(3) / 0.01
    (first,) = warned(Alarms(3.0, 0), [math.exp(0.01 * step) for step in range(400)])
    assert first == pytest.approx(2 * math.log(3) / 0.01, abs=3)  # seen: 220


def test_the_warm_up_is_not_looked_at() -> None:
    alarms = Alarms(3.0, 20)
    assert warned(alarms, [0.01] * 20 + [1.0] * 30 + [4.0]) == [50]


def test_values_that_are_no_numbers_are_left_out() -> None:
    alarms = Alarms(3.0, 0)
    for value in (None, math.nan, math.inf):
        assert alarms.watch({"step": 0, "logit_norm": value}) == {}
    assert warned(alarms, [1.0] * 10 + [4.0]) == [10]


def test_a_factor_of_0_watches_nothing() -> None:
    assert warned(Alarms(0.0, 0), [1.0] * 20 + [1e9]) == []


def test_long_runs_keep_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms = Alarms(3.0, 0)
    assert warned(alarms, [1.0 + step / 10000 for step in range(10 * MAX_KEPT)] + [4.0]) == [10 * MAX_KEPT]
    assert len(alarms._histories["logit_norm"]._values) <= MAX_KEPT


class Spiking(ToyTask):
    """Its logit norm jumps in the last step."""

    def __init__(self, jump: int) -> None:
        super().__init__()
        self.jump = jump

    def losses(self, model: nn.Module, batch: Rows, step: int) -> ToyLoss:
        found = super().losses(model, batch, step)
        value = torch.tensor(100.0 if step >= self.jump else 1.0)
        return found._replace(metrics={**found.metrics, "logit_norm": Sums(value, torch.tensor(1.0))})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_warns_and_records_the_alarm(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(task=Spiking(13), max_steps=15)
    assert {line["step"]: line["alarm"] for line in lines(tmp_path / "run") if "alarm" in line} == {14: "logit_norm"}
    assert "step 14: logit_norm is 100, 100.0 times the median so far (1)" in capsys.readouterr().out
    fit("quiet", task=Spiking(13), max_steps=15, alarm_growth=0.0)
    assert not [line for line in lines(tmp_path / "quiet") if "alarm" in line]


def test_going_on_remembers_what_was_logged_before(fit: Fit, tmp_path: Path) -> None:
    fit(task=Spiking(99), max_steps=12)
    fit(task=Spiking(12), max_steps=13)
    assert [line["step"] for line in lines(tmp_path / "run") if "alarm" in line] == [13]


def test_a_factor_that_every_value_passes_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"trainer\.alarm_growth is 0\.5"):
        fit(alarm_growth=0.5)
