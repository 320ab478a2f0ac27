"""Documents packed side by side in rows: how attention is kept within each of them.

`segment_ids` `(B, T)` are equal within a document, and 0 in padding, whose hidden states mean nothing. Shapes: B batch,
T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_mask(segment_ids: Tensor) -> Tensor:
    """`(B, 1, T, T)` bool: a token sees itself and what stands before it in its own segment. `segment_ids` `(B, T)`."""
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return ((segment_ids[:, :, None] == segment_ids[:, None, :]) & causal)[:, None]


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting for a device: on the CPU, with data (fake tensors have none)."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor
