"""One model under DeepSpeed: the only import of deepspeed, made where it is used."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmodal.extras import import_extra
from mixmodal.training.ranks import meet


class Place(NamedTuple):
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    device: torch.device


def load_deepspeed() -> Any:
    """Imports deepspeed, quiet and without its compiled extensions.

    Raises:
        ValueError: where it is not installed.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would find that out by itself, with a warning
    deepspeed = import_extra("deepspeed", "train", "training needs")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # at every step
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator: Any = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        # Its communication backend builds a shared-memory extension (half a minute and a C++ compiler), which only
        # inference uses. An op that is not listed as compatible is not built.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


def init_distributed() -> Place:
    """Joins the processes of the launcher, or makes a world of one process that needs no port.

    Raises:
        ValueError: where deepspeed is not installed.
        RankError: naming the processes that did not come.
    """
    deepspeed = load_deepspeed()
    accelerator = deepspeed.get_accelerator()
    backend = accelerator.communication_backend_name()
    device = torch.device("cpu")
    if accelerator.device_name() != "cpu":
        device = torch.device(accelerator.device_name(), int(os.environ.get("LOCAL_RANK", "0")))
        accelerator.set_device(device.index)
    if not dist.is_initialized() and "RANK" not in os.environ:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    elif not dist.is_initialized():
        meet(backend, device if device.type == "cuda" else None)
        atexit.register(leave_distributed)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it even in a world of one
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return Place(dist.get_rank(), dist.get_world_size(), device)


def check_device(config: Mapping[str, Any]) -> None:
    """Makes sure that DeepSpeed knows the keys of its ZeRO section, and that the device can do what it asks for.

    Raises:
        ValueError: naming the option.
    """
    accelerator: Any = load_deepspeed().get_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"trainer.deepspeed: zero_optimization.{found}") from error
    if "fp16" in config and not accelerator.is_fp16_supported():
        raise ValueError(
            f"trainer.precision is float16, in which this {accelerator.device_name()} can not compute; choose bfloat16"
        )
    for name in ("offload_optimizer", "offload_param"):
        section = config["zero_optimization"].get(name) or {}
        if section.get("device") == "nvme" and accelerator.device_name() == "cpu":
            raise ValueError(
                f"zero_optimization.{name}.device is nvme, which needs an extension of DeepSpeed's that is not built "
                "where training runs on the CPU; choose cpu"
            )


def leave_distributed() -> None:
    """Ends the process group, at the end of a process that a launcher started."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A model and its optimizer under DeepSpeed.

    Gradients are sums: neither the number of micro-batches nor the number of ranks divides them.

    Args:
        model: on the CPU, the same on every rank.
        optimizer: over its parameters.
        config: from `deepspeed_config`.
        place: from `init_distributed`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], place: Place
    ) -> None:
        deepspeed = load_deepspeed()
        check_device(config)
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports; warnings and errors do not pass here
            engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
        self.place = place
        self.deepspeed_engine = engine
        self.zero_stage: int = int(engine.zero_optimization_stage())
        self._scales = "fp16" in config
        if self._scales:
            self.optimizer.loss_scaler.raise_error_at_min_scale = False  # `skipped` tells
        self.skipped = False
        """Whether the last step left the weights alone since its gradients overflowed, and the next may do better."""
        self._num_ranks = float(place.world_size)
        if self.zero_stage == 0 and place.world_size == 1:
            engine.enable_backward_allreduce = False  # it would copy all gradients to a flat buffer and back

    @property
    def model(self) -> nn.Module:
        """What to call in training: DeepSpeed's module, which forwards attributes to the plain one."""
        return self.deepspeed_engine

    @property
    def module(self) -> nn.Module:
        """The plain model, on the device and in the precision of training."""
        return self.deepspeed_engine.module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the sum; DeepSpeed averages over ranks, so the loss is raised first."""
        self.deepspeed_engine.backward(loss * self._num_ranks, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """To be called after every `backward`; the last of a step changes the weights."""
        scale = self.loss_scale
        self.deepspeed_engine.step()
        if scale is not None:
            self.skipped = bool(self.optimizer.overflow) and scale > self.optimizer.loss_scaler.min_scale

    def clip_gradients(self, max_norm: float) -> Tensor | None:
        """Norm of the gradient before clipping; None at ZeRO stages 1 to 3, which find it within the step."""
        if self.zero_stage:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), max_norm, norm)
        return norm

    def step_norm(self) -> float:
        """Norm that the ZeRO stages found within the step. They leave the weights alone where it is not finite."""
        return float(self.deepspeed_engine.get_global_grad_norm())

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by before `backward`; None where the precision needs no scale."""
        return float(self.optimizer.loss_scaler.cur_scale) if self._scales else None

    @property
    def skipped_steps(self) -> int:
        """Steps that left the weights alone since gradients overflowed under the loss scale of `float16`."""
        return int(self.deepspeed_engine.skipped_steps)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights in full on every rank, also where ZeRO stage 3 keeps a part on each."""
        if self.zero_stage < 3:
            yield
            return
        with load_deepspeed().zero.GatheredParameters(list(self.module.parameters())):
            yield

    def close(self) -> None:
        self.deepspeed_engine.destroy()
