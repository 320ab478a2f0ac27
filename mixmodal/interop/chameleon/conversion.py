"""Tensors of a foreign layout to ours and back, bit for bit: names, fused matrices, order of rows, sets of QK-norm.

Ours has rotary pairs half a head apart, as transformers has them (arXiv 2104.09864 has them adjacent, as Meta's files
do), and a QK-norm for every head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mixmodal.interop.chameleon.checkpoint import Checkpoint, average, is_norm_of_heads
from mixmodal.interop.chameleon.layouts import K_NORM, Q_NORM, QKV, UP, Layout
from mixmodal.interop.chameleon.settings import CONFIG
from mixmodal.models.transformer import TransformerConfig
from mixmodal.weights import list_names


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows `(heads * head_dim, ...)` with adjacent rotary pairs to rows with the pairs half a head apart."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def read_shape(checkpoint: Checkpoint) -> TransformerConfig:
    """The network's config from the shapes of its tensors and the settings beside them.

    Raises:
        ValueError: naming the tensor that is missing, unknown or of an impossible shape.
    """
    layout, shapes, settings = checkpoint.layout, checkpoint.shapes, checkpoint.settings
    name = layout.block.format(0)
    num_layers = 0
    while any(key.startswith(layout.block.format(num_layers)) for key in shapes):
        num_layers += 1
    if not num_layers:
        raise ValueError(f"{checkpoint.folder}: there is no tensor whose name begins with {name}")
    check_names(layout, shapes, num_layers, has_output=layout.output in shapes or not settings.tied)
    vocab_size, dim = shapes[layout.embedding]
    query, key, _ = (shapes[name + part][0] for part in layout.parts[QKV])
    if layout.norms == "none":
        heads = settings.sizes.get("num_heads", 0)
        head_dim = settings.sizes.get("head_dim") or (query // heads if heads else 0)
    else:
        head_dim = shapes[name + layout.parts[f"{Q_NORM}.weight"][0]][-1]
    if not head_dim:
        raise ValueError(
            f"{checkpoint.folder / CONFIG} is missing, or has no num_attention_heads: weights without QK-norms do "
            "not show how many heads there are; put the file beside them"
        )
    if query % head_dim or key % head_dim or head_dim % 2:
        raise ValueError(
            f"{checkpoint.folder}: {query} rows of queries and {key} of keys do not make heads of width {head_dim}"
        )
    config = TransformerConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=query // head_dim,
        num_kv_heads=0 if key == query else key // head_dim,
        head_dim=0 if query == dim else head_dim,
        ffn_dim=shapes[name + layout.parts[UP][0]][0],
        max_seq_len=settings.max_seq_len,
        norm_eps=settings.norm_eps,
        norm_placement=settings.norm_placement or "pre",
        rope_theta=settings.rope_theta,
        qk_norm=layout.norms != "none",
        tie_embeddings=layout.output not in shapes,
    )
    settings.check(config)
    return config


def check_names(layout: Layout, shapes: Mapping[str, tuple[int, ...]], num_layers: int, *, has_output: bool) -> None:
    """Whether the tensors are those of the layout, with an output of its own or without.

    Raises:
        ValueError: listing what is missing and what is unknown, or naming one that is no matrix or vector as it should.
    """
    wanted = {name for _, theirs in layout.names(num_layers, has_output) for name in theirs}
    kinds = {
        "missing": sorted(wanted - set(shapes)),
        "unknown": sorted(name for name in set(shapes) - wanted if not layout.skipped.fullmatch(name)),
    }
    for name in wanted & set(shapes):
        dimensions = (1, 2) if is_norm_of_heads(name) else (1,) if name.endswith("norm.weight") else (2,)
        if len(shapes[name]) not in dimensions or 0 in shapes[name]:
            raise ValueError(
                f"{name} has shape {shapes[name]}; {' or '.join(map(str, dimensions))} dimensions are needed"
            )
    if any(kinds.values()):
        raise ValueError(f"not a whole transformer of layout {layout.name}: {list_names(kinds)}")


def import_tensors(checkpoint: Checkpoint, config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, in the stored type, one after another.

    Raises:
        ValueError: naming the tensor, for a shape that does not fit the others, or values that are no floats of at
            least 16 bits.
    """
    sizes, layout = config.attention_sizes, checkpoint.layout
    head_dim = sizes["head_dim"]
    heads = {Q_NORM: sizes["num_heads"], K_NORM: sizes["num_kv_heads"]}
    wanted = expected_shapes(config)
    for own, theirs in layout.names(config.num_layers, not config.tie_embeddings):
        parts = [checkpoint.read(name) for name in theirs]
        _, _, part = own.split(".", 2) if own.startswith("blocks.") else ("", "", own)
        if layout.adjacent_pairs and part == QKV:
            parts = [to_halves(parts[0], head_dim), to_halves(parts[1], head_dim), parts[2]]
        norm = part.rpartition(".")[0]
        if norm in heads:
            parts = [spread_norm(parts[0], theirs[0], heads[norm], head_dim, layout)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tuple(tensor.shape) != wanted[own] or not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(
                f"{checkpoint.folder}: {' and '.join(theirs)} have shape {[tuple(one.shape) for one in parts]} of "
                f"{tensor.dtype}, where {wanted[own]} in all are needed"
            )
        yield own, tensor


def spread_norm(sets: Tensor, name: str, num_heads: int, head_dim: int, layout: Layout) -> Tensor:
    """QK-norm sets, `(sets, head_dim)` or `(head_dim,)`, to one for every head, `(num_heads, head_dim)`."""
    sets = sets.reshape(-1, sets.shape[-1])
    if num_heads % len(sets) or sets.shape[-1] != head_dim:
        raise ValueError(f"{name} has shape {tuple(sets.shape)}, which {num_heads} heads of {head_dim} can not share")
    if layout.adjacent_pairs:
        sets = to_halves(sets.T, head_dim).T
    return sets.repeat_interleave(num_heads // len(sets), dim=0)


def expected_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors by name."""
    from mixmodal.models.transformer import Transformer

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


Read = Callable[[str], Tensor]
"""Our tensor by its name."""


def export_tensors(
    layout: Layout, config: TransformerConfig, read: Read, num_sets: int, *, allow_lossy: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, whole: the inverse of `import_tensors`.

    Args:
        num_sets: QK-norm sets to store, for layouts with one for each shard.
        allow_lossy: average what does not fit into so many sets.

    Raises:
        ValueError: naming our tensor, where QK-norms of heads differ that the layout has one set for.
    """
    sizes = config.attention_sizes
    head_dim = sizes["head_dim"]
    rows = {
        QKV: [sizes[name] * head_dim for name in ("num_heads", "num_kv_heads", "num_kv_heads")],
        UP: [config.ffn_dim, config.ffn_dim],
    }
    for own, theirs in layout.names(config.num_layers, not config.tie_embeddings):
        tensor = read(own)
        _, _, part = own.split(".", 2) if own.startswith("blocks.") else ("", "", own)
        parts = list(tensor.split(rows[part])) if part in rows else [tensor]
        if layout.adjacent_pairs and part == QKV:
            parts = [to_pairs(parts[0], head_dim), to_pairs(parts[1], head_dim), parts[2]]
        if part.rpartition(".")[0] in (Q_NORM, K_NORM):
            parts = [gather_norm(tensor, own, num_sets, layout, allow_lossy)]
        yield from zip(theirs, parts, strict=True)


def gather_norm(norms: Tensor, name: str, num_sets: int, layout: Layout, allow_lossy: bool) -> Tensor:
    """A norm for every head `(heads, head_dim)` to the sets that the layout stores."""
    if layout.norms == "head":
        return norms
    num_sets = 1 if layout.norms == "one" else num_sets
    groups = norms.unflatten(0, (num_sets, -1))
    if not allow_lossy and not (groups == groups[:, :1]).all():
        raise ValueError(
            f"{name}: heads have QK-norms of their own, and layout {layout.name} stores {num_sets}; averaging them "
            "loses what tells them apart. Export to another layout, or with --allow_lossy true"
        )
    sets = torch.stack([average(list(group)) for group in groups])
    if layout.adjacent_pairs:
        sets = to_pairs(sets.T, norms.shape[1]).T.contiguous()
    return sets[0] if layout.norms == "one" else sets


def count_sets(config: TransformerConfig, read: Read) -> int:
    """The fewest QK-norm sets that hold every head's norm in every layer, as shards do; heads share them in order."""
    if not config.qk_norm:
        return 1
    names = [
        f"blocks.{n}.{norm}.{part}"
        for n in range(config.num_layers)
        for norm in (Q_NORM, K_NORM)
        for part in ("weight", "bias")
    ]
    norms = [read(name) for name in names]
    return next(number for number in divisors(config.attention_sizes["num_kv_heads"]) if _share(norms, number))


def divisors(number: int) -> Sequence[int]:
    """In rising order."""
    return [one for one in range(1, number + 1) if number % one == 0]


def _share(norms: Sequence[Tensor], number: int) -> bool:
    grouped = [norm.unflatten(0, (number, -1)) for norm in norms]
    return number == min(map(len, norms)) or all(bool((group == group[:, :1]).all()) for group in grouped)


def cut_shard(layout: Layout, name: str, tensor: Tensor, rank: int, num_shards: int) -> Tensor:
    """The part of one of their tensors that a shard holds; QK-norm sets `(shards, head_dim)` give one each."""
    dimension = layout.cut(name)
    if dimension is not None:
        return tensor.chunk(num_shards, dim=dimension)[rank].contiguous()
    if ".q_normalization." in name or ".k_normalization." in name:
        return tensor[rank].contiguous()
    return tensor
