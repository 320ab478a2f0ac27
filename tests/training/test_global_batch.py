"""The rows of a step: given as one number, shared by any number of ranks, and kept by a run that goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmodal.training.config import TrainerConfig
from mixmodal.training.plan import PlanConfig, plan

Fit = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def config(**options: Any) -> TrainerConfig:
    return TrainerConfig(run_dir=Path("run"), max_steps=1, micro_batch_size=2, **options)


@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_accumulation_follows_from_the_global_batch(ranks: int, accumulated: int) -> None:
    shared = config(global_batch_size=24).shared(ranks)
    assert shared == config(global_batch_size=24, grad_accum_steps=accumulated)
    assert shared.shared(ranks) == shared


def test_a_batch_that_ranks_can_not_share_is_named() -> None:
    said = "global_batch_size 24 is no multiple of the 10 rows that 5 ranks of trainer.micro_batch_size 2 compute"
    with pytest.raises(ValueError, match=said):
        config(global_batch_size=24).shared(5)
    with pytest.raises(ValueError, match=r"grad_accum_steps is 3, but trainer\.global_batch_size 24 comes to 6 on 2"):
        config(global_batch_size=24, grad_accum_steps=3).shared(2)
    with pytest.raises(ValueError, match=r"global_batch_size is -1"):
        config(global_batch_size=-1)


def test_training_takes_the_rows_that_were_asked_for(
    fit: Fit, exported: Callable[[str], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("told", micro_batch_size=2, grad_accum_steps=4)
    fit("asked", micro_batch_size=2, global_batch_size=8)
    assert all(torch.equal(exported("told")[name], value) for name, value in exported("asked").items())
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="3 ranks"):  # before the ranks meet
        fit("uneven", micro_batch_size=2, global_batch_size=8)


def test_a_run_that_goes_on_with_other_rows_warns(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    fit(max_steps=2, micro_batch_size=4)
    with caplog.at_level(logging.WARNING):
        fit(max_steps=3, micro_batch_size=2, grad_accum_steps=2)
        assert not caplog.records
        fit(max_steps=4, micro_batch_size=4, grad_accum_steps=2)
    assert "step_00000003 was written at 4 rows a step; from here on a step has 8" in caplog.text


def test_a_plan_shares_the_batch_among_its_gpus() -> None:
    options = ("--trainer.global_batch_size=10", "--trainer.micro_batch_size=2", "--model.vocab_size=500")
    path = ROOT / "configs/train/tiny.yaml"
    with pytest.raises(ValueError, match="10 is no multiple of the 6 rows that 3 ranks"):
        plan(PlanConfig(training=path, gpus=3, overrides=options))
