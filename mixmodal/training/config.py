"""How to train: the part of a training config that every task shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Precision = Literal["float32", "bfloat16", "autocast_bfloat16", "float16"]
HALF: tuple[Precision, ...] = ("bfloat16", "float16")
"""Those whose weights have 16 bits, beside float32 master weights."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train.

    Args:
        run_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, export/.
        max_steps: optimizer steps.
        micro_batch_size: rows that a rank computes at a time.
        grad_accum_steps: micro-batches of a rank in an optimizer step.
        global_batch_size: rows of an optimizer step over all ranks; where it is set, `grad_accum_steps` follows from it
            on any number of ranks, and a number that does not divide it is refused. 0: what the other two come to.
        precision: `float32`; `autocast_bfloat16`: float32 weights, bfloat16 in the model's matrix products;
            `bfloat16`: bfloat16 weights with float32 master weights and gradient sums (ZeRO stage 1 to 3);
            `float16`: the same with float16 and a loss scale that grows until gradients overflow. A step whose
            gradients overflow leaves the weights alone and is counted (`skipped_steps`).
        deepspeed: JSON file with DeepSpeed's ZeRO sections; none is stage 0, or 1 where weights have 16 bits.
        activation_checkpointing: keep the inputs of the model's blocks only, and compute the blocks again in backward:
            a third more time, and a fraction of the memory of activations.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        save_every: steps between checkpoints; 0 saves at the end only.
        alarm_growth: warn where a gradient, logit or output norm or the largest attention logit is more than so many
            times the median of all its logged values since the warm-up; 0 never warns. In sound runs the newest value
            is at most twice that median.
        keep_checkpoints: number of checkpoints to keep, the newest ones.
        keep_every: checkpoints whose step is a multiple of it are kept beside these; 0 keeps no others.
        async_save: go on training while a checkpoint is written, from a copy in the memory of the host: 12 bytes a
            parameter, spread over the ranks at ZeRO stages 1 to 3.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of weights, data order and dropout.
        resume: go on from `checkpoints/latest` where there is one.
        ema_decay: decay per step of averaged weights, which are then evaluated and exported; 0 keeps none.
        read_ahead: let a thread make the micro-batches of the next step while the model computes this one.
        compile: let torch.compile make one program of the model's blocks; losses stay the same to rounding. It takes
            minutes at the start, and on the CPU, where it hardly pays, a C++ compiler. Not with ZeRO stage 3.
        tensorboard: write TensorBoard files beside metrics.jsonl.
        peak_flops: floating-point operations per second of one device, for the MFU; none leaves the MFU out.
    """

    run_dir: Path
    max_steps: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    global_batch_size: int = 0
    precision: Precision = "float32"
    deepspeed: Path | None = None
    activation_checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    alarm_growth: float = 3.0
    keep_checkpoints: int = 2
    keep_every: int = 0
    async_save: bool = False
    max_grad_norm: float = 1.0
    seed: int = 0
    resume: bool = True
    ema_decay: float = 0.0
    read_ahead: bool = True
    compile: bool = False
    tensorboard: bool = True
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_steps", "micro_batch_size", "grad_accum_steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                problems.append(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("global_batch_size", "eval_every", "save_every", "keep_every", "max_grad_norm", "seed"):
            if getattr(self, name) < 0:
                problems.append(f"trainer.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("keep_every", "async_save"):
            if getattr(self, name) and not self.save_every:
                problems.append(f"trainer.{name} can not act without trainer.save_every")
        if self.alarm_growth and not self.alarm_growth > 1:
            problems.append(f"trainer.alarm_growth is {self.alarm_growth}; it must be above 1, or 0 for no alarms")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"trainer.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        if self.peak_flops is not None and self.peak_flops <= 0:
            problems.append(f"trainer.peak_flops is {self.peak_flops}; it must be above 0")
        if problems:
            raise ValueError("; ".join(problems))

    def shared(self, world_size: int) -> TrainerConfig:
        """The same training by so many ranks, with the `grad_accum_steps` that `global_batch_size` comes to.

        Raises:
            ValueError: where the ranks can not share the rows of a step evenly, or by other steps than those given.
        """
        if not self.global_batch_size:
            return self
        rows = world_size * self.micro_batch_size
        if self.global_batch_size % rows:
            raise ValueError(
                f"trainer.global_batch_size {self.global_batch_size} is no multiple of the {rows} rows that "
                f"{world_size} ranks of trainer.micro_batch_size {self.micro_batch_size} compute at a time"
            )
        steps = self.global_batch_size // rows
        if self.grad_accum_steps not in (1, steps):
            raise ValueError(
                f"trainer.grad_accum_steps is {self.grad_accum_steps}, but trainer.global_batch_size "
                f"{self.global_batch_size} comes to {steps} on {world_size} ranks; leave it out"
            )
        return replace(self, grad_accum_steps=steps)
