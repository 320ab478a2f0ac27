"""One model under DeepSpeed: the only import of deepspeed, made where it is used."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmodal.training.config import Precision

if TYPE_CHECKING:
    from types import ModuleType

OWNED_KEYS = {
    "train_batch_size": "trainer.micro_batch_size and trainer.grad_accum_steps",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.grad_accum_steps",
    "gradient_clipping": "trainer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "data_types": "trainer.precision",
    "prescale_gradients": "nothing: gradients are sums over the global weight",
    "gradient_predivide_factor": "nothing: gradients are sums over the global weight",
    "gradient_allreduce_op": "nothing: gradients are sums over the global weight",
    "steps_per_print": "trainer.log_every",
    "tensorboard": "trainer.tensorboard",
}
"""DeepSpeed keys that follow from our config, and the option that sets each."""


class Place(NamedTuple):
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    device: torch.device


def read_zero_file(path: Path | None, precision: Precision) -> dict[str, Any]:
    """The sections of a DeepSpeed JSON file that are the user's to choose; without a file, the lowest stage that works.

    The value "auto" is left to us, or to DeepSpeed's default.

    Raises:
        ValueError: naming the file and the key that another option sets, or a stage that the precision does not allow.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1 if precision == "bfloat16" else 0}}
    try:
        sections = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"trainer.deepspeed: {path} can not be read as JSON: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"trainer.deepspeed: {path} must hold one JSON object")
    for key, option in OWNED_KEYS.items():
        if sections.get(key, "auto") != "auto":
            raise ValueError(f"{path}: key {key!r} is set by {option}; remove it from the DeepSpeed file")
    sections = {key: value for key, value in sections.items() if value != "auto"}
    zero = sections.setdefault("zero_optimization", {"stage": 0})
    sections["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    if precision == "bfloat16" and sections["zero_optimization"].get("stage", 0) == 0:
        raise ValueError(
            f"{path}: zero_optimization.stage is 0, which would sum gradients in bfloat16; choose stage 1, 2 or 3 "
            "(they keep float32 master weights) or trainer.precision autocast_bfloat16"
        )
    return sections


def deepspeed_config(
    *,
    micro_batch_size: int,
    grad_accum_steps: int,
    max_grad_norm: float,
    precision: Precision,
    zero_file: Path | None,
) -> dict[str, Any]:
    """The whole DeepSpeed dictionary, derived from the training config and one ZeRO file."""
    sections = read_zero_file(zero_file, precision)
    stage = sections["zero_optimization"].get("stage", 0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": max_grad_norm if stage else 0.0,  # at stage 0 `Engine.clip_gradients` does it
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves on the CPU, too, and needs no compiler
        **sections,
    }
    if precision == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "autocast_bfloat16":
        # no module is listed as safe to reduce in bfloat16, so that gradients are summed over ranks in float32
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def load_deepspeed() -> ModuleType:
    """Imports deepspeed, quiet and without its compiled extensions.

    Raises:
        ValueError: where it is not installed.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would find that out by itself, with a warning
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"training needs deepspeed: pip install 'mixmodal[train]' ({error})") from error
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
    """
    deepspeed = load_deepspeed()
    backend = deepspeed.get_accelerator().communication_backend_name()
    if not dist.is_initialized() and "RANK" not in os.environ:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    elif not dist.is_initialized():
        atexit.register(leave_distributed)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it even in a world of one
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.device_name(), int(os.environ["LOCAL_RANK"]))
        accelerator.set_device(device.index)
    return Place(dist.get_rank(), dist.get_world_size(), device)


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
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports; warnings and errors do not pass here
            engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
        self.place = place
        self.deepspeed_engine = engine
        self.zero_stage: int = int(engine.zero_optimization_stage())
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
        self.deepspeed_engine.step()

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
