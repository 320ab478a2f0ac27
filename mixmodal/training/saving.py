"""Writing checkpoints: whole or absent, while training waits or in the background."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mixmodal.files import sha256_of, write_whole
from mixmodal.training import checkpoint
from mixmodal.training.checkpoint import (
    CHECKSUMS,
    LATEST,
    PARTIAL,
    STATE,
    CheckpointError,
    Gather,
    clear_partial,
    describe,
    gather_objects,
    prune,
    step_name,
    sync_folder,
)


class Saver:
    """Writes the checkpoints of a run, at most one at a time.

    In the background, `save` copies everything to the memory of the host and returns; a thread writes it. The ranks'
    threads wait for each other in a process group of their own, so that they do not meet the training in its.

    Args:
        folder: `checkpoints/` of the run, on a disk that all ranks share.
        rank: of this process.
        keep: number of checkpoints to keep.
        keep_every: checkpoints of steps that are a multiple of it stay, too; 0 keeps no others.
        background: whether training goes on while files are written.
    """

    def __init__(self, folder: Path, *, rank: int, keep: int, keep_every: int = 0, background: bool = False) -> None:
        self.folder = folder
        self._write = partial(save_checkpoint, folder, rank=rank, keep=keep, keep_every=keep_every)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if background and several else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def save(self, state: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Writes or begins to write; see `save_checkpoint`.

        Raises:
            CheckpointError: where this checkpoint or, in the background, the one before it could not be written.
        """
        self.wait()
        if self._thread is None:
            self._write(state, files)
        else:
            gather = partial(gather_objects, group=self._group)
            self._pending = self._thread.submit(self._write, dict(state), copied(files), gather=gather)

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
            CheckpointError: where it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Lets the thread end; problems are for `wait` to raise."""
        if self._thread:
            self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)


def copied(value: Any) -> Any:
    """The same data with all tensors copied to the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    files: Mapping[str, Any],
    *,
    rank: int,
    keep: int,
    keep_every: int = 0,
    gather: Gather = gather_objects,
) -> Path:
    """Writes one checkpoint; every rank must call it.

    All files go to a partial folder, which is renamed when the disk has them; `latest` is written last. Whatever
    happens on the way, the previous checkpoint stays in force.

    Args:
        folder: see `Saver`.
        state: JSON data; `step` names the checkpoint.
        files: of this rank, by name; data that `torch.load` reads as such.
        rank: see `Saver`, as are `keep` and `keep_every`.
        gather: how the ranks agree.

    Raises:
        CheckpointError: where any rank could not write.
    """
    name = step_name(int(state["step"]))
    partial, final = folder / (name + PARTIAL), folder / name
    problem = _attempt(lambda: _prepare(folder, partial), rank == 0)
    _agree(gather, problem, f"checkpoint {final} could not be begun", folder)
    checksums: dict[str, str] = {}
    problem = _attempt(lambda: _write_files(partial, files, checksums))
    try:
        written = _agree(gather, problem, f"checkpoint {final} could not be written", folder, checksums)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    everything = {name: digest for part in written for name, digest in part.items()}
    problem = _attempt(lambda: _put_in_force(partial, final, state, everything), rank == 0)
    _agree(gather, problem, f"checkpoint {final} could not be put in force", folder)
    problem = _attempt(lambda: prune(folder, keep, keep_every), rank == 0)
    _agree(gather, problem, f"checkpoints before {final} could not be removed", folder)
    return final


def _attempt(action: Callable[[], None], wanted: bool = True) -> str:
    """What went wrong, on the disk or elsewhere, or nothing: the other ranks are to hear of it."""
    try:
        if wanted:
            action()
    except Exception as error:
        return describe(error)
    return ""


def _agree(gather: Gather, problem: str, failure: str, folder: Path, value: Any = None) -> list[Any]:
    """The values of all ranks, where none has a problem."""
    everyone = gather((problem, value))
    problems = [f"rank {rank}: {found}" if len(everyone) > 1 else found for rank, (found, _) in enumerate(everyone)]
    problems = [line for line, (found, _) in zip(problems, everyone, strict=True) if found]
    if problems:
        pointer = folder / LATEST
        kept = f"{pointer.read_text().strip()} stays in force" if pointer.exists() else "there is no earlier checkpoint"
        raise CheckpointError(f"{failure}: {'; '.join(problems)}; {kept}")
    return [value for _, value in everyone]


def _prepare(folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clear_partial(folder)
    partial.mkdir()


def _write_files(partial: Path, files: Mapping[str, Any], checksums: dict[str, str]) -> None:
    for name, tensors in files.items():
        checksums[name] = checkpoint.save_tensors(tensors, partial / name)


def _put_in_force(partial: Path, final: Path, state: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    write_whole(partial / STATE, json.dumps(state, indent=2).encode())
    checksums = {**checksums, STATE: sha256_of(partial / STATE)}
    write_whole(partial / CHECKSUMS, json.dumps(checksums, indent=2, sort_keys=True).encode())
    sync_folder(partial)
    if final.exists():  # damaged, or left by a run that was killed before `latest` named it
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(final.parent)
    write_whole(final.parent / LATEST, (final.name + "\n").encode())
    sync_folder(final.parent)
