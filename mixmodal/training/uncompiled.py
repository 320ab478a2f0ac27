"""Networks as they are written, also where training has compiled them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules act as they are written: for hooks, which compiled code does not see, and for shapes that vary.

    Where nothing has asked for the compiler yet, it is not loaded.
    """
    loaded = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext():
        yield
