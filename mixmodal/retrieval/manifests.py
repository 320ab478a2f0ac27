"""Reading the manifests of memories and candidates."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"


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
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format_version"]
        missing = sorted(set(keys) - set(manifest))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, so {folder} holds no {what.removeprefix('a ')}; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the manifest of {what} ({error!r})") from error
    if missing:
        raise ValueError(f"{path}: not the manifest of {what} (the key {missing[0]} is missing); {remedy}")
    if found != version:
        raise ValueError(f"{path}: format_version is {found}, this version reads {version}; {remedy}")
    return manifest
