"""An exported folder of ours in a layout of the Chameleon family, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmodal.files import naming, write_whole
from mixmodal.interop.chameleon.conversion import count_sets, cut_shard, divisors, expected_shapes, export_tensors
from mixmodal.interop.chameleon.layouts import LAYOUTS, LLAMA, META, TRANSFORMERS, Layout, LayoutName
from mixmodal.interop.chameleon.pictures import describe_vqgan, find_obstacle, in_yaml, to_vqgan
from mixmodal.interop.chameleon.tokens import build_tokenizer_json, vocabulary_map, write_processor
from mixmodal.interop.export import (
    CONFIG,
    IMAGE_TOKENIZER,
    find_text_tokenizer,
    read_format_name,
    read_transformer_config,
    read_vocabulary,
    staged,
)
from mixmodal.models.transformer import TransformerConfig
from mixmodal.records import write_json
from mixmodal.tokenization.image import ImageTokenizer, is_saved
from mixmodal.vocabulary import Vocabulary
from mixmodal.weights import LazyFiles, read_weights, write_weights

FIXED: Mapping[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}
"""What no layout of the family has otherwise."""
INNER = "models/mixmodal"
"""Of an export in Meta's layout: where the weights are; `tokenizer` stands beside `models`, as in Meta's download."""
Tensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What is to be written.

    Args:
        folder: the model of ours.
        config: of the network.
        weights: its tensors, read when they are asked for.
        layout: what it becomes.
        num_sets: QK-norm sets, and shards where the layout has them.
        vocabulary: None for a bare network.
        text_tokenizer: its file; None for a bare network.
        image_tokenizer: where the layout can hold it.
        missing: what the layout can not hold, or ours does not have, in words.
    """

    folder: Path
    config: TransformerConfig
    weights: Mapping[str, Tensor]
    layout: Layout
    num_sets: int
    vocabulary: Vocabulary | None
    text_tokenizer: Path | None
    image_tokenizer: ImageTokenizer | None
    missing: tuple[str, ...]

    def tensors(self, allow_lossy: bool) -> Tensors:
        """Theirs, whole; a tied output is written out."""
        yield from export_tensors(
            self.layout, self.config, self.weights.__getitem__, self.num_sets, allow_lossy=allow_lossy
        )
        if self.config.tie_embeddings:
            yield self.layout.output, self.weights["embedding.weight"].clone()


def gather_export(folder: Path, name: LayoutName | None, num_shards: int = 0) -> Exported:
    """What an exported folder holds for a layout.

    Args:
        name: None takes the one that transformers loads today: Llama's for a network without QK-norm.
        num_shards: of Meta's layout and that of transformers 4.43; 0 takes as few as QK-norms of their own allow.

    Raises:
        ValueError: naming folder and key, for a network that the layout can not hold.
    """
    config = read_transformer_config(folder)
    layout = LAYOUTS[name] if name else (TRANSFORMERS if config.qk_norm else LLAMA)
    check_network(folder, config, layout)
    weights = read_weights(folder)
    check_tensors(folder, config, weights)
    heads = config.attention_sizes["num_kv_heads"]
    if num_shards and (layout.norms != "shard" or heads % num_shards):
        raise ValueError(
            f"num_shards is {num_shards}: layout {layout.name} "
            + (f"can have {', '.join(map(str, divisors(heads)))}" if layout.norms == "shard" else "has none")
        )
    num_sets = num_shards or count_sets(config, weights.__getitem__)
    if layout is META:
        for key in ("vocab_size", "dim", "ffn_dim"):
            if getattr(config, key) % num_sets:
                raise ValueError(
                    f"{folder / CONFIG}: model.{key} {getattr(config, key)} can not be cut into {num_sets} shards, one "
                    "for each set of QK-norms; choose another layout, or --num_shards 1 --allow_lossy true"
                )
    vocabulary = read_vocabulary(folder)
    if vocabulary is None and layout is TRANSFORMERS:
        raise ValueError(
            f"{folder / CONFIG} has no vocabulary, and transformers' Chameleon needs to know which ids are codes; "
            "import the model with its text tokenizer"
        )
    missing, images = [], None
    if is_saved(folder / IMAGE_TOKENIZER):
        images = ImageTokenizer.load(folder / IMAGE_TOKENIZER)
        obstacle = find_obstacle(images.config.autoencoder, images.config.quantizer)
        if obstacle or layout is LLAMA:
            missing.append(f"the image tokenizer: {obstacle or 'a Llama has none'}; use ours beside the export")
            images = None
        elif images.decoder is None or layout is TRANSFORMERS:
            missing.append(f"the picture decoder: {'transformers' if images.decoder else folder} has none")
    else:
        missing.append(f"the image tokenizer: there is none in {folder}")
    text = find_text_tokenizer(folder)
    if not text.is_file():
        text = None
        missing.append(f"the text tokenizer: there is none in {folder}")
    elif vocabulary is None:
        missing.append(f"the text tokenizer: {folder / CONFIG} has no vocabulary")
    spelled = read_format_name(folder)
    if spelled not in (None, "chameleon"):
        missing.append(f"the sequence format {spelled}: their code spells prompts as chameleon does")
    return Exported(
        folder=folder,
        config=config,
        weights=weights,
        layout=layout,
        num_sets=num_sets,
        vocabulary=vocabulary,
        text_tokenizer=text,
        image_tokenizer=images,
        missing=tuple(missing),
    )


def check_network(folder: Path, config: TransformerConfig, layout: Layout) -> None:
    """Whether a layout can hold a network of this shape.

    Raises:
        ValueError: naming the key of the model's config.
    """
    wanted = {**FIXED, "qk_norm": layout.norms != "none"}
    if layout is LLAMA:
        wanted["norm_placement"] = "pre"
    for key, value in wanted.items():
        if getattr(config, key) != value:
            other = "; --to transformers makes a Llama of it" if key == "qk_norm" else ""
            raise ValueError(
                f"{folder / CONFIG}: model.{key} is {getattr(config, key)}, and layout {layout.name} has {value} only"
                + other
            )
    head_dim = config.attention_sizes["head_dim"]
    if layout is not LLAMA and head_dim * config.num_heads != config.dim:
        raise ValueError(
            f"{folder / CONFIG}: {config.num_heads} heads of {head_dim} are not as wide as model.dim {config.dim}, "
            f"which layout {layout.name} needs"
        )


def check_tensors(folder: Path, config: TransformerConfig, weights: LazyFiles) -> None:
    """Whether all tensors of a network are there, in their shapes.

    Raises:
        ValueError: naming the tensor.
    """
    for name, shape in expected_shapes(config).items():
        found = weights.shape(name) if name in weights else None
        if found != shape:
            what = "is missing" if found is None else f"has the shape {found}"
            raise ValueError(f"{folder}: tensor {name} {what}; {CONFIG} says that it has the shape {shape}")


def write_exported(found: Exported, out: Path, *, allow_lossy: bool = False) -> int:
    """Writes the folder; what stands at `out` is replaced once all is written.

    Returns:
        Bytes of the transformer's weights and the picture tokenizer's.

    Raises:
        ValueError: naming the tensor, for QK-norms that the layout can not hold, unless `allow_lossy`.
        OSError: where the disk is full.
    """
    with staged(out) as staging:
        if found.layout is META:
            return write_meta(found, staging, allow_lossy)
        return write_transformers(found, staging, allow_lossy)


def write_transformers(found: Exported, folder: Path, allow_lossy: bool) -> int:
    """A folder for transformers, with its processor where there is a text tokenizer."""

    def tensors() -> Tensors:
        yield from found.tensors(allow_lossy)
        if found.image_tokenizer is not None:
            for name, tensor in to_vqgan(found.image_tokenizer).items():
                if found.layout is not TRANSFORMERS or not name.startswith("decoder."):  # which keeps the encoder only
                    yield f"model.vqmodel.{name}", tensor

    size = write_weights(folder, tensors())
    dtype = str(found.weights["embedding.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", describe_transformers(found, dtype))
    write_json(folder / "generation_config.json", {**special_ids(found), "_from_model_config": False})
    images = _pictures(found)
    if found.text_tokenizer is not None and found.vocabulary is not None and images is not None:
        config = images.config
        num_codes = images.grid[0] * images.grid[1]
        write_processor(folder, found.vocabulary, found.text_tokenizer, config.image_size, num_codes, config.preprocess)
    return size


def describe_transformers(found: Exported, dtype: str) -> dict[str, Any]:
    """The content of transformers' `config.json`, with every key that has a default written out."""
    config, sizes = found.config, found.config.attention_sizes
    shared = {
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **special_ids(found),
    }
    if found.layout is LLAMA:
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": sizes["head_dim"]}
        return {**kind, **shared}
    pictures = describe_vqgan(found.image_tokenizer) if found.image_tokenizer is not None else {}
    if found.layout.name == "anole" and pictures:  # the names of the fork
        pictures = {**pictures, "double_z": pictures["double_latent"], "z_channels": pictures["latent_channels"]}
    name = "ChameleonForCausalLM" if found.layout.name == "anole" else "ChameleonForConditionalGeneration"
    return {
        "model_type": "chameleon",
        "architectures": [name],
        **shared,
        "swin_norm": config.norm_placement == "post_sublayer",
        "model_parallel_size": 1 if found.layout.norms == "one" else found.num_sets,
        "vq_config": pictures or smallest_vqgan(found),
        "vocabulary_map": vocabulary_map(found.vocabulary) if found.vocabulary is not None else None,
    }


def special_ids(found: Exported) -> dict[str, int | None]:
    """Ids of control tokens; none for a bare network, of which nothing says what its ids mean."""
    ids = {name: getattr(Vocabulary, name) if found.vocabulary is not None else None for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": identity for name, identity in ids.items()}


def smallest_vqgan(found: Exported) -> dict[str, Any]:
    """What stands for an image tokenizer that can not be inside: transformers builds one in any case."""
    codes = found.vocabulary.config.codebook_sizes.get("image", 1) if found.vocabulary is not None else 1
    return {
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "embed_dim": 1,
        "num_embeddings": codes,
    }


def _pictures(found: Exported) -> ImageTokenizer | None:
    """The tokenizer whose pictures the processor prepares: ours, inside or not."""
    folder = found.folder / IMAGE_TOKENIZER
    return found.image_tokenizer or (ImageTokenizer.load(folder) if is_saved(folder) else None)


def write_meta(found: Exported, folder: Path, allow_lossy: bool) -> int:
    """`models/mixmodal/consolidated*.pth` with `params.json`, and `tokenizer/`, as Meta's download has them.

    A shard is in memory whole while it is written: torch.save knows no other way.
    """
    import yaml

    inner, beside = folder / INNER, folder / "tokenizer"
    inner.mkdir(parents=True)
    beside.mkdir()
    size, num_shards = 0, found.num_sets
    for rank in range(num_shards):
        shard = {
            name: cut_shard(META, name, tensor, rank, num_shards).clone() for name, tensor in found.tensors(allow_lossy)
        }
        size += sum(tensor.nbytes for tensor in shard.values())
        shard["rope.freqs"] = rope_frequencies(found.config)
        save_pickle(shard, inner / ("consolidated.pth" if num_shards == 1 else f"consolidated.{rank:02}.pth"))
    config, sizes = found.config, found.config.attention_sizes
    model = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": sizes["num_heads"],
        "n_kv_heads": sizes["num_kv_heads"],
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_seq_len,
        "qk_normalization": True,
        "swin_norm": config.norm_placement == "post_sublayer",
        **in_meta_words(config.dim, config.ffn_dim),
    }
    write_json(inner / "params.json", {"model": model})
    write_json(inner / "consolidate_params.json", {"model_parallel_size": num_shards})
    if found.text_tokenizer is not None and found.vocabulary is not None:
        write_json(beside / "text_tokenizer.json", build_tokenizer_json(found.vocabulary, found.text_tokenizer))
    if found.image_tokenizer is not None:
        weights = to_vqgan(found.image_tokenizer)
        save_pickle({"state_dict": weights}, beside / "vqgan.ckpt")
        size += sum(tensor.nbytes for tensor in weights.values())
        write_whole(beside / "vqgan.yaml", yaml.safe_dump(in_yaml(found.image_tokenizer)).encode())
    return size


def save_pickle(content: Mapping[str, Any], path: Path) -> None:
    """Writes one file of torch.save.

    Raises:
        OSError: naming the file, where the disk is full or does not let it be written.
    """
    with naming(path), open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer puts its own error over that of the disk
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Angles of a rotary step, float32 `(head_dim / 2,)`: Meta's loader insists on the tensor and does not use it."""
    head_dim = config.attention_sizes["head_dim"]
    return config.rope_theta ** -(torch.arange(0, head_dim, 2) / head_dim)


def in_meta_words(dim: int, ffn_dim: int) -> dict[str, float]:
    """What Meta's code needs to come to the inner width, beyond its own `256 ceil(8/3 dim / 256)`: nothing for 7B."""
    plain = int(2 * 4 * dim / 3)
    if ffn_dim == 256 * -(-plain // 256):
        return {}
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn_dim + 0.5) / plain}  # it rounds down
