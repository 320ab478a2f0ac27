"""Checkpoints that are whole or absent, and that hold data only.

checkpoints/latest                  name of the checkpoint in force, written last
checkpoints/step_00000100/
    state.json                      step and what must be equal to go on
    model_00000.pt                  what rank 0 keeps of the network `model` (see `fragments`), and so on
    rank_00000.pt                   loader and random state of each rank
    ema.pt                          averaged weights, where they are kept
    checksums.json                  SHA-256 of every other file
checkpoints/step_00000200.partial/  being written, or left by a process that was killed
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from mixmodal.files import naming, sha256_of

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
STATE = "state.json"
LATEST = "latest"
PARTIAL = ".partial"
PREFIX = "step_"


class CheckpointError(ValueError):
    """A checkpoint that can not be written or read."""


def describe(error: Exception) -> str:
    """One line for other ranks; never empty. Errors that are not for users come with their type."""
    text = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    return text or type(error).__name__


# files


def sync_folder(folder: Path) -> None:
    """Waits until names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashedFile:
    """A file to write to that knows the SHA-256 of what it got."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        """Of the disk."""

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_tensors(state: Any, path: Path) -> str:
    """`torch.save` that waits for the disk and fails with an OSError alone, which names the file; the SHA-256."""
    with naming(path), open(path, "wb") as file:
        hashed = HashedFile(file)
        try:
            torch.save(state, hashed)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, OSError) as error:  # torch's writer puts its own error over that of the disk
            raise hashed.error or OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())
    return hashed.sha256.hexdigest()


def load_tensors(path: Path, *, lazy: bool = False) -> Any:
    """`torch.load` of data to the host: tensors, numbers, strings, lists, tuples and dictionaries.

    Args:
        path: of a file that `save_tensors` wrote.
        lazy: whether tensors are read from the file when they are used, which takes what is used alone to memory.

    Raises:
        CheckpointError: naming the file, where it is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
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


def is_step_name(name: str) -> bool:
    """Whether a name is that of a finished checkpoint."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that were finished, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if is_step_name(path.name))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in force, or None where none is named; `choose_checkpoint` looks whether it is whole."""
    pointer = folder / LATEST
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
    return folder / name if is_step_name(name) else None


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a checkpoint holds.

    Raises:
        CheckpointError: naming the file that is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {path} can not be read: {error}") from error


def clear_partial(folder: Path) -> None:
    """Removes what killed processes left."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Removes old checkpoints.

    There stay the newest `keep`, also of those that are not newer than the one in force, and those whose step is a
    multiple of `keep_every`.
    """
    in_force = latest_checkpoint(folder)
    whole = whole_checkpoints(folder)
    until = [path for path in whole if in_force is None or path.name <= in_force.name]
    for old in set(whole) - {*whole[-keep:], *until[-keep:]}:
        if not keep_every or step_of(old) % keep_every:
            doomed = old.with_name(old.name + PARTIAL)  # so that half of it is never taken for a checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)


# choice

Gather = Callable[[Any], list[Any]]
"""Data of this rank to the data of all ranks, in their order; a collective."""


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """A `Gather`, within a process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def choose_checkpoint(folder: Path, rank: int = 0, gather: Gather = gather_objects) -> Path | None:
    """The checkpoint in force, or the newest whole one before it, with a warning for each that is damaged.

    Where none is named to be in force, it is the newest whole one, with a warning. Every file is compared with its
    checksum. Each rank reads a part of the files; all come to the same answer.

    Raises:
        CheckpointError: where there are checkpoints, but none is whole.
    """
    in_force = latest_checkpoint(folder)
    whole = [path.name for path in reversed(whole_checkpoints(folder))]
    names = [in_force.name, *(name for name in whole if name < in_force.name)] if in_force else whole
    names = gather(names)[0]  # another rank may see the disk of a moment ago
    if names and not in_force and rank == 0:
        logger.warning("%s names no checkpoint; looking for the newest whole one", folder / LATEST)
    damaged: list[str] = []
    for name in names:
        problems = [problem for part in gather(find_damage(folder / name, rank, gather)) for problem in part]
        if not problems:
            if rank == 0:
                for line in damaged:
                    logger.warning("%s; going on from %s instead", line, name)
            return folder / name
        damaged.append(f"checkpoint {folder / name} is damaged: {', '.join(sorted(set(problems)))}")
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}; no whole checkpoint is left: choose another trainer.run_dir")
    return None


def find_damage(checkpoint: Path, rank: int, gather: Gather) -> list[str]:
    """What is wrong with the files that fall to this rank."""
    try:
        checksums = read_json(checkpoint / CHECKSUMS)
        problem = "" if STATE in checksums else f"{CHECKSUMS} does not name {STATE}"
    except CheckpointError:
        checksums, problem = {}, f"{CHECKSUMS} is missing or can not be read"
    world = gather((checksums, problem))
    checksums, problem = world[0]
    if problem:
        return [problem]
    problems = []
    for name in sorted(checksums)[rank :: len(world)]:
        try:
            if sha256_of(checkpoint / name) != checksums[name]:
                problems.append(f"{name} is not what was written")
        except OSError as error:
            problems.append(f"{name} can not be read ({error.strerror})")
    return problems
