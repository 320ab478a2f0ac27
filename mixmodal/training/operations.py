"""Floating-point operations that training a transformer needs, as the MFU counts them.

Six for each token and weight (tables that are looked up are none), two forward and four backward, and twelve for each
layer, channel of the heads, and pair of a query and a key (PaLM, arXiv 2204.02311, appendix B). There a query is paired
with all keys of its sequence, masked or not; here with those of its document, since documents of a row do not see one
another. Padding needs none, and what activation checkpointing computes again is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixmodal.models.transformer import Transformer, TransformerConfig


class Operations(NamedTuple):
    """What a training step needs, forward and backward.

    Args:
        per_token: in matrix products with weights.
        per_pair: in attention, for each pair of a query and a key.
    """

    per_token: float
    per_pair: float

    def of(self, lengths: Tensor) -> float:
        """Of documents of `lengths` tokens, `(n,)` on the CPU."""
        exact = lengths.double()
        return self.per_token * float(exact.sum()) + self.per_pair * float(exact.square().sum())


def count_operations(config: TransformerConfig) -> Operations:
    """The operations of a network of this shape."""
    with torch.device("meta"):
        model = Transformer(config)
    tables = [model.embedding.weight, *([model.positions.weight] if model.positions else [])]
    weights = sum(parameter.numel() for parameter in model.parameters()) - sum(table.numel() for table in tables)
    if config.tie_embeddings:  # the table is the output matrix, too
        weights += model.embedding.weight.numel()
    sizes = config.attention_sizes
    return Operations(6.0 * weights, 12.0 * config.num_layers * sizes["num_heads"] * sizes["head_dim"])
