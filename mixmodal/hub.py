"""Folders by name: a local one, or the snapshot of a Hugging Face hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def find_folder(source: Path | str, patterns: Sequence[str], kind: str) -> Path:
    """A local folder as it is; else the snapshot of a hub id, for which huggingface_hub must be installed.

    Args:
        source: a folder, or where there is none of that name, `OWNER/NAME`, with a revision as `OWNER/NAME@REVISION`.
        patterns: files that are fetched.
        kind: what the folder should hold, for messages.

    Raises:
        ValueError: where there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder {source}; give one with {kind}, or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ValueError(
            f"there is no folder {source}; to load it from the Hugging Face hub, install huggingface_hub"
        ) from error
    name, _, revision = str(source).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"there is no folder {source}, and the Hugging Face hub does not give it: {reason}") from error
