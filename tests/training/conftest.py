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


@pytest.fixture(scope="session")
def write_splits(
    tmp_path_factory: pytest.TempPathFactory, write_shape_shards: Callable[..., None]
) -> Callable[[int, int], Path]:
    """A function of two numbers: writes so many captioned shapes of 16 x 16 pixels to `train` and to `held_out`."""

    def write(train: int, held_out: int) -> Path:
        folder = tmp_path_factory.mktemp("splits")
        write_shape_shards(folder / "train", train, size=16)
        write_shape_shards(folder / "held_out", held_out, size=16, seed=1)
        return folder

    return write


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with what lies in its module's `shards`."""
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[str], dict[str, Tensor]]:
    """Weights that the run `name` exported."""
    return lambda name="run": torch.load(tmp_path / name / "export" / "weights.pt", weights_only=True)
