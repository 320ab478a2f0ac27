"""Files that are whole or absent, and errors of the disk that name the file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old one or the new one, never a part, even after a power cut.

    Raises:
        OSError: naming the file, where the disk is full or does not let it be written; the old file stays.
    """
    with replacing(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under; the file takes its place where nothing within fails. See `write_whole`."""
    part = path.with_name(path.name + ".part")
    with naming(path):
        try:
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError within name the file: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one line of JSON; the folder is made where it is missing.

    Raises:
        OSError: naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")


def stays_inside(name: str) -> bool:
    """Whether a path that is read from a file, with whichever slashes, stays in the folder that it is relative to."""
    pure = PurePosixPath(name.replace("\\", "/"))
    return not (pure.is_absolute() or ".." in pure.parts or "\0" in name or DRIVE.match(name))


def check_new_folder(path: Path, key: str) -> None:
    """Whether a folder can be written without loss of what is there.

    Raises:
        ValueError: naming the option `key`, where there is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{key}: {path} is there and not empty; choose a new folder")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; the file is never in memory as a whole."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over names and contents of files, in this order, hexadecimal."""
    lines = [f"{name} {sha256_of(path)}\n" for name, path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, where it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found
