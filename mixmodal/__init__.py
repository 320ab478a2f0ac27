"""Any-to-any models: one transformer that reads and writes text and pictures as tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixmodal.interop.export import load_transformer
    from mixmodal.pipeline import MixedModal

__all__ = ["MixedModal", "load_transformer"]

_HOMES = {"MixedModal": "mixmodal.pipeline", "load_transformer": "mixmodal.interop.export"}


def __getattr__(name: str) -> object:
    """Loads the public names at first use, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mixmodal' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
