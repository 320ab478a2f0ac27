"""Plans a training: the memory that each GPU needs, before anybody rents one.

Weights, gradients and optimizer states follow from the numbers of parameters and what DeepSpeed keeps of each
(`states.py`). What forward and backward add is found by computing one micro-batch on tensors without data
(`torch._subclasses.fake_tensor`), by the task's own losses: a storage counts from the operator that makes it until
nobody holds it, so that the temporaries of backward, and weights cast by autocast, are in it. Each row of the table
is what stands at the peak; gradients that come into being during backward take the place of activations.

Not counted: what kernels take inside (workspaces of cuDNN and cuBLAS, buffers of NCCL), what the allocator loses to
fragments, evaluation, and checkpoints being written. `CUDA_CONTEXT` is an assumption: a process has 0.5 to 1 GB of
context and libraries on the device. Attention is that of the CPU, which keeps what the fused ones of CUDA do.

Measured: on a CPU, trainings of 0.6 to 0.8 GB made the resident set grow by 0.93 to 1.02 times the plan, at every ZeRO
stage on one process (`tests/training/test_plan.py`). Nobody has compared a plan with a GPU yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mixmodal.config import UsageError, parse
from mixmodal.files import write_whole
from mixmodal.training.deepspeed_config import read_zero_file
from mixmodal.training.image_tokenizer import ImageTokenizerTrainingConfig
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.training.rehearsal import Rehearsal, TrainingConfig, largest_size
from mixmodal.training.states import module_bytes, state_bytes, trained
from mixmodal.training.task import MODEL

CUDA_CONTEXT = 10**9
"""Bytes that a process takes on the device before it has a tensor there: an assumption, not a measurement."""
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed copies side by side to sum them over ranks at ZeRO stage 0."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predicts the memory of a training on each GPU, without data, weights or a GPU.

    `--config FILE` is the config of the training, that of train-image-tokenizer or pretrain, and options with a dot
    change its keys: `--trainer.micro_batch_size 8`. So does `--deepspeed FILE`.

    Args:
        training: what `--config` gives.
        overrides: what the options with a dot give.
        gpus: processes, each with a GPU of its own.
        gpu_memory: of one GPU, with its unit: MB, GB, TB are powers of 1000, and MiB, GiB, TiB of 1024.
        device: what it will train on; `cpu` casts and reserves as the CPU does.
        out: JSON file for the figures, bytes; nothing is written by default.
    """

    training: Path
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    gpu_memory: str = "80GB"
    device: Literal["cuda", "cpu"] = "cuda"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus is {self.gpus}; it must be at least 1")
        parse_bytes(self.gpu_memory, "gpu_memory")

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
            if name not in ("--config", "--deepspeed") and not (name.startswith("--") and "." in name):
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


def plan(config: PlanConfig) -> Plan:
    """Prints the table, and writes `out`.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    found = build_plan(load_training(config.training, config.overrides), config)
    _print(found, config)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {"config": str(config.training), "gpus": config.gpus, "device": config.device, **found._asdict()}
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
    kinds = {"tokenizer": ImageTokenizerTrainingConfig, "model": PretrainConfig}
    keys = [key for key in kinds if isinstance(data, dict) and "trainer" in data and isinstance(data.get(key), dict)]
    if len(keys) != 1:
        raise UsageError(
            f"--config {path}: no training to plan; it must have the key `trainer` and either `tokenizer` "
            "(train-image-tokenizer) or `model` (pretrain), each with keys below it"
        )
    return parse(kinds[keys[0]], ["--config", str(path), *overrides])


def build_plan(training: TrainingConfig, config: PlanConfig) -> Plan:
    """The plan of a training config.

    Raises:
        ValueError: where the pieces of the training can not be built.
    """
    trainer = training.trainer
    zero = read_zero_file(trainer.deepspeed, trainer.precision)["zero_optimization"]
    stage, size = zero.get("stage", 0), trainer.micro_batch_size
    half = trainer.precision == "bfloat16"
    # a parameter's own gradient stands from backward to step, unless ZeRO takes it into a sum at once (counted below)
    keeps = trainer.grad_accum_steps > 1 or stage > (1 if half else 0)
    rehearsal = Rehearsal(training, casts_as_on_cuda=config.device == "cuda", keeps_gradients=keeps)
    networks = rehearsal.networks
    states = {name: state_bytes(network, trainer.precision, zero, config.gpus) for name, network in networks.items()}
    num_trained = sum(parameter.numel() for parameter in trained(networks[MODEL]))
    model = states[MODEL]
    others = [state for name, state in states.items() if name != MODEL]
    rows = {
        "weights": model.weights,
        "gradients": model.gradients,
        "optimizer": model.optimizer,
        "averaged weights": 4 * num_trained if trainer.ema_decay else 0,
        "other networks": sum(sum(state[:3]) for state in others) + sum(map(module_bytes, rehearsal.frozen)),
        "communication": sum(state.communication for state in states.values()),
        "CUDA context (assumed)": CUDA_CONTEXT if config.device == "cuda" else 0,
    }
    standing = sum(rows.values())
    counts = [sum(parameter.numel() for parameter in trained(network)) for network in networks.values()]
    coming = 0 if keeps else (2 if half else 4) * sum(counts)  # counted above, though not there before backward
    # gradients side by side to be summed over ranks; DeepSpeed rounds bfloat16's float32 sums to a further copy
    flat = min(max(counts), ALL_REDUCE_ELEMENTS) * (6 if half and stage == 1 else 4 * (stage == 0 and config.gpus > 1))
    passes = rehearsal.passes(size)
    rows["activations"] = max(0, flat, passes.peak - coming)
    limit, total = parse_bytes(config.gpu_memory, "gpu_memory"), standing + rows["activations"]
    largest = None
    if isinstance(training, ImageTokenizerTrainingConfig):
        room = limit - standing
        peaks = {size: passes.peak}
        largest = largest_size(lambda size: rehearsal.passes(size).peak, peaks, room + coming) if flat <= room else 0
    return Plan(num_trained, stage, size, rows, total, passes.saved, limit, total <= limit, largest)


def _print(found: Plan, config: PlanConfig) -> None:
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
    table.add_column("on each GPU, at the peak")
    table.add_column("GB", justify="right")
    for name, size in found.rows.items():
        if size:
            table.add_row(name, f"{size / 1e9:,.2f}")
    table.add_section()
    table.add_row("total", f"{found.total_bytes / 1e9:,.2f}")
    console.print(table)
    console.print(f"{'fits' if found.fits else 'does not fit'} a GPU of {config.gpu_memory}", soft_wrap=plain)
    if found.largest_micro_batch_size is not None:
        console.print(f"largest micro_batch_size that fits: {found.largest_micro_batch_size}", soft_wrap=plain)
