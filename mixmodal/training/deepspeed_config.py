"""The DeepSpeed dictionary: derived from the training config and one file of ZeRO sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmodal.config import suggestion
from mixmodal.files import read_object
from mixmodal.training.config import HALF, Precision, TrainerConfig

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
    "activation_checkpointing": "trainer.activation_checkpointing",
    "checkpoint": "nothing: checkpoints are of our own format and are read at any stage",
}
"""DeepSpeed keys that follow from our config, and the option that sets each."""
FREE_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "aio",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "timers",
)
"""DeepSpeed keys that are the user's to choose."""


def read_zero_file(path: Path | None, precision: Precision) -> dict[str, Any]:
    """The sections of a DeepSpeed JSON file that are the user's to choose; without a file, the lowest stage that works.

    The value "auto" is left to us, or to DeepSpeed's default.

    Raises:
        ValueError: naming the file and the key that another option sets, that the precision does not allow, or that can
            not act.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1 if precision in HALF else 0}}
    try:
        found = read_object(path)
    except OSError as error:
        raise ValueError(f"trainer.deepspeed: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"trainer.deepspeed: {error}") from error
    sections = {key: value for key, value in found.items() if value != "auto"}
    problems = [f"{key!r} is set by {OWNED_KEYS[key]}" for key in sections if key in OWNED_KEYS]
    problems += [
        f"{key!r} is no key that acts here{suggestion(key, dict.fromkeys(FREE_KEYS))}"
        for key in sections
        if key not in OWNED_KEYS and key not in FREE_KEYS
    ]
    if problems:
        raise ValueError(f"{path}: remove from the DeepSpeed file: {'; '.join(problems)}")
    zero = sections.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        raise ValueError(f'{path}: zero_optimization is {zero!r}; it must be a JSON object, such as {{"stage": 2}}')
    sections["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    check_zero(sections["zero_optimization"], precision, f"{path}: zero_optimization")
    return sections


def refuse_stage_3(trainer: TrainerConfig, what: str) -> None:
    """Refuses ZeRO stage 3 for what does not train there.

    Raises:
        ValueError: naming the file.
    """
    if read_zero_file(trainer.deepspeed, trainer.precision)["zero_optimization"].get("stage") == 3:
        raise ValueError(f"trainer.deepspeed {trainer.deepspeed}: {what} train at ZeRO stages 0, 1 and 2, not at 3")


def check_zero(zero: Mapping[str, Any], precision: Precision, key: str) -> None:
    """Refuses what DeepSpeed 0.19 would ignore, or would not survive.

    Raises:
        ValueError: naming file and key.
    """
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{key}.stage is {stage!r}; it must be 0, 1, 2 or 3")
    if precision in HALF and stage == 0:
        raise ValueError(
            f"{key}.stage is 0, which would sum gradients in {precision}; choose stage 1, 2 or 3 "
            "(they keep float32 master weights) or trainer.precision autocast_bfloat16"
        )
    if "mics_shard_size" in zero:
        raise ValueError(f"{key}.mics_shard_size keeps each weight several times, which no checkpoint can be made of")
    devices = {}
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if not isinstance(zero.get(name) or {}, Mapping):
            raise ValueError(f'{key}.{name} is {zero[name]!r}; it must be a JSON object, such as {{"device": "cpu"}}')
        devices[name] = (zero.get(name) or {}).get("device", "none")
        if devices[name] != "none" and stage not in stages:
            raise ValueError(f"{key}.{name} can not act at stage {stage}, only at {' and '.join(map(str, stages))}")
    if precision == "float16" and devices["offload_optimizer"] != "none" and stage != 3:
        raise ValueError(
            f"{key}.offload_optimizer: with float16 DeepSpeed keeps gradients that have overflowed at stage {stage}, "
            "and every step after them is skipped; choose stage 3 or trainer.precision bfloat16"
        )
    offload = zero.get("offload_optimizer") or {}
    if offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload") or zero.get("zenflow"):
        raise ValueError(
            f"{key}: offload_optimizer.ratio, offload_optimizer.super_offload and zenflow need DeepSpeed's own Adam, "
            "but training uses torch's AdamW; leave them out"
        )


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
    if precision in HALF:
        kind = {"bfloat16": "bf16", "float16": "fp16"}[precision]
        config[kind] = {"enabled": True, **({"check_grad_overflow": True} if kind == "bf16" else {})}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config.setdefault("communication_data_type", "fp32")  # or DeepSpeed rounds the sums to 16 bits to add them up
    elif precision == "autocast_bfloat16":
        # no module is listed as safe to reduce in bfloat16, so that gradients are summed over ranks in float32
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
