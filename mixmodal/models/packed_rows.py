"""Documents packed side by side in rows: how attention is kept within each of them, and what that costs.

`segment_ids` `(B, T)` are equal within a document, and 0 in padding, whose hidden states mean nothing. Shapes: B batch,
T tokens, M tokens that are not padding, N heads, K kv heads, H head, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

AttentionKind = Literal["auto", "dense", "documents", "flex"]
"""`dense` computes all of a row under a mask `(B, 1, T, T)`; `documents` computes each document for itself, and nothing
in padding, in any layer; `flex` skips blocks of the mask that are empty (torch's FlexAttention, compiled on CUDA)."""


class Documents(NamedTuple):
    """Tokens of packed rows in another order: documents behind one another, those of one length together, no padding.

    Args:
        order: `(M,)` int64, where each token stands in the flattened rows.
        groups: how many documents there are of which length, in this order.
    """

    order: Tensor
    groups: list[tuple[int, int]]

    def gather(self, rows: Tensor) -> Tensor:
        """`(B, T)` to `(1, M)`."""
        return rows.reshape(1, -1)[:, self.order]

    def scatter(self, hidden: Tensor, batch: int, length: int) -> Tensor:
        """`(1, M, D)` to `(B, T, D)`, with 0 in padding."""
        rows = hidden.new_zeros(batch * length, hidden.shape[-1])
        return rows.index_copy(0, self.order, hidden[0]).view(batch, length, -1)


Pattern = Documents | Tensor | Any | None
"""Which keys a query sees: those before it in its document; true entries of a mask `(B, 1, T, S)`; those that a block
mask of FlexAttention lets through; all before it."""


def resolve_kind(kind: AttentionKind, device: str, compiled: bool) -> AttentionKind:
    """What `auto` is on a type of device.

    `documents` on the CPU, but not where blocks are compiled, which need the same shapes in every step: there it is
    `flex` on CUDA, and else `dense`, as on any device for which the host would have to wait.
    """
    if kind != "auto":
        return kind
    if compiled:
        return "flex" if device == "cuda" else "dense"
    return "documents" if device == "cpu" else "dense"


def find_pattern(segment_ids: Tensor, kind: AttentionKind, compiled: bool) -> Pattern:
    """How to attend within `segment_ids` `(B, T)`.

    Tensors without data can not tell documents apart: but for `dense` they stand for one document a row, for which all
    kinds need the same memory.

    Raises:
        ValueError: where `flex` can not act.
    """
    device = segment_ids.device.type
    kind = resolve_kind(kind, device, compiled)
    if kind == "dense":
        return segment_mask(segment_ids)
    if type(segment_ids) is not Tensor:
        return None
    if kind == "flex" and device == "cpu" and torch.is_grad_enabled():
        raise ValueError(
            "attention is flex, which torch can not train with on the CPU; choose auto, documents or dense"
        )
    if kind == "flex":
        return block_mask(segment_ids)
    found = find_documents(segment_ids.cpu())
    if found is None:
        return segment_mask(segment_ids)
    if found.groups == [tuple(segment_ids.shape)]:
        return None
    return found._replace(order=found.order.to(segment_ids.device))


def find_documents(segment_ids: Tensor) -> Documents | None:
    """The documents of rows on the host; None where there is none, or one is not in one piece."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = begins.view(-1).nonzero().squeeze(-1)
    lengths = torch.diff(starts, append=starts.new_tensor([segment_ids.numel()]))
    ids = segment_ids.reshape(-1)[starts]
    real = ids != 0
    starts, lengths, ids = starts[real], lengths[real], ids[real]
    named = torch.stack((starts // segment_ids.shape[1], ids))
    if not len(starts) or named.unique(dim=1).shape[1] < len(starts):
        return None
    lengths, by_length = lengths.sort(stable=True)
    before = lengths.cumsum(0) - lengths
    order = torch.repeat_interleave(starts[by_length] - before, lengths) + torch.arange(int(lengths.sum()))
    sizes, counts = lengths.unique_consecutive(return_counts=True)
    return Documents(order, list(zip(counts.tolist(), sizes.tolist(), strict=True)))


def attend_within(documents: Documents, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention in each document: `(1, N, M, H)`, `(1, K, M, H)` and the same to `(1, N, M, H)`."""
    sizes = [count * length for count, length in documents.groups]
    parts = (heads[0].split(sizes, dim=1) for heads in (queries, keys, values))
    mixed = []
    for (count, length), *group in zip(documents.groups, *parts, strict=True):
        split = [heads.unflatten(1, (count, length)).transpose(0, 1) for heads in group]
        found = F.scaled_dot_product_attention(
            split[0], split[1], split[2], is_causal=True, enable_gqa=len(keys[0]) < len(queries[0])
        )
        mixed.append(found.transpose(1, 2).flatten(0, 1))  # (count * length, N, H), as the kernel writes it
    return torch.cat(mixed)[None].transpose(1, 2)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """`(B, 1, T, T)` bool: a token sees itself and what stands before it in its own segment. `segment_ids` `(B, T)`."""
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return ((segment_ids[:, :, None] == segment_ids[:, None, :]) & causal)[:, None]


def block_mask(segment_ids: Tensor) -> BlockMask:
    """The same as blocks, of which empty ones are skipped."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segment_ids[batch, query] == segment_ids[batch, key])

    device, (size, length) = segment_ids.device, segment_ids.shape
    return _flex("create_block_mask", device.type == "cuda")(sees, size, None, length, length, device=str(device))


def attend_blocks(mask: BlockMask, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention through a block mask; `(B, N, T, H)`, `(B, K, T, H)` and the same to `(B, N, T, H)`."""
    if torch.compiler.is_compiling():  # a part of what is compiled
        from torch.nn.attention.flex_attention import flex_attention as attend
    else:
        attend = _flex("flex_attention", queries.device.type == "cuda")
    return attend(queries, keys, values, block_mask=mask, enable_gqa=keys.shape[1] < queries.shape[1])


@functools.cache
def _flex(name: str, compiled: bool) -> Callable[..., Any]:
    """A function of FlexAttention, compiled for fixed shapes where that is asked for."""
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function, dynamic=False) if compiled else function


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting for a device: on the CPU, with data (fake tensors have none)."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor
