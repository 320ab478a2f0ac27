"""What makes a training fit its GPUs: plans at every ZeRO stage, and changes of the config, the smallest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mixmodal.training.config import HALF
from mixmodal.training.image_tokenizer import ImageTokenizerTrainingConfig
from mixmodal.training.rehearsal import Passes, Rehearsal, TrainingConfig
from mixmodal.training.states import module_bytes, state_bytes, trained
from mixmodal.training.task import MODEL

CUDA_CONTEXT = 10**9
"""Bytes that a process takes on the device before it has a tensor there: an assumption, not a measurement."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed copies side by side to sum them over ranks at ZeRO stage 0."""


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a step.

    Args:
        rows: by what they are for.
        standing: all but the activations.
        coming: gradients that stand in `rows`, but take the place of activations during backward.
        flat: what sums over ranks need at the least when activations are gone.
        host: bytes of one process that are offloaded to the host.
        passes: of forward and backward.
    """

    rows: dict[str, int]
    standing: int
    coming: int
    flat: int
    host: int
    passes: Passes

    @property
    def total(self) -> int:
        return sum(self.rows.values())


class Stages:
    """Plans of one training at any ZeRO stage; a step is rehearsed once, or twice where stages differ in what stands.

    Args:
        training: of which command.
        gpus: processes.
        device: `cuda` or `cpu`.
    """

    def __init__(self, training: TrainingConfig, gpus: int, device: str) -> None:
        self.training, self.gpus, self.device = training, gpus, device
        self._rehearsals: dict[bool, Rehearsal] = {}

    def rehearsal(self, stage: int) -> Rehearsal:
        """With gradients that stand during forward, or without, as the stage has it."""
        # a parameter's own gradient stands from backward to step, unless ZeRO takes it into a sum at once
        keeps = self.training.trainer.grad_accum_steps > 1 or stage > (1 if self._half == "bfloat16" else 0)
        if keeps not in self._rehearsals:
            on_cuda = self.device == "cuda"
            self._rehearsals[keeps] = Rehearsal(self.training, as_on_cuda=on_cuda, keeps_gradients=keeps)
        return self._rehearsals[keeps]

    @property
    def _half(self) -> str | None:
        precision = self.training.trainer.precision
        return precision if precision in HALF else None

    def memory(self, zero: Mapping[str, Any], micro_batch_size: int) -> Memory:
        """The plan under a ZeRO section."""
        trainer, stage = self.training.trainer, zero.get("stage", 0)
        rehearsal = self.rehearsal(stage)
        networks = rehearsal.networks
        device = {**zero, "offload_optimizer": None, "offload_param": None} if self.device == "cpu" else zero
        states = {
            name: state_bytes(network, trainer.precision, device, self.gpus) for name, network in networks.items()
        }
        model = states[MODEL]
        others = [state for name, state in states.items() if name != MODEL]
        counts = [sum(parameter.numel() for parameter in trained(network)) for network in networks.values()]
        rows = {
            "weights": model.weights,
            "gradients": model.gradients,
            "optimizer": model.optimizer,
            "averaged weights": 4 * counts[0] if trainer.ema_decay else 0,
            "other networks": sum(sum(state[:3]) for state in others) + sum(map(module_bytes, rehearsal.frozen)),
            "communication": sum(state.communication for state in states.values()),
            "CUDA context (assumed)": CUDA_CONTEXT if self.device == "cuda" else 0,
        }
        standing = sum(rows.values())
        coming = 0 if rehearsal.keeps_gradients else (2 if self._half else 4) * sum(counts)
        side_by_side = 4 * ((self._half == "bfloat16" and stage == 1) or (stage == 0 and self.gpus > 1))
        flat = min(max(counts), ALL_REDUCE_ELEMENTS) * side_by_side
        passes = rehearsal.passes(micro_batch_size)
        rows["activations"] = max(0, flat, passes.peak - coming)
        return Memory(rows, standing, coming, flat, sum(state.host for state in states.values()), passes)

    def table(self, zero: Mapping[str, Any]) -> dict[int, Memory]:
        """Plans at all stages that this training can use, its own section first in force."""
        trainer = self.training.trainer
        own = zero.get("stage", 0)
        found = {}
        for stage in range(4):
            whole = trainer.ema_decay or len(self.rehearsal(own).networks) > 1  # these need whole weights
            if (stage == 0 and self._half) or (stage == 3 and whole):
                continue
            section = zero if stage == own else {**without_offload(zero), "stage": stage}
            found[stage] = self.memory(section, trainer.micro_batch_size)
        return found


def without_offload(zero: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in zero.items() if not key.startswith("offload_")}


def find_change(stages: Stages, zero: Mapping[str, Any], table: Mapping[int, Memory], limit: int) -> str | None:
    """The smallest change of the config that makes a step fit into `limit` bytes; None where none of those known does.

    First what only spreads states over the ranks, then what computes twice, then what computes less at a time, then
    the host's memory; what changes the outcome of training is not among them.
    """
    for change, memory in candidates(stages, zero, table):
        if memory.total <= limit:
            return change
    return None


def candidates(stages: Stages, zero: Mapping[str, Any], table: Mapping[int, Memory]) -> Iterator[tuple[str, Memory]]:
    training, own = stages.training, zero.get("stage", 0)
    trainer = training.trainer
    for stage in sorted(table):
        if stage > own:
            yield f"--deepspeed configs/deepspeed/zero{stage}.json", table[stage]
    highest = max(table)
    spread = zero if highest == own else {**without_offload(zero), "stage": highest}
    with_stage = "" if highest == own else f" --deepspeed configs/deepspeed/zero{highest}.json"
    again = stages
    twice = ""
    if not isinstance(training, ImageTokenizerTrainingConfig) and not trainer.activation_checkpointing:
        changed = replace(training, trainer=replace(trainer, activation_checkpointing=True))
        again = Stages(changed, stages.gpus, stages.device)
        twice = "--trainer.activation_checkpointing true"
        yield twice, again.memory(zero, trainer.micro_batch_size)
        yield twice + with_stage, again.memory(spread, trainer.micro_batch_size)
    size, accumulation = trainer.micro_batch_size, trainer.grad_accum_steps
    less = ""
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        less = f"--trainer.micro_batch_size {size} --trainer.grad_accum_steps {accumulation}"
        for section, words in ((zero, ""), (spread, with_stage))[: 2 if with_stage else 1]:
            yield less + words, stages.memory(section, size)
            if twice:
                yield f"{twice} {less}{words}", again.memory(section, size)
    if highest >= 2 and stages.device == "cuda":
        offload = {
            "offload_optimizer": {"device": "cpu"},
            **({"offload_param": {"device": "cpu"}} if highest == 3 else {}),
        }
        words = f"--deepspeed configs/deepspeed/zero{highest}_offload.json"
        yield words, stages.memory({**spread, **offload}, trainer.micro_batch_size)
        both = " ".join(part for part in (twice, less, words) if part)
        yield both, again.memory({**spread, **offload}, size)
