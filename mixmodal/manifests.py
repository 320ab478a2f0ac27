"""Manifests: what a folder of shards or parts holds and what it was made with, and whether its files are as written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixmodal.files import read_object, sha256_of, write_whole

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, which comes last: what it does not name does not count."""
    write_whole(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


def read_manifest(folder: Path, what: str, *, version: int, keys: Collection[str], remedy: str) -> dict[str, Any]:
    """The manifest in a folder.

    Args:
        what: the folder holds, for messages.
        version: of its format, that is read.
        keys: that it must have.
        remedy: what the message of an error tells the user to do.

    Raises:
        ValueError: naming the manifest, where it is missing or something else.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so {folder} holds no {what.removeprefix('a ')}; {remedy}")
    try:
        manifest = read_object(path)
    except ValueError as error:
        raise ValueError(f"{path}: not the manifest of {what} ({error}); {remedy}") from error
    missing = sorted({"format_version", *keys} - set(manifest))
    if "format_version" not in missing and manifest["format_version"] != version:
        found = manifest["format_version"]
        raise ValueError(f"{path}: format_version is {found}, this version reads {version}; {remedy}")
    if missing:
        raise ValueError(f"{path}: not the manifest of {what} (the key {missing[0]} is missing); {remedy}")
    return manifest


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Makes what is not where the manifest in `path` should have it, or of another type, name the manifest.

    Args:
        what, remedy: see `read_manifest`.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the manifest of {what} ({error!r}); {remedy}") from error


def check_file(path: Path, sha256: str | None, remedy: str) -> None:
    """Whether a file that the manifest beside it names is there and as it was written.

    Args:
        sha256: of what was written; None does not read the file.
        remedy: what the message of an error tells the user to do, if the file can not be brought back.

    Raises:
        ValueError: naming the file and the manifest.
    """
    manifest = path.parent / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {manifest} names it; bring it back or {remedy}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise ValueError(
            f"{path}: changed since it was written (SHA-256 {found[:12]}..., not {sha256[:12]}... as in {manifest}); "
            f"bring it back or {remedy}"
        )
