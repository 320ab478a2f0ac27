"""Folders by name: a local one, or the snapshot of a Hugging Face hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class HubOptions(TypedDict, total=False):
    """How a hub id is fetched, as in huggingface_hub.

    Args:
        revision: branch, tag or commit; None is the main branch, or what stands behind the `@` of the id.
        token: of an account that may read it; True takes the one of `hf auth login`, False none, None that where it is.
        cache_dir: where fetched files are kept.
        local_files_only: take what is kept there, and ask nobody.
        force_download: fetch again what is kept there.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: Path | str | None
    local_files_only: bool
    force_download: bool


def find_folder(source: Path | str, patterns: Sequence[str], kind: str, options: HubOptions | None = None) -> Path:
    """A local folder as it is; else the snapshot of a hub id, for which huggingface_hub must be installed.

    Args:
        source: a folder, or where there is none of that name, `OWNER/NAME`, with a revision as `OWNER/NAME@REVISION`.
        patterns: files that are fetched.
        kind: what the folder should hold, for messages.
        options: of a hub id; on a local folder only `local_files_only` can act.

    Raises:
        ValueError: where there is neither, or naming the option that can not act.
    """
    given: dict[str, Any] = {name: value for name, value in (options or {}).items() if value not in (None, False)}
    if options and options.get("token") is False:
        given["token"] = False
    if Path(source).is_dir():
        idle = [name for name in given if name != "local_files_only"]
        if idle:
            raise ValueError(f"{', '.join(idle)} can not act on the local folder {source}; leave it out")
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder {source}; give one with {kind}, or a hub id")
    name, _, revision = str(source).partition("@")
    if revision and "revision" in given:
        raise ValueError(f"{source} names a revision, and so does the option revision {given['revision']}; give one")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ValueError(
            f"there is no folder {source}; to load it from the Hugging Face hub, install huggingface_hub"
        ) from error
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(patterns), **given}
    try:
        return Path(snapshot_download(name, **wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no folder {source}, and the Hugging Face hub does not give it: {reason_of(error)}"
        ) from error


def reason_of(error: Exception) -> str:
    """The start of a message of the hub in one line."""
    return " ".join(str(error).split())[:300]
