"""Metrics of a run: sums over micro-batches and ranks, one JSON line a logged step, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.extras import import_extra
from mixmodal.files import naming, write_whole
from mixmodal.objectives.loss import Sums

Record = dict[str, float | int | str | None]

METRICS_FILE = "metrics.jsonl"
SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu")


class Peak(NamedTuple):
    """A value of which the largest over micro-batches and ranks counts: a scalar, -inf where there is none."""

    value: Tensor


class MetricSums:
    """Totals and counts, and largest values, by name, kept on the device until `means` reads them.

    Every rank must add the same names; a metric without anything to count has the count 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): total and count
        self._peaks: dict[str, Tensor] = {}  # (1,)

    def add(self, metrics: Mapping[str, Sums | Peak]) -> None:
        for name, metric in metrics.items():
            device = metric[0].device
            values = torch.stack([torch.as_tensor(value, device=device).detach().double() for value in metric])
            if isinstance(metric, Peak):
                self._peaks[name] = torch.maximum(self._peaks.get(name, values), values)
            else:
                self._sums[name] = self._sums[name] + values if name in self._sums else values

    def means(self) -> dict[str, float | None]:
        """Total over count, or the largest value, of each metric over all ranks; None where there is none.

        A collective; what was kept is then forgotten.
        """
        sums, peaks = reduce(self._sums, dist.ReduceOp.SUM), reduce(self._peaks, dist.ReduceOp.MAX)
        self._sums, self._peaks = {}, {}
        means = {name: total / count if count else None for name, (total, count) in sums.items()}
        return means | {name: None if value == -math.inf else value for name, (value,) in peaks.items()}


def reduce(tensors: Mapping[str, Tensor], operation: Any) -> dict[str, list[float]]:
    """Tensors `(N,)` by name, reduced over all ranks in the order of their names: one wait for the device."""
    if not tensors:
        return {}
    names = sorted(tensors)
    table = torch.stack([tensors[name] for name in names])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(table, operation)
    return dict(zip(names, table.tolist(), strict=True))


class MetricsLog:
    """Writes records of rank 0; on other ranks it does nothing.

    Args:
        run_dir: where `metrics.jsonl` and `tensorboard/` stand.
        first_step: steps done already; later lines, left by a run that was killed, are dropped.
        max_steps: for the progress bar.
        tensorboard: whether to write TensorBoard files, too.
        active: whether this is rank 0.
        finished: whether no step follows: the last evaluation is then made again, and its line is dropped, too.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        max_steps: int,
        tensorboard: bool,
        active: bool,
        finished: bool = False,
    ) -> None:
        self._active = active
        self._writer: Any = None
        self._progress: Any = None
        self._max_steps = max_steps
        if not active:
            return
        self._path = run_dir / METRICS_FILE
        drop_later(self._path, first_step, finished)
        self._file = self._path.open("a", encoding="utf-8")
        if tensorboard:
            self._writer = build_writer(run_dir / "tensorboard", first_step)
        if sys.stdout.isatty():
            self._progress, self._bar = build_progress(first_step, max_steps)

    def write(self, record: Record) -> None:
        """One line; `step` is the number of steps done."""
        if not self._active:
            return
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        step = int(record["step"] or 0)
        for name, value in record.items():
            if self._writer and name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        self._show(step, record)

    def write_picture(self, name: str, picture: Picture, step: int) -> None:
        """A picture for TensorBoard."""
        if self._writer:
            pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def say(self, message: str) -> None:
        """A line for the person who waits."""
        if self._progress:
            self._progress.console.print(message)
        elif self._active:
            print(message, flush=True)

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._bar, completed=step)

    def _show(self, step: int, record: Record) -> None:
        names = [name for name in record if name in SHOWN or name.startswith("eval_")]
        text = "  ".join(f"{name} {record[name]:.4g}" for name in names if record[name] is not None)
        if self._progress:
            self._progress.update(self._bar, completed=step, description=text)
        else:
            print(f"step {step}/{self._max_steps}  {text}", flush=True)

    def close(self) -> None:
        if not self._active:
            return
        with naming(self._path):
            self._file.close()
        if self._writer:
            self._writer.close()
        if self._progress:
            self._progress.stop()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def drop_later(path: Path, step: int, finished: bool = False) -> None:
    """Removes what is written again, lines of steps after `step`, and what is no line of metrics, as one cut short.

    Where the run is finished, that is its last evaluation, too.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if is_until(line, step, finished)]
    write_whole(path, "".join(f"{line}\n" for line in kept).encode())


def is_until(line: str, step: int, finished: bool) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    is_last_evaluation = finished and record["step"] == step and any(name.startswith("eval_") for name in record)
    return record["step"] <= step and not is_last_evaluation


def build_writer(folder: Path, first_step: int) -> Any:
    import_extra("tensorboard", "train", "trainer.tensorboard, unless it is set to false, needs")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def build_progress(first_step: int, max_steps: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    progress = Progress(*columns)
    bar = progress.add_task("", total=max_steps, completed=first_step)
    progress.start()
    return progress, bar
