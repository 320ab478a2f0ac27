"""How to train: the part of a training config that every task shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["float32", "bfloat16", "autocast_bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train.

    Args:
        run_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, export/.
        max_steps: optimizer steps.
        micro_batch_size: rows that a rank computes at a time.
        grad_accum_steps: micro-batches of a rank in an optimizer step.
        precision: `float32`; `autocast_bfloat16`: float32 weights, bfloat16 in the model's matrix products;
            `bfloat16`: bfloat16 weights with float32 master weights and gradient sums (ZeRO stage 1 to 3).
        deepspeed: JSON file with DeepSpeed's ZeRO sections; none is stage 0, or 1 where the precision is `bfloat16`.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: number of checkpoints to keep, the newest ones.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of weights, data order and dropout.
        resume: go on from `checkpoints/latest` where there is one.
        ema_decay: decay per step of averaged weights, which are then evaluated and exported; 0 keeps none.
        compile: let torch.compile make one program of the model's blocks; losses stay the same to rounding. It takes
            minutes at the start, and on the CPU, where it hardly pays, a C++ compiler. Not with ZeRO stage 3.
        tensorboard: write TensorBoard files beside metrics.jsonl.
        peak_flops: floating-point operations per second of one device, for the MFU; none leaves the MFU out.
    """

    run_dir: Path
    max_steps: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    precision: Precision = "float32"
    deepspeed: Path | None = None
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    max_grad_norm: float = 1.0
    seed: int = 0
    resume: bool = True
    ema_decay: float = 0.0
    compile: bool = False
    tensorboard: bool = True
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_steps", "micro_batch_size", "grad_accum_steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                problems.append(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "save_every", "max_grad_norm", "seed"):
            if getattr(self, name) < 0:
                problems.append(f"trainer.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"trainer.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        if self.peak_flops is not None and self.peak_flops <= 0:
            problems.append(f"trainer.peak_flops is {self.peak_flops}; it must be above 0")
        if problems:
            raise ValueError("; ".join(problems))
