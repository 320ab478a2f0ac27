"""How transformers of the Chameleon family lie in files: a table for each layout, and which one a checkpoint has.

Names and shapes tell the layouts apart, but not the order of rows: adjacent rotary pairs and split halves have the same
shapes, so that a wrong guess would give wrong weights without an error. Nothing is guessed here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

LayoutName = Literal["meta", "anole", "transformers-4.43", "transformers", "llama"]
Norms = Literal["shard", "one", "head", "none"]

BLOCK = "blocks.{}."
QKV, Q_NORM, K_NORM, UP = "attention.qkv.weight", "attention.q_norm", "attention.k_norm", "ffn.up.weight"
"""Names within our blocks that several of theirs make up, or that are stored in another shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One way to store a transformer.

    Args:
        name: as users say it.
        embedding, output, norm: names outside blocks.
        block: how names within blocks begin; braces stand for the number.
        parts: our names within blocks to theirs, which stand on each other in this order.
        adjacent_pairs: whether the two rows of a rotary pair are neighbours; else they are half a head apart.
        norms: QK-norm: one set for each shard `(shards, head_dim)` or without shards `(head_dim,)`, one for each
            head `(heads, head_dim)`, or none.
        shards: on which dimension the shards of each of their names are cut; others are the same in all.
        skipped: names that are known and not needed: tables that are computed, and the picture tokenizer.
    """

    name: LayoutName
    embedding: str
    output: str
    norm: str
    block: str
    parts: Mapping[str, tuple[str, ...]]
    adjacent_pairs: bool
    norms: Norms
    shards: Mapping[str, int] = field(default_factory=dict)
    skipped: re.Pattern[str]

    def names(self, num_layers: int, has_output: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Our name of each tensor, and theirs of what makes it up."""
        yield "embedding.weight", (self.embedding,)
        for layer in range(num_layers):
            for own, theirs in self.parts.items():
                yield BLOCK.format(layer) + own, tuple(self.block.format(layer) + name for name in theirs)
        yield "norm.weight", (self.norm,)
        if has_output:
            yield "output.weight", (self.output,)

    def cut(self, name: str) -> int | None:
        """The dimension on which shards of one of their tensors are cut; None where all have the same."""
        return self.shards.get(re.sub(r"^layers\.\d+\.", "", name))


def _norms(query: str, key: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{own}.{part}": (f"{theirs}.{part}",)
        for own, theirs in ((Q_NORM, query), (K_NORM, key))
        for part in ("weight", "bias")
    }


META = Layout(
    name="meta",
    embedding="tok_embeddings.weight",
    output="output.weight",
    norm="norm.weight",
    block="layers.{}.",
    parts={
        QKV: ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
        "attention.out.weight": ("attention.wo.weight",),
        **_norms("attention.q_normalization", "attention.k_normalization"),
        "attention_norm.weight": ("attention_norm.weight",),
        UP: ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "ffn.out.weight": ("feed_forward.w2.weight",),
        "ffn_norm.weight": ("ffn_norm.weight",),
    },
    adjacent_pairs=True,
    norms="shard",
    shards={
        "tok_embeddings.weight": 1,
        "output.weight": 0,
        **{f"attention.{name}.weight": 0 for name in ("wq", "wk", "wv")},
        **{f"feed_forward.{name}.weight": 0 for name in ("w1", "w3")},
        "attention.wo.weight": 1,
        "feed_forward.w2.weight": 1,
    },
    skipped=re.compile(r"rope\.freqs"),
)
_LLAMA_PARTS: dict[str, tuple[str, ...]] = {
    QKV: ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    UP: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.out.weight": ("mlp.down_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
}
_CHAMELEON_PARTS = {**_LLAMA_PARTS, **_norms("self_attn.q_norm", "self_attn.k_norm")}


def _transformers(name: LayoutName, adjacent_pairs: bool, norms: Norms) -> Layout:
    return Layout(
        name=name,
        embedding="model.embed_tokens.weight",
        output="lm_head.weight",
        norm="model.norm.weight",
        block="model.layers.{}.",
        parts=_LLAMA_PARTS if norms == "none" else _CHAMELEON_PARTS,
        adjacent_pairs=adjacent_pairs,
        norms=norms,
        skipped=re.compile(r"model\.vqmodel\..*|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    )


ANOLE = _transformers("anole", True, "one")
TRANSFORMERS_4_43 = _transformers("transformers-4.43", False, "shard")
TRANSFORMERS = _transformers("transformers", False, "head")
LLAMA = _transformers("llama", False, "none")
LAYOUTS: dict[LayoutName, Layout] = {
    layout.name: layout for layout in (META, ANOLE, TRANSFORMERS_4_43, TRANSFORMERS, LLAMA)
}


def is_transformer(names: Collection[str]) -> bool:
    """Whether there is a transformer of the family among the names of a checkpoint's tensors."""
    return META.embedding in names or LLAMA.embedding in names


def find_layout(shapes: Mapping[str, tuple[int, ...]], num_shards: int) -> Layout:
    """The layout of a checkpoint.

    Args:
        shapes: of all tensors by name, in the first shard.
        num_shards: `model_parallel_size` of the checkpoint, or 0 where nothing says it.

    Raises:
        ValueError: naming the key that no layout has.
    """
    if META.embedding in shapes:
        return META
    name = LLAMA.block.format(0)
    query, key = (shapes.get(f"{name}self_attn.{norm}.weight") for norm in ("q_norm", "k_norm"))
    rows = [shapes.get(f"{name}self_attn.{part}_proj.weight") for part in ("q", "k")]
    if query is None:
        return LLAMA
    if len(query) == 1:
        return ANOLE
    if len(query) == 2 and key is not None and len(key) == 2 and None not in rows:
        heads = tuple(row[0] // query[1] for row in rows if row)
        if (query[0], key[0]) == heads:
            return TRANSFORMERS
        if query[0] == key[0] and num_shards in (0, query[0]):
            return TRANSFORMERS_4_43
    raise ValueError(
        f"{name}self_attn.q_norm.weight has shape {query} and k_norm {key}: in no known layout with {num_shards or 1} "
        f"shards do query and key projections of shape {rows[0]} and {rows[1]} have those"
    )


def check_layout(layout: Layout, found: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a layout that the user names can be that of the checkpoint.

    Raises:
        ValueError: naming the key that shows that it is not.
    """
    if layout is found:
        return
    if (layout is META) != (found is META):
        raise ValueError(
            f"layout {layout.name} has a tensor {layout.embedding}, which the checkpoint has not; its names are those "
            f"of {found.name}"
        )
    key = f"{layout.block.format(0)}self_attn.q_norm.weight"
    shape = shapes.get(key)
    if found is TRANSFORMERS and layout is TRANSFORMERS_4_43 and shape == shapes.get(key.replace("q_norm", "k_norm")):
        return  # as many shards as heads: both layouts say the same
    wanted = {"one": "(head_dim,)", "shard": "(shards, head_dim)", "head": "(heads, head_dim)", "none": "none"}
    raise ValueError(
        f"layout {layout.name} has {key} of shape {wanted[layout.norms]}, and the checkpoint "
        f"{'has it of shape ' + str(shape) if shape else 'does not have it'}: that is layout {found.name}"
    )
