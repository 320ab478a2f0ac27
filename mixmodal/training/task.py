"""What the trainer asks of a thing that can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL.Image import Image as Picture
from torch import Tensor, nn

from mixmodal.objectives.loss import Sums
from mixmodal.training.metrics import Peak
from mixmodal.training.optimizer import OptimizerConfig

Batch = Any
"""What a task's loader yields: tensors in named tuples, tuples, lists or dicts; other things travel along."""


class Losses(Protocol):
    """What one micro-batch gives; `mixmodal.objectives.loss.TokenLosses` is one."""

    @property
    def objective(self) -> Tensor: ...  # scalar with gradient: a SUM, to be divided by the weight of the whole step

    @property
    def metrics(self) -> Mapping[str, Sums | Peak]: ...  # the same names on every rank; `loss` among them


class Loader(Protocol):
    """Micro-batches of this rank; its state is numbers, strings, tensors, lists and dicts.

    It goes on without end, or ends training on all ranks before the same step with a `StopIteration` that says why.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


MODEL = "model"
"""Name of the network that is evaluated and exported."""


class Opponent(NamedTuple):
    """A network that is trained beside the model, such as a discriminator, with an optimizer of its own.

    Args:
        model: on the CPU in float32.
        optimizer: its schedule goes from `first_step` to the end of training.
        first_step: the step, counted from 0, of its first round.
    """

    model: nn.Module
    optimizer: OptimizerConfig
    first_step: int = 0


class Task(Protocol):
    """What is trained. Subclass it to get the defaults of the last methods."""

    def build_model(self) -> nn.Module:
        """The model on the CPU in float32; the global generator is seeded, the same on every rank."""
        ...

    def compile_model(self, model: nn.Module) -> None:
        """Lets torch.compile have the parts of `model` that are worth it; `trainer.compile` asks for it.

        Raises:
            ValueError: where there is none.
        """
        raise ValueError("trainer.compile can not act here: only transformers have blocks to compile; leave it out")

    def build_opponents(self) -> dict[str, Opponent]:
        """Further networks by name, built after the model; like it on the CPU in float32, the same on every rank."""
        return {}

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> Loader: ...

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """Sum of loss weights of a batch, on the CPU: it is needed before the loss, which it divides."""
        ...

    def losses(self, model: nn.Module, batch: Batch, step: int) -> Losses:
        """Calls `model` on a batch that is on the device; `step` counts from 0."""
        ...

    def rounds(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> Iterator[tuple[str, Losses]]:
        """What each network is trained on, for one micro-batch: names of networks with losses that lead to them.

        The trainer sends each loss backwards before it asks for the next. A network that no round names rests in this
        step; its metrics must come all the same, with the count 0 (see `MetricSums`). Without opponents the only round
        is `losses`.
        """
        yield MODEL, self.losses(networks[MODEL], batch, step)

    def recomputed(self, model: nn.Module) -> Iterable[nn.Module]:
        """Parts of the model that `trainer.activation_checkpointing` computes again in backward; none by default."""
        return ()

    def batch_keys(self, batch: Batch) -> list[str]:
        """Names of the samples, for messages."""
        ...

    def batch_tokens(self, batch: Batch) -> int:
        """Tokens of a batch that is on the CPU, padding not among them: the unit of throughput. 0 leaves it out."""
        return 0

    def batch_flops(self, batch: Batch) -> float:
        """Floating-point operations of training on a batch that is on the CPU, for the MFU; 0 where not known."""
        return self.flops_per_token() * self.batch_tokens(batch)

    def counters(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        """What the log tells of the data up to a state of the loader: numbers that are the same on every rank."""
        return {}

    def flops_per_token(self) -> float:
        """Operations of a token in a full row, from the config alone, for plans; 0 where it is not known."""
        return 0.0

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Held-out metrics, the same on every rank (see `MetricSums`); called without gradient."""
        return {}

    draws_pictures: bool = False
    """Whether `draw` gives any. It needs whole weights, which ZeRO stage 3 does not keep."""

    def draw(self, model: nn.Module, step: int, last: bool) -> dict[str, Picture]:
        """Pictures by name for TensorBoard, after `step` steps and `evaluate`; called without gradient, on rank 0.

        `last` says that training has ended.
        """
        return {}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the trained model, on rank 0 only."""


class PictureTask(Task):
    """What is trained on micro-batches of pictures, each of which weighs the same."""

    def batch_weight(self, batch: Batch) -> float:
        return float(len(batch.pixels))

    def batch_keys(self, batch: Batch) -> list[str]:
        return batch.keys


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
