"""Tokens and time of a training, from the operations of a token and the share of the peak that a device reaches."""

from __future__ import annotations

from typing import NamedTuple

from mixmodal.training.pretrain import PretrainConfig


class Budget(NamedTuple):
    """What a training costs.

    Args:
        tokens_per_step: of all processes.
        tokens: of all steps.
        flops_per_token: model operations, forward and backward, without what activation checkpointing repeats. Without
            data, documents are not known: rows are taken to be full and of one document, which is the most that they
            can need.
        tokens_per_second: of one device.
        hours: on the clock, without evaluation and saving.
        gpu_hours: of all devices.
        affordable_steps: that the GPU-hours asked for are enough for; None where none were.
    """

    tokens_per_step: int
    tokens: int
    flops_per_token: float
    tokens_per_second: float
    hours: float
    gpu_hours: float
    affordable_steps: int | None


def build_budget(
    training: PretrainConfig, flops_per_token: float, gpus: int, mfu: float, gpu_hours: float | None
) -> Budget:
    """`tokens x operations of a token / (peak_flops x mfu)` seconds of one device.

    Args:
        training: `trainer.peak_flops` must be set.
        flops_per_token: `Task.flops_per_token`.
        gpus: devices.
        mfu: share of the peak.
        gpu_hours: to spend.

    Raises:
        ValueError: where the peak is not known.
    """
    trainer = training.trainer
    if trainer.peak_flops is None:
        raise ValueError("mfu needs the peak of a device: give --trainer.peak_flops, such as 9.89e14 for an H100")
    per_step = gpus * trainer.micro_batch_size * trainer.grad_accum_steps * training.data.seq_len
    rate = trainer.peak_flops * mfu / flops_per_token
    seconds_per_step = per_step / gpus / rate
    affordable = None if gpu_hours is None else int(gpu_hours * 3600 / gpus / seconds_per_step)
    hours = trainer.max_steps * seconds_per_step / 3600
    return Budget(per_step, per_step * trainer.max_steps, flops_per_token, rate, hours, hours * gpus, affordable)


def describe(budget: Budget, training: PretrainConfig, gpus: int, gpu_hours: float | None) -> list[str]:
    """Lines with the arithmetic."""
    trainer = training.trainer
    step = f"{gpus} x {trainer.micro_batch_size} rows x {trainer.grad_accum_steps} x {training.data.seq_len}"
    lines = [
        f"a step: {step} = {budget.tokens_per_step:,} tokens; {trainer.max_steps:,} steps: {budget.tokens:.3g} tokens",
        f"{budget.flops_per_token:.3g} operations a token, {budget.tokens_per_second:,.0f} tokens/s of a GPU: "
        f"{budget.hours:,.1f} hours = {budget.hours / 24:,.1f} days, {budget.gpu_hours:,.0f} GPU-hours",
    ]
    if budget.affordable_steps is not None:
        tokens = budget.affordable_steps * budget.tokens_per_step
        lines.append(f"{gpu_hours:,g} GPU-hours: {budget.affordable_steps:,} steps, {tokens:.3g} tokens")
    return lines
