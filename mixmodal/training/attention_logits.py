"""The largest attention logit of a transformer: QK-norm is against its growth (arXiv 2405.09818, section 2.3.2).

Shapes: N heads, K kv heads, H head, T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixmodal.models.attention import Attention, rotary, rotate
from mixmodal.models.transformer import Transformer
from mixmodal.training.uncompiled import uncompiled

CHUNK_ELEMENTS = 2**24
"""Logits that are computed at a time."""


@torch.no_grad()
def attention_logit_max(model: nn.Module, tokens: Tensor, positions: Tensor, segment_ids: Tensor) -> Tensor:
    """The largest `q k / sqrt(H)` of all layers and heads over what a token of one row may see, a float32 scalar.

    A forward of its own, without dropout, so that it depends neither on how attention is computed in training nor on
    compilation; it leaves random states alone. -inf for a row of padding.

    Args:
        model: a `Transformer`, or an engine around one.
        tokens, positions, segment_ids: `(1, T)`, those of a packed row.
    """
    network = next(module for module in model.modules() if isinstance(module, Transformer))
    found = [torch.full((), -math.inf, device=tokens.device)]
    heads: dict[str, Tensor] = {}
    angles = None
    if network.positions is None:
        angles = rotary(positions, network.config.attention_sizes["head_dim"], network.config.rope_theta)

    def keeping(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: Any, normed: Tensor) -> None:  # (1, T, N or K, H)
            turned = normed.transpose(1, 2) if angles is None else rotate(normed.transpose(1, 2), angles)
            heads[name] = turned[0]

        return keep

    def score(*_: Any) -> None:
        found[0] = torch.maximum(found[0], largest_logit(heads.pop("queries"), heads.pop("keys"), segment_ids[0]))

    with contextlib.ExitStack() as stack:
        for attention in (module for module in network.modules() if isinstance(module, Attention)):
            stack.callback(attention.q_norm.register_forward_hook(keeping("queries")).remove)
            stack.callback(attention.k_norm.register_forward_hook(keeping("keys")).remove)
            stack.callback(attention.register_forward_hook(score).remove)
        stack.enter_context(_plainly(network))
        stack.enter_context(uncompiled())  # compiled blocks would not see the hooks
        network.hidden(tokens, positions, segment_ids)
    return found[0]


def largest_logit(queries: Tensor, keys: Tensor, segment_ids: Tensor) -> Tensor:
    """The largest `q k / sqrt(H)`, a float32 scalar; -inf where no token sees another.

    Args:
        queries: `(N, T, H)`.
        keys: `(K, T, H)`; each serves N / K heads that stand side by side.
        segment_ids: `(T,)`; a token sees itself and what stands before it in its own segment, 0 is padding.
    """
    num_heads, length, head_dim = queries.shape
    keys = keys.repeat_interleave(num_heads // len(keys), dim=0)
    places = torch.arange(length, device=queries.device)
    largest = torch.full((), -math.inf, device=queries.device)
    size = max(1, CHUNK_ELEMENTS // (num_heads * length))
    for start in range(0, length, size):
        rows = slice(start, start + size)
        seen = places <= places[rows, None]
        seen &= (segment_ids == segment_ids[rows, None]) & (segment_ids != 0)
        logits = (queries[:, rows] @ keys.transpose(1, 2)).float().masked_fill_(~seen, -math.inf)
        largest = torch.maximum(largest, logits.amax())
    return largest / math.sqrt(head_dim)


@contextlib.contextmanager
def _plainly(network: Transformer) -> Iterator[None]:
    """Without dropout, and with all tokens of a row at their places."""
    training, kind = network.training, network.attention_kind
    network.eval()
    network.attention_kind = "dense"
    try:
        yield
    finally:
        network.train(training)
        network.attention_kind = kind
