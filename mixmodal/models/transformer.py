"""The decoder-only transformer of Chameleon (arXiv 2405.09818) and CM3Leon (arXiv 2309.02591).

It knows tensors and logits, not what an id means. Shapes: B batch, T tokens, D model, F ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.models.attention import (
    Attention,
    KVCache,
    LayerCache,
    Rotary,
    cache_mask,
    rotary,
)
from mixmodal.models.blocked import Blocked, Linear, blocked_layers, can_block
from mixmodal.models.packed_rows import AttentionKind, Documents, Pattern, find_pattern
from mixmodal.weights import read_weights, save_tensors

LEAST = {
    **dict.fromkeys(("vocab_size", "num_kv_heads", "head_dim"), 0),
    **dict.fromkeys(("dim", "num_layers", "num_heads", "ffn_dim", "max_seq_len"), 1),
}
"""Smallest sizes of a `TransformerConfig`; 0 is for what follows from others."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of the network.

    Args:
        vocab_size: rows of the embedding; 0 takes the size of the data's vocabulary when training.
        dim: width of the residual stream.
        num_layers: blocks.
        num_heads: attention heads.
        num_kv_heads: key-value heads; fewer than `num_heads` is grouped-query attention. 0 is `num_heads`.
        head_dim: width of a head; 0 is `dim / num_heads`.
        ffn_dim: inner width of the feed-forward layer.
        max_seq_len: longest sequence, in tokens.
        norm: `rmsnorm` with a weight, or `layernorm` without parameters (CM3Leon).
        norm_eps: added to the variance.
        norm_placement: `pre` before each sublayer (Chameleon-7B, CM3Leon), `post_sublayer` behind it (Chameleon-34B).
        activation: `swiglu`, or `gelu` without a gate (CM3Leon).
        position: `rope`, or a `learned` table of `max_seq_len` rows (CM3Leon).
        rope_theta: base of the rotary angles.
        qk_norm: LayerNorm with weight and bias per head on queries and keys, before the rotation (Chameleon).
        dropout: share dropped of each sublayer's output.
        tie_embeddings: the output matrix is the embedding.
        init_std: standard deviation of the truncated normal (cut at 3) that weights start from.
        position_init_std: the same for learned positions.
        zero_init_output: start the output layer of every sublayer at 0 (how CM3Leon's "output layers 0" is read here).
    """

    vocab_size: int = 0
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    ffn_dim: int = 704
    max_seq_len: int = 512
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: Literal["pre", "post_sublayer"] = "pre"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    qk_norm: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = False
    init_std: float = 0.02
    position_init_std: float = 0.0002
    zero_init_output: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"model: {name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("norm_eps", "init_std", "position_init_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"model: {name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model: dropout is {self.dropout}; it must lie in [0, 1)")
        if not 0 < self.rope_theta < float("inf"):
            raise ValueError(f"model: rope_theta is {self.rope_theta}; it must be above 0")
        if not self.head_dim and self.dim % self.num_heads:
            raise ValueError(f"model: dim {self.dim} does not divide into num_heads {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"model: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.position == "rope" and self.attention_sizes["head_dim"] % 2:
            raise ValueError(f"model: rotary positions need an even head_dim, not {self.attention_sizes['head_dim']}")
        idle = "rope_theta" if self.position == "learned" else "position_init_std"
        if getattr(self, idle) != type(self).__dataclass_fields__[idle].default:
            raise ValueError(f"model: {idle} can not act where position is {self.position}; leave it out")

    @property
    def attention_sizes(self) -> dict[str, int]:
        """`num_heads`, `num_kv_heads` and `head_dim` with the zeros filled in."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.dim // self.num_heads,
        }


class Norm(nn.Module):
    """RMSNorm with a weight, or LayerNorm without parameters."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim)) if config.norm == "rmsnorm" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., D)` to the same."""
        if self.weight is None:
            return F.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) with gate and value in one matrix, or GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = Linear(config.dim, (1 + self.gated) * config.ffn_dim)
        self.out = Linear(config.ffn_dim, config.dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        if not self.gated:
            return self.out(F.gelu(self.up(hidden)))
        gate, value = self.up(hidden).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before or behind it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.dropout = config.dropout
        self.attention = Attention(dim=config.dim, qk_norm=config.qk_norm, **config.attention_sizes)
        self.attention_norm = Norm(config)
        self.ffn = FeedForward(config)
        self.ffn_norm = Norm(config)

    def forward(
        self,
        hidden: Tensor,
        angles: Rotary | None,
        mask: Pattern,
        cache: LayerCache | None,
        positions: Tensor,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; the arguments are those of `Attention`."""
        context = (angles, mask, cache, positions)
        if self.norm_first:
            hidden = hidden + self._drop(self.attention(self.attention_norm(hidden), *context))
            return hidden + self._drop(self.ffn(self.ffn_norm(hidden)))
        hidden = hidden + self._drop(self.attention_norm(self.attention(hidden, *context)))
        return hidden + self._drop(self.ffn_norm(self.ffn(hidden)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


TOKEN_MATRICES = ("embedding.weight", "output.weight")
"""Parameters of a transformer that have a row for each token; the output is absent where it is tied."""

Reduce = Callable[[Tensor, Tensor], Any]
"""What is wanted of hidden states `(B, T, D)` and the output matrix `(V, D)` in place of all logits."""


class OutputLayer(nn.Linear):
    """Hidden states to logits, or to what a `Reduce` makes of them within this layer's forward.

    Within, because ZeRO stage 3 has the matrix whole only while the layer that owns it computes.
    """

    def forward(self, hidden: Tensor, reduce: Reduce | None = None) -> Any:  # type: ignore[override]
        """`(B, T, D)` to `(B, T, V)` float32, or what `reduce` returns."""
        return super().forward(hidden).float() if reduce is None else reduce(hidden, self.weight)


class Transformer(nn.Module):
    """Tokens `(B, T)` int64 to logits `(B, T, V)` float32.

    Raises:
        ValueError: for a `vocab_size` of 0, which only training can fill in.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("model: vocab_size is 0; set it, or let training take it from the data's vocabulary")
        self.config = config
        self.attention_kind: AttentionKind = "auto"
        """How attention is kept within documents: no part of the shape, the results are the same."""
        self.is_compiled = False
        self._blocked_columns: dict[tuple[int, int], Blocked] | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = config.position == "learned"
        self.positions = nn.Embedding(config.max_seq_len, config.dim) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm(config)
        self.output = None if config.tie_embeddings else OutputLayer(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws every matrix anew; norms go back to 1 and 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "_norm." not in name:
                std = self.config.position_init_std if name.startswith("positions") else self.config.init_std
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
                if self.config.zero_init_output and name.startswith("blocks") and name.endswith("out.weight"):
                    nn.init.zeros_(parameter)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def compile_blocks(self, dynamic: bool | None = False) -> None:
        """Lets torch.compile make one program of each block; names of parameters stay.

        Args:
            dynamic: see torch.compile: False is for fixed shapes, None lets those vary that are seen to.
        """
        self.is_compiled = True
        for block in self.blocks:
            block.compile(dynamic=dynamic)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The last block's normed output, `(B, T, D)`.

        Args:
            tokens: `(B, T)` int64.
            positions: `(B, T)` int64; counted from 0 (or from the end of the cache) by default.
            segment_ids: `(B, T)` int64; attention stays within equal ids, and 0 is padding, whose hidden states mean
                nothing. One segment by default.
            cache: keys and values of what came before; extended by this call.

        Raises:
            ValueError: for segments together with a cache, or a cache that is too small.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one document a row: segment_ids can not be given with it")
        start = 0 if cache is None else cache.used
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = None if segment_ids is None else find_pattern(segment_ids, self.attention_kind, self.is_compiled)
        if cache is not None:
            cache.extend(tokens.shape[1])
            mask = cache_mask(positions, cache.used)
        batch, length = tokens.shape
        if isinstance(mask, Documents):  # all but attention acts on each token for itself: no layer sees padding
            tokens, positions = mask.gather(tokens), mask.gather(positions)
        hidden = self.embedding(tokens)
        angles = None
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        else:
            angles = rotary(positions, self.config.attention_sizes["head_dim"], self.config.rope_theta)
        layers = [None] * len(self.blocks) if cache is None else cache.seen(batch)
        for block, layer in zip(self.blocks, layers):
            hidden = block(hidden, angles, mask, layer, positions)
        hidden = self.norm(hidden)
        return mask.scatter(hidden, batch, length) if isinstance(mask, Documents) else hidden

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Logits `(..., V)` float32 of `hidden` `(..., D)`; `ids` computes a stretch of the columns only."""
        weight = self.embedding.weight if self.output is None else self.output.weight
        start, stop, _ = (slice(None) if ids is None else ids).indices(len(weight))
        if self._blocked_columns is None or torch.is_grad_enabled() or not can_block(weight):
            return F.linear(hidden, weight[start:stop]).float()
        if (start, stop) not in self._blocked_columns:
            self._blocked_columns[start, stop] = Blocked(weight[start:stop])
        return self._blocked_columns[start, stop].multiply(hidden).float()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Within, a processor computes few rows faster, for weights that stay as they are; see `blocked_layers`.

        Columns of the output are copied the first time that a stretch of them is asked for.
        """
        outer, self._blocked_columns = self._blocked_columns, self._blocked_columns or {}
        try:
            with blocked_layers(self):
                yield
        finally:
            self._blocked_columns = outer

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_hidden: bool = False,
        reduce: Reduce | None = None,
    ) -> Any:
        """Logits `(B, T, V)` float32, and with `return_hidden` also `hidden`; the arguments are those of `hidden`.

        With `reduce` its result stands in place of the logits, which are then not computed.
        """
        hidden = self.hidden(tokens, positions, segment_ids, cache)
        if self.output is not None:
            found = self.output(hidden, reduce)
        else:
            found = self.logits(hidden) if reduce is None else reduce(hidden, self.embedding.weight)
        return (found, hidden) if return_hidden else found

    def build_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> KVCache:
        """An empty cache of `max_len` slots a row, by default on the device of the weights and in their type.

        A processor's is of float32: its attention takes twice as long in bfloat16.
        """
        sizes, weight = self.config.attention_sizes, self.embedding.weight
        shape = (batch_size, sizes["num_kv_heads"], max_len, sizes["head_dim"])
        device = device or weight.device
        kind = {"dtype": dtype or (torch.float32 if device.type == "cpu" else weight.dtype), "device": device}
        return KVCache(
            [LayerCache(torch.zeros(shape, **kind), torch.zeros(shape, **kind)) for _ in range(self.config.num_layers)]
        )


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes every parameter and buffer of `model` to one safetensors file.

    Raises:
        OSError: naming the file, where the disk is full or does not let it be written.
    """
    save_tensors(model.state_dict(), path)


def load_weights(
    model: nn.Module, source: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Fills `model`, which may be on the meta device, tensor by tensor.

    Args:
        source: a safetensors file, or a folder with `model.safetensors` or its shards.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one.

    Raises:
        ValueError: naming the file, for a damaged file, or a missing, unknown or differently shaped tensor, or one of
            whole numbers.
    """
    found, wanted = read_weights(source), model.state_dict()
    for name in sorted(set(found) ^ set(wanted)):
        where = found.path(name) if name in found else source
        raise ValueError(f"{where}: tensor {name} is {'unknown to the model' if name in found else 'missing'}")
    state = {}
    for name, own in wanted.items():
        shape = found.shape(name)
        if shape != tuple(own.shape):
            raise ValueError(f"{found.path(name)}: tensor {name} has shape {shape}, not {tuple(own.shape)}")
        stored = found[name]
        if stored.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{found.path(name)}: tensor {name} is of {stored.dtype}, in which weights are not stored")
        state[name] = stored.to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
