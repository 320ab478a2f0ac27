"""Matrices in oneDNN's blocked layout, in which a processor multiplies few rows faster than by the plain ones.

Decoding takes as many rows a step as are drawn at a time, for which the BLAS that PyTorch calls for float32 is made
least: with 2 rows it takes twice the time of one. Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 4
"""Fewer take longer in oneDNN's kernels for float32."""


class Blocked:
    """A matrix `(O, I)` in another layout: a copy, which does not follow changes of the matrix.

    Raises:
        ValueError: for a matrix that `can_block` refuses.
    """

    def __init__(self, weight: Tensor) -> None:
        if not can_block(weight):
            raise ValueError(f"a matrix of {weight.dtype} on {weight.device} can not be blocked on this machine")
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LEAST_ROWS)

    def multiply(self, rows: Tensor) -> Tensor:
        """`F.linear` of `rows` `(..., I)`, to `(..., O)`."""
        flat = rows.reshape(-1, rows.shape[-1])
        num_rows = len(flat)
        if num_rows < LEAST_ROWS:
            flat = F.pad(flat, (0, 0, 0, LEAST_ROWS - num_rows))
        product = torch.ops.mkldnn._linear_pointwise(flat, self._weight, None, "none", [], "")
        return product[:num_rows].view(*rows.shape[:-1], -1)


def can_block(weight: Tensor) -> bool:
    """Whether there is a blocked layout for `weight`: a matrix of float32 or bfloat16 on an x86 processor."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dim() != 2 or not weight.numel():  # ZeRO stage 3 leaves nothing of a matrix that is elsewhere
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class Linear(nn.Linear):
    """A linear layer without bias that uses a blocked copy of its weight where it has been given one."""

    blocked: Blocked | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        """`(..., I)` to `(..., O)`."""
        if self.blocked is None or torch.is_grad_enabled():
            return super().forward(rows)
        return self.blocked.multiply(rows)


@contextmanager
def blocked_layers(model: nn.Module) -> Iterator[None]:
    """Within, layers of `model` that can be blocked are; their weights must not change meanwhile.

    It takes as much memory again as these weights, and about as long as reading them a few times.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and layer.blocked is None]
    try:
        for layer in layers:
            layer.blocked = Blocked(layer.weight) if can_block(layer.weight) else None
        yield
    finally:
        for layer in layers:
            layer.blocked = None
