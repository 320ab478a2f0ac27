"""Checkpoints that are whole or absent, and that hold data only.

checkpoints/latest                  name of the checkpoint in force, written last
checkpoints/step_00000100/          DeepSpeed's files, and
    state.json                      step and what must be equal to go on
    rank_00000.pt                   loader and random state of each rank
    ema.pt                          averaged weights, where they are kept
checkpoints/step_00000200.partial/  being written, or left by a process that was killed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixmodal.files import naming, write_whole

LATEST = "latest"
PARTIAL = ".partial"
PREFIX = "step_"


class CheckpointError(ValueError):
    """A checkpoint that can not be written or read."""


# files


def sync_folder(folder: Path) -> None:
    """Waits until names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(state: Any, path: Path) -> None:
    """`torch.save` that waits for the disk and fails with an OSError alone, which names the file."""
    with naming(path), open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer puts its own error over that of the disk
            raise OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path, map_location: Any = None, allowed: Sequence[Any] = ()) -> Any:
    """`torch.load` of data: tensors, numbers, strings, lists, tuples, dictionaries and the classes `allowed`.

    Raises:
        CheckpointError: naming the file, where it is missing, damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint file {path} can not be loaded: {reason}") from error


# data


def check_plain(value: Any, name: str) -> None:
    """Makes sure that a state can be read back as data.

    Raises:
        TypeError: naming the entry that is of another type.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check_plain(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            check_plain(entry, f"{name}[{index}]")
    elif type(value) not in (int, float, bool, str, bytes, type(None)) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; a state holds numbers, strings, tensors, lists, dicts")


# folders


def step_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in force, or None where there is none.

    Raises:
        CheckpointError: where `latest` names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    found = folder / pointer.read_text(encoding="utf-8").strip()
    if not (found / "state.json").is_file():
        raise CheckpointError(f"{pointer} names {found.name}, which is not whole; name another one in the file")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: state.json can not be read: {error}") from error


def clear_partial(folder: Path) -> None:
    """Removes what killed processes left."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the one in force."""
    in_force = latest_checkpoint(folder)
    whole = sorted(path for path in folder.glob(f"{PREFIX}*") if path.suffix != PARTIAL)
    for old in whole[:-keep]:
        if old != in_force:
            doomed = old.with_name(old.name + PARTIAL)  # so that half of it is never taken for a checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    write_engine: Callable[[Path], None],
    rank_state: Mapping[str, Any],
    extra: Mapping[str, Any],
    *,
    rank: int,
    keep: int,
) -> Path:
    """Writes one checkpoint; every rank must call it.

    All files go to a partial folder, which is renamed when the disk has them; `latest` is written last. Whatever
    happens on the way, the previous checkpoint stays in force.

    Args:
        folder: `checkpoints/` of the run, on a disk that all ranks share.
        state: JSON data; `step` names the checkpoint.
        write_engine: writes the weights and the optimizer into a folder; a collective.
        rank_state: data of this rank.
        extra: file name to tensors that rank 0 writes.
        keep: number of checkpoints to keep.

    Raises:
        CheckpointError: where any rank could not write.
    """
    name = step_name(int(state["step"]))
    partial, final = folder / (name + PARTIAL), folder / name
    problem = _attempt(lambda: _prepare(folder, partial), rank == 0)
    if not _all_well(problem):
        raise CheckpointError(f"checkpoint {final} could not be begun: {problem or 'see rank 0'}; {_kept(folder)}")
    problem = _attempt(lambda: write_engine(partial))
    check_plain(rank_state, "state of the rank")
    problem = problem or _attempt(lambda: save_tensors(dict(rank_state), partial / f"rank_{rank:05d}.pt"))
    if rank == 0:
        problem = problem or _attempt(lambda: _write_extra(partial, state, extra))
    if not _all_well(problem):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        problem = problem or "another rank failed"
        raise CheckpointError(f"checkpoint {final} could not be written: {problem}; {_kept(folder)}")
    problem = _attempt(lambda: _put_in_force(folder, partial, final, keep), rank == 0)
    if not _all_well(problem):
        raise CheckpointError(f"checkpoint {final} could not be put in force: {problem}; {_kept(folder)}")
    return final


def _attempt(action: Callable[[], None], wanted: bool = True) -> str:
    """What went wrong on the disk, or nothing."""
    try:
        if wanted:
            action()
    except OSError as error:
        return str(error)
    return ""


def _prepare(folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clear_partial(folder)
    partial.mkdir()


def _write_extra(partial: Path, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    for file_name, tensors in extra.items():
        save_tensors(tensors, partial / file_name)
    write_whole(partial / "state.json", json.dumps(state, indent=2).encode())


def _put_in_force(folder: Path, partial: Path, final: Path, keep: int) -> None:
    if final.exists():  # left by a run that was killed before `latest` named it
        shutil.rmtree(final)
    sync_folder(partial)
    os.replace(partial, final)
    sync_folder(folder)
    write_whole(folder / LATEST, (final.name + "\n").encode())
    sync_folder(folder)
    prune(folder, keep)


def _all_well(problem: str) -> bool:
    """Whether no rank has a problem; a collective where there are several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return not problem
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return not any(problems)


def _kept(folder: Path) -> str:
    pointer = folder / LATEST
    return f"{pointer.read_text().strip()} stays in force" if pointer.exists() else "there is no earlier checkpoint"
