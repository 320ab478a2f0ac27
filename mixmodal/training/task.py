"""What the trainer asks of a thing that can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixmodal.objectives.loss import Sums

Batch = Any
"""What a task's loader yields: tensors in named tuples, tuples, lists or dicts; other things travel along."""


class Losses(Protocol):
    """What one micro-batch gives; `mixmodal.objectives.loss.TokenLosses` is one."""

    @property
    def objective(self) -> Tensor: ...  # scalar with gradient: a SUM, to be divided by the weight of the whole step

    @property
    def metrics(self) -> Mapping[str, Sums]: ...  # the same names every time; `loss` among them


class Loader(Protocol):
    """Micro-batches of this rank without end; its state is numbers, strings, tensors, lists and dicts."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Task(Protocol):
    """What is trained. Subclass it to get the defaults of the last methods."""

    def build_model(self) -> nn.Module:
        """The model on the CPU in float32; the global generator is seeded, the same on every rank."""
        ...

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> Loader: ...

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """Sum of loss weights of a batch, on the CPU: it is needed before the loss, which it divides."""
        ...

    def losses(self, model: nn.Module, batch: Batch, step: int) -> Losses:
        """Calls `model` on a batch that is on the device; `step` counts from 0."""
        ...

    def batch_keys(self, batch: Batch) -> list[str]:
        """Names of the samples, for messages."""
        ...

    def batch_tokens(self, batch: Batch) -> int:
        """Positions that the model computes, padding included: the unit of throughput. 0 leaves it out."""
        return 0

    def flops_per_token(self) -> float:
        """Floating-point operations of a training step for each of those positions; 0 where it is not known."""
        return 0.0

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Held-out metrics, the same on every rank (see `metrics.reduce_sums`); called without gradient."""
        return {}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the trained model, on rank 0 only."""


def to_device(value: Any, device: torch.device) -> Any:
    """Moves all tensors of a batch; other things travel along."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(entry, device) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(entry, device) for entry in value)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    return value
