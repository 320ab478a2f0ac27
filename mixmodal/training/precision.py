"""What `trainer.precision` is to torch: the type of weights, and the type that matrix products are computed in."""

from __future__ import annotations

import torch

from mixmodal.training.config import HALF, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "autocast_bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def compute_dtype(precision: Precision) -> torch.dtype:
    """What matrix products are computed in."""
    return DTYPES[precision]


def weight_dtype(precision: Precision) -> torch.dtype | None:
    """The type of weights; None leaves them as they are, float32."""
    return DTYPES[precision] if precision in HALF else None


def autocast(precision: Precision, device: str) -> torch.autocast:
    """A context in which a network computes as in training, on a type of device; it acts for `autocast_bfloat16`."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast_bfloat16")
