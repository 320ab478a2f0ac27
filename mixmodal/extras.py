"""Libraries that not everybody has: imported where they are used, and named with the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str, user: str) -> Any:
    """A module of an optional library.

    Args:
        module: its full name.
        extra: of this package, that brings the library.
        user: who needs it, for the message, with the verb: `adapter needs`.

    Raises:
        ValueError: where it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ValueError(f"{user} {library}: pip install 'mixmodal[{extra}]' ({error})") from error
