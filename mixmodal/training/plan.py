"""Plans a training: the memory that each GPU needs, before anybody rents one.

Weights, gradients and optimizer states follow from the numbers of parameters and what DeepSpeed keeps of each
(`states.py`). What forward and backward add is found by computing one micro-batch on tensors without data
(`torch._subclasses.fake_tensor`), by the task's own losses: a storage counts from the operator that makes it until
nobody holds it, so that the temporaries of backward, and weights cast by autocast, are in it. Each row of the table
is what stands at the peak; gradients that come into being during backward take the place of activations.

Not counted: what kernels take inside (workspaces of cuDNN and cuBLAS, buffers of NCCL), what the allocator loses to
fragments, evaluation, and checkpoints being written. `fitting.CUDA_CONTEXT` is an assumption: a process has 0.5 to
1 GB of context and libraries on the device. Attention is that of the CPU, which keeps what the fused ones of CUDA do,
under the mask `(B, 1, T, T)` that `attention` makes on CUDA: none with `documents` and `flex`, as long as a row is one
document.

Measured: on a CPU, trainings of 0.6 to 0.8 GB made the resident set grow by 0.93 to 1.02 times the plan, at every ZeRO
stage on one process (`tests/training/test_plan.py`). Nobody has compared a plan with a GPU yet.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from mixmodal.config import UsageError, parse
from mixmodal.files import write_whole
from mixmodal.training.budget import Budget, build_budget, describe
from mixmodal.training.deepspeed_config import read_zero_file
from mixmodal.training.finetune import FinetuneConfig
from mixmodal.training.fitting import Stages, find_change
from mixmodal.training.image_tokenizer import ImageTokenizerTrainingConfig
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.training.rehearsal import TrainingConfig, largest_size
from mixmodal.training.states import trained
from mixmodal.training.task import MODEL

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predicts the memory of a training on each GPU, without data, weights or a GPU.

    `--config FILE` is the config of the training, that of train-image-tokenizer, pretrain or finetune, and options
    with a dot change its keys: `--trainer.micro_batch_size 8`. So do `--deepspeed FILE` and `--init_from DIR`.

    Args:
        training: what `--config` gives.
        overrides: what the options with a dot give.
        gpus: processes, each with a GPU of its own.
        gpu_memory: of one GPU, with its unit: MB, GB, TB are powers of 1000, and MiB, GiB, TiB of 1024.
        device: what it will train on; `cpu` casts and reserves as the CPU does.
        mfu: share of `trainer.peak_flops` that a GPU reaches, 0 .. 1: with it tokens and time are told, too.
        gpu_hours: to spend, all GPUs together: with it and `mfu`, the steps that they are enough for.
        out: JSON file for the figures, bytes; nothing is written by default.
    """

    training: Path
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    gpu_memory: str = "80GB"
    device: Literal["cuda", "cpu"] = "cuda"
    mfu: float | None = None
    gpu_hours: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus is {self.gpus}; it must be at least 1")
        parse_bytes(self.gpu_memory, "gpu_memory")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it must lie above 0 and up to 1")
        if self.gpu_hours is not None and (self.gpu_hours <= 0 or self.mfu is None):
            raise ValueError(f"gpu_hours is {self.gpu_hours}; it must be above 0, and needs mfu")

    @staticmethod
    def read_arguments(argv: Sequence[str]) -> list[str]:
        """Puts `--config FILE` and options with a dot aside: they belong to the training.

        Raises:
            ValueError: without `--config FILE`.
        """
        rest, overrides, waiting = [], [], list(argv)
        training = None
        while waiting:
            argument = waiting.pop(0)
            name, has_value, value = argument.partition("=")
            ours = name.replace("-", "_") not in ("__config", "__deepspeed", "__init_from")
            if ours and not (name.startswith("--") and "." in name):
                rest.append(argument)
                continue
            if not has_value and waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
            if name == "--config":
                training = value
            else:
                overrides.append(f"{name}={value}")
        if training:
            return [*rest, f"--training={training}", f"--overrides={json.dumps(overrides)}"]
        if not {"--help", "-h", "--training", "--print_config"} & {entry.partition("=")[0] for entry in rest}:
            raise ValueError("give the training's config: --config FILE.yaml")
        return rest


class Plan(NamedTuple):
    """Bytes on one GPU at the peak of a training step, by what they are for.

    Args:
        parameters: of the trained model.
        zero_stage: of DeepSpeed.
        micro_batch_size: of the config.
        rows: bytes by name; their sum is `total_bytes`.
        total_bytes: at the peak.
        saved_bytes: what autograd keeps for backward at most; the row `activations` has the temporaries, too.
        gpu_memory_bytes: of a GPU.
        fits: whether the total does.
        largest_micro_batch_size: that fits, 0 for none; image tokenizers only.
        stages: the same rows at every ZeRO stage that this training can use, with `total`, and with `host`, what each
            process keeps in the host's memory.
        change: the smallest change of the config that makes it fit; None where it does, or where none is known.
        budget: tokens and time, where `mfu` is given.
    """

    parameters: int
    zero_stage: int
    micro_batch_size: int
    rows: dict[str, int]
    total_bytes: int
    saved_bytes: int
    gpu_memory_bytes: int
    fits: bool
    largest_micro_batch_size: int | None
    stages: dict[int, dict[str, int]]
    change: str | None
    budget: Budget | None


def plan(config: PlanConfig) -> Plan:
    """Prints the table, and writes `out`.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    training = load_training(config.training, config.overrides)
    training = replace(training, trainer=training.trainer.shared(config.gpus))
    found = build_plan(training, config)
    _print(found, training, config)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {"config": str(config.training), "gpus": config.gpus, "device": config.device, **found._asdict()}
        figures["budget"] = found.budget and found.budget._asdict()
        write_whole(config.out, json.dumps(figures, indent=2).encode() + b"\n")
    return found


def parse_bytes(text: str, key: str) -> int:
    """Bytes of a size such as `80GB`.

    Raises:
        ValueError: naming the key.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]+)", text.strip())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f"{key} is {text!r}; give a number above 0 and one of {', '.join(UNITS)}, such as 80GB")
    return int(float(found[1]) * UNITS[found[2]])


def load_training(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The config of a training; its keys tell of which command.

    Those of pretrain and finetune are the same and take the same memory; with `init_from` the defaults are those of
    finetune, unless only those of pretrain fit the keys that are given.

    Raises:
        UsageError: naming the file, for one that is neither, or the key that is wrong.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML") from error
    given = data if isinstance(data, dict) and "trainer" in data else {}
    kinds = {
        ImageTokenizerTrainingConfig: isinstance(given.get("tokenizer"), dict),
        PretrainConfig: isinstance(given.get("model"), dict) or "init_from" in given,
    }
    found = [kind for kind, fits in kinds.items() if fits]
    if len(found) != 1:
        raise UsageError(
            f"--config {path}: no training to plan; it must have the key `trainer` and either `tokenizer` "
            "(train-image-tokenizer) or `model` (pretrain), each with keys below it, or `init_from` (pretrain and "
            "finetune)"
        )
    arguments = ["--config", str(path), *overrides]
    if "adapter" in given:
        return parse(FinetuneConfig, arguments)
    if "init_from" in given:
        with contextlib.suppress(UsageError):  # which parsing it as a pretraining words no worse
            return parse(FinetuneConfig, arguments)
    return parse(found[0], arguments)


def build_plan(training: TrainingConfig, config: PlanConfig) -> Plan:
    """The plan of a training config, whose batch is shared (`TrainerConfig.shared`).

    Raises:
        ValueError: where the pieces of the training can not be built.
    """
    trainer = training.trainer
    zero = read_zero_file(trainer.deepspeed, trainer.precision)["zero_optimization"]
    stage, size = zero.get("stage", 0), trainer.micro_batch_size
    limit = parse_bytes(config.gpu_memory, "gpu_memory")
    stages = Stages(training, config.gpus, config.device)
    table = stages.table(zero)
    memory = table[stage]
    rehearsal = stages.rehearsal(stage)
    num_trained = sum(parameter.numel() for parameter in trained(rehearsal.networks[MODEL]))
    largest = None
    if isinstance(training, ImageTokenizerTrainingConfig):
        room = limit - memory.standing
        peaks = {size: memory.passes.peak}
        fits = memory.flat <= room
        largest = largest_size(lambda size: rehearsal.passes(size).peak, peaks, room + memory.coming) if fits else 0
    change = None if memory.total <= limit else find_change(stages, zero, table, limit)
    budget = None
    if config.mfu:
        if isinstance(training, ImageTokenizerTrainingConfig):
            raise ValueError("mfu: operations are known of pretraining only; leave it out")
        budget = build_budget(training, rehearsal.task.flops_per_token(), config.gpus, config.mfu, config.gpu_hours)
    return Plan(
        num_trained,
        stage,
        size,
        memory.rows,
        memory.total,
        memory.passes.saved,
        limit,
        memory.total <= limit,
        largest,
        {stage: {**found.rows, "total": found.total, "host": found.host} for stage, found in table.items()},
        change,
        budget,
    )


def _print(found: Plan, training: TrainingConfig, config: PlanConfig) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    plain = not console.is_terminal
    gpus = f"{config.gpus} GPU{'s' * (config.gpus > 1)}"
    heading = f"{found.parameters:,} parameters, micro_batch_size {found.micro_batch_size}, "
    heading += f"ZeRO stage {found.zero_stage}, {gpus}"
    console.print(f"{config.training}: {heading}", soft_wrap=plain, markup=False)
    table = Table(box=None if plain else box.ROUNDED)
    table.add_column("GB on each GPU, at the peak")
    for stage in found.stages:
        table.add_column(f"ZeRO {stage}{' (config)' * (stage == found.zero_stage)}", justify="right")
    names = [name for name in found.rows if any(rows[name] for rows in found.stages.values())]
    for name in [*names, "total", *(["host"] if any(rows["host"] for rows in found.stages.values()) else [])]:
        shown = {"host": "on the host, each process"}.get(name, name)
        if name == "total":
            table.add_section()
        table.add_row(shown, *(f"{rows[name] / 1e9:,.2f}" for rows in found.stages.values()))
    limit = found.gpu_memory_bytes
    table.add_row(f"fits {config.gpu_memory}", *("yes" if r["total"] <= limit else "no" for r in found.stages.values()))
    console.print(table)
    verdict = f"{'fits' if found.fits else 'does not fit'} a GPU of {config.gpu_memory}"
    if not found.fits:
        unknown = "; no change known here makes it fit on so many GPUs"
        verdict += f"; it does with {found.change}" if found.change else unknown
    console.print(verdict, soft_wrap=plain, markup=False)
    if found.largest_micro_batch_size is not None:
        console.print(f"largest micro_batch_size that fits: {found.largest_micro_batch_size}", soft_wrap=plain)
    if found.budget and isinstance(training, PretrainConfig):
        for line in describe(found.budget, training, config.gpus, config.gpu_hours):
            console.print(line, soft_wrap=plain, markup=False)
