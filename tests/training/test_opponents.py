"""A second network beside the model: each takes its own steps, rests when no round names it, and resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launcher import curve, launch
from test_trainer import MODES, losses, stop_in_step
from torch import Tensor
from toy_task import Contest, ToyLoader

from mixmodal.training.checkpoint import CheckpointError
from mixmodal.training.checks import NonFiniteError
from mixmodal.training.randomness import set_seeds
from mixmodal.training.task import MODEL

ROOT = Path(__file__).parents[2]
Fit = Callable[..., Any]
Exported = Callable[..., dict[str, Tensor]]


@pytest.fixture
def critic(tmp_path: Path) -> Exported:
    return lambda name="run": torch.load(tmp_path / name / "export" / "critic.pt", weights_only=True)


def test_both_networks_take_the_steps_of_a_plain_loop(fit: Fit, exported: Exported, critic: Exported) -> None:
    fit(task=Contest(), max_steps=3, max_grad_norm=0.0)
    task, loader = Contest(), ToyLoader(8, 1, 0, 1)
    set_seeds(0)
    model = task.build_model()
    opponent = task.build_opponents()["critic"].model
    matrices = [[p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(matrices, (0.1, 0.0), strict=True)]
    first = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
    second = torch.optim.AdamW(opponent.parameters(), lr=3e-3, betas=(0.5, 0.9), eps=1e-5, weight_decay=0.0)
    for step, rate in enumerate((5e-3, 1e-2, 1e-2)):
        batch = next(loader)
        for group in first.param_groups:
            group["lr"] = rate
        for _, found in task.rounds({MODEL: model, "critic": opponent}, batch, step):
            (found.objective / batch.weights.sum()).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(exported()[name], value, rtol=0, atol=1e-6)
    for name, value in opponent.state_dict().items():
        torch.testing.assert_close(critic()[name], value, rtol=0, atol=1e-6)


def test_splitting_a_step_into_micro_batches_changes_neither(fit: Fit, exported: Exported, critic: Exported) -> None:
    fit("whole", Contest(), max_steps=3)
    fit("split", Contest(), max_steps=3, micro_batch_size=2, grad_accum_steps=4)
    for network in (exported, critic):
        for name, value in network("whole").items():
            torch.testing.assert_close(network("split")[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16", "zero1", "zero2_bfloat16"])
def test_both_resume_bit_for_bit(fit: Fit, exported: Exported, critic: Exported, tmp_path: Path, mode: str) -> None:
    fit("whole", Contest(start=1), **MODES[mode])
    stopping = Contest(start=1)
    stop_in_step(stopping, 2)
    assert not fit("parts", stopping, **MODES[mode]).finished
    torch.manual_seed(123)
    assert fit("parts", Contest(start=1), **MODES[mode]).finished
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for network in (exported, critic):
        assert all(torch.equal(network("parts")[name], value) for name, value in network("whole").items())


def test_an_opponent_rests_until_a_round_names_it(fit: Fit, critic: Exported, tmp_path: Path) -> None:
    fit("rested", Contest(start=6))
    fit("fought", Contest(start=5))
    set_seeds(0)
    task = Contest()
    task.build_model()
    fresh = task.build_opponents()["critic"].model.state_dict()
    assert all(torch.equal(critic("rested")[name], value) for name, value in fresh.items())
    assert not torch.equal(critic("fought")["0.weight"], fresh["0.weight"])
    lines = [json.loads(line) for line in (tmp_path / "fought" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["grad_norm_critic"] is not None for line in lines] == [False] * 5 + [True]
    assert [line["critic_loss"] is not None for line in lines] == [False] * 5 + [True]
    assert lines[-1]["lr_critic"] == pytest.approx(3e-3)


def test_the_schedule_of_an_opponent_begins_with_its_first_round(fit: Fit, tmp_path: Path) -> None:
    fit(task=Contest(start=3, schedule="linear", warmup_steps=2), max_steps=6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr_critic"] for line in lines if "loss" in line]
    assert rates[3:] == pytest.approx([1.5e-3, 3e-3, 3e-3])  # two steps of warm-up, and the peak
    fit("early", task=Contest(schedule="linear", warmup_steps=2), max_steps=6)
    lines = [json.loads(line) for line in (tmp_path / "early" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr_critic"] for line in lines if "loss" in line][5] < 2e-3


def test_stage_3_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"stage 3 can not train a second network \(critic\)"):
        fit(task=Contest(), **MODES["zero3"])


def test_a_bad_loss_of_the_opponent_stops_both(fit: Fit) -> None:
    task = Contest(bad_step=2)
    with pytest.raises(NonFiniteError, match="step 3: loss of the critic is nan; the weights are those of step 2"):
        fit(task=task)


def test_a_checkpoint_without_the_opponent_is_refused(fit: Fit) -> None:
    fit(max_steps=2)
    with pytest.raises(CheckpointError, match="written with networks"):
        fit(task=Contest(), max_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_train_both_networks_as_one(
    fit: Fit, exported: Exported, critic: Exported, tmp_path: Path, stage: int
) -> None:
    fit("one", Contest(), max_steps=3)
    zero = {"deepspeed": str(ROOT / f"configs/deepspeed/zero{stage}.json")} if stage else {}
    launch(tmp_path, 2, tmp_path / "two", contest=True, max_steps=3, micro_batch_size=2, grad_accum_steps=2, **zero)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    for network in (exported, critic):
        for name, value in network("one").items():
            torch.testing.assert_close(network("two")[name], value, rtol=0, atol=1e-6)
