"""Self-attention with grouped key-value heads, QK-norm and rotary positions, and its cache.

Shapes: B batch, T tokens, D model, N heads, K kv heads, H head, S cache slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixmodal.models.blocked import Linear
from mixmodal.models.packed_rows import Documents, Pattern, attend_blocks, attend_within


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, each `(B, 1, T, H)` float32."""

    cos: Tensor
    sin: Tensor


def rotary(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Rotary angles (arXiv 2104.09864) of `positions` `(B, T)`, in the split-half layout of transformers."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary(angles.cos(), angles.sin())


def rotate(heads: Tensor, angles: Rotary) -> Tensor:
    """Turns `heads` `(B, N, T, H)` by the angles of their positions."""
    if torch.compiler.is_compiling():  # which fuses what is written out
        first, second = heads.chunk(2, dim=-1)
        return heads * angles.cos + torch.cat((-second, first), dim=-1) * angles.sin
    if not torch.is_grad_enabled():
        return _turn(heads, *angles, direction=1)
    return _Rotate.apply(heads, *angles)  # type: ignore[misc]


class _Rotate(torch.autograd.Function):
    """A rotation in half the passes over memory that autograd makes; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = heads.dtype
        return _turn(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1).to(ctx.dtype), None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = heads.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # the other half is the same
    turned = torch.empty_like(heads, dtype=torch.promote_types(heads.dtype, cos.dtype))
    (first, second), (turned_first, turned_second) = heads.split(half, dim=-1), turned.split(half, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=direction)
    return turned


class HeadNorm(nn.Module):
    """LayerNorm over the head dimension with a weight and a bias of its own for every head (Chameleon's QK-norm)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, heads: Tensor) -> Tensor:
        """`(B, T, N, H)` to the same, in float32."""
        normed = F.layer_norm(heads.float(), heads.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, normed, self.weight)


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `(B, K, S, H)`."""

    keys: Tensor
    values: Tensor

    def write(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values `(B, K, T, H)` at the slots `positions` `(B, T)`."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.keys[rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)


class KVCache:
    """Static cache in which a token's slot is its position.

    Rows of unequal length are padded on the right: a padded token writes a slot that its row's next real token
    overwrites before any query sees it, because a query at position p sees the slots 0 .. p only.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.used = 0
        """Slots that may have been written, over all rows: attention looks no further."""

    @property
    def size(self) -> int:
        """Slots of each row."""
        return self.layers[0].keys.shape[2]

    def extend(self, num_tokens: int) -> None:
        """Makes room for one more forward of `num_tokens`.

        Raises:
            ValueError: when the cache is too small.
        """
        self.used += num_tokens
        if self.used > self.size:
            raise ValueError(f"the cache holds {self.size} tokens a row; {self.used} are needed")

    def seen(self, num_rows: int) -> list[LayerCache]:
        """What the first rows may see, layer by layer, to be read and written: a cache may have more rows."""
        return [LayerCache(*(kept[:num_rows, :, : self.used] for kept in layer)) for layer in self.layers]

    def put(self, row: int, other: KVCache) -> None:
        """Copies what another cache holds to the rows from `row` on."""
        for layer, new in zip(self.layers, other.layers):
            for kept, found in zip(layer, new):
                kept[row : row + len(found), :, : other.used] = found[:, :, : other.used]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first tokens of one row to another."""
        for layer in self.layers:
            for kept in layer:
                kept[target, :, :num_tokens] = kept[source, :, :num_tokens]

    def select(self, rows: Tensor) -> KVCache:
        """A copy whose rows are `rows` `(B',)` of this one: a shared prefix is computed once and repeated."""
        chosen = KVCache([LayerCache(layer.keys[rows], layer.values[rows]) for layer in self.layers])
        chosen.used = self.used
        return chosen


class Attention(nn.Module):
    """Causal self-attention. The query, key and value projections are one matrix, in this order.

    Args:
        dim, num_heads, num_kv_heads, head_dim: sizes; every kv head serves `num_heads / num_kv_heads` heads.
        qk_norm: normalise queries and keys per head before the rotation.
    """

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim)
        self.out = Linear(num_heads * head_dim, dim)
        self.q_norm = HeadNorm(num_heads, head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(num_kv_heads, head_dim) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        angles: Rotary | None,
        mask: Pattern,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`.

        Args:
            angles: rotary angles; None where positions are learned.
            mask: which keys a query sees; with `Documents`, B is 1 and T the number of tokens that are not padding.
            cache, positions: what is seen of this layer's keys and values, and the slots `(B, T)` of the new ones.
        """
        batch, length, _ = hidden.shape
        heads = self.qkv(hidden).view(batch, length, -1, self.head_dim)
        queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        queries, keys = self.q_norm(queries).transpose(1, 2), self.k_norm(keys).transpose(1, 2)
        values = values.transpose(1, 2)
        if angles is not None:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is not None and positions is not None:
            cache.write(positions, keys, values)
            keys, values = cache
        mixed = self.attend(queries.to(values.dtype), keys.to(values.dtype), values, mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1).to(hidden.dtype))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Pattern) -> Tensor:
        """`(B, N, T, H)`, `(B, K, S, H)` and the same to `(B, N, T, H)`."""
        if isinstance(mask, Documents):
            return attend_within(mask, queries, keys, values)
        if mask is not None and not isinstance(mask, Tensor):
            return attend_blocks(mask, queries, keys, values)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_kv_heads < self.num_heads
        )


def cache_mask(positions: Tensor, num_slots: int) -> Tensor:
    """`(B, 1, T, S)` bool: a query at position p sees the slots 0 .. p. `positions` `(B, T)`."""
    slots = torch.arange(num_slots, device=positions.device)
    return (slots <= positions[:, :, None])[:, None]
