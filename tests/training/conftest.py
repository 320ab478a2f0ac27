"""Training tests share a toy task, which launched processes import as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from toy_task import ToyTask

from mixmodal.training.config import TrainerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.trainer import FitResult, Trainer

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., FitResult]:
    """Trains a toy task in `tmp_path / name`, 8 rows a step and 6 steps unless told otherwise."""

    def fit(name: str = "run", task: ToyTask | None = None, **options: Any) -> FitResult:
        defaults = {"max_steps": 6, "micro_batch_size": 8, "log_every": 1, "tensorboard": False}
        config = TrainerConfig(run_dir=tmp_path / name, **{**defaults, **options})
        return Trainer(config, OPTIMIZER).fit(task or ToyTask())

    return fit


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[str], dict[str, Tensor]]:
    """Weights that the run `name` exported."""
    return lambda name="run": torch.load(tmp_path / name / "export" / "weights.pt", weights_only=True)
