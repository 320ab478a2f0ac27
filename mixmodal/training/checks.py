"""What is checked before a step changes the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixmodal.training.run import Run
from mixmodal.training.task import Batch


class NonFiniteError(ValueError):
    """A loss or gradient norm is not a number; the weights are as before the step."""


class Check:
    """Raises, on all ranks alike, before a step that would spoil the weights."""

    def __init__(self, run: Run, batches: list[Batch], objectives: list[Tensor]) -> None:
        self.run, self.batches, self.objectives = run, batches, objectives

    def __call__(self, holds: bool, problem: str) -> None:
        if holds:
            return
        keys = [self.run.task.batch_keys(batch) for batch in self.batches]
        bad = [key for key, value in zip(keys, self.objectives, strict=True) if not torch.isfinite(value)]
        named = sorted({key for batch in bad or keys for key in batch})
        if self.run.place.world_size > 1:
            everyone: list[Any] = [None] * self.run.place.world_size
            dist.all_gather_object(everyone, (bool(bad), named))
            worst = any(is_bad for is_bad, _ in everyone)
            named = sorted({key for is_bad, keys in everyone if is_bad == worst for key in keys})
        shown = ", ".join(named[:20]) + (f" and {len(named) - 20} more" if len(named) > 20 else "")
        raise NonFiniteError(
            f"step {self.run.step}: {problem}; the weights are those of step {self.run.step - 1}. Rows: {shown}"
        )
