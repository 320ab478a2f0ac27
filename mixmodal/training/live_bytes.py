"""Counts the bytes of tensors while operators run, of real tensors and of fake ones alike."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FLOAT32_ON_CUDA = {"group_norm", "layer_norm", "rms_norm", "interpolate", "softmax", "log_softmax", "softplus"}
"""What our networks call of the functions that autocast computes in float32 on CUDA, though not on the CPU
(AT_FORALL_FP32 in ATen/autocast_mode.h of torch 2.13)."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make while this mode is on, each counted once and until it is freed.

    Args:
        apart: tensors that are not counted, such as weights.

    Attributes:
        now: bytes that stand.
        peak: the most that ever stood.
        saved: bytes of those that stand and that autograd has kept for backward.
        saved_peak: the most that these ever were.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.saved = self.saved_peak = 0
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._kept_apart = list(apart)  # so that no other storage takes one of these addresses
        self._live: dict[int, weakref.ref[Any]] = {}
        self._saved: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return result

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Turns this mode on, and counts what autograd saves."""
        with self, torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _meet(self, tensor: Tensor) -> int | None:
        """The key of a tensor's storage; None for one that is not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._apart:
            return None
        if key not in self._live:
            size = storage.nbytes()

            def forget(_: Any) -> None:
                self.now -= size
                del self._live[key]
                if key in self._saved:
                    self._saved.remove(key)
                    self.saved -= size

            self._live[key] = weakref.ref(storage, forget)
            self.now += size
            self.peak = max(self.peak, self.now)
        return key

    def _save(self, tensor: Tensor) -> Tensor:
        key = self._meet(tensor)
        if key is not None and key not in self._saved:
            self._saved.add(key)
            self.saved += tensor.untyped_storage().nbytes()
            self.saved_peak = max(self.saved_peak, self.saved)
        return tensor


class CastAsOnCuda(TorchFunctionMode):
    """Lets autocast on the CPU give float32 where it does on CUDA, which keeps twice as many bytes for backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
        return func(*args, **(kwargs or {}))
