"""A foreign checkpoint as an exported folder of ours, tensor by tensor: no more than a shard is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmodal.document import UNIT_PIXELS, FormatName, SequenceFormat, build_format
from mixmodal.document.lumina import num_reserved
from mixmodal.files import write_whole
from mixmodal.interop.chameleon.beside import find_text_tokenizer, load_image_tokenizer, read_text_tokenizer
from mixmodal.interop.chameleon.checkpoint import Checkpoint
from mixmodal.interop.chameleon.conversion import import_tensors, read_shape
from mixmodal.interop.chameleon.layouts import LLAMA
from mixmodal.interop.export import CARD, CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZERS, describe_model, staged, write_card
from mixmodal.interop.new_rows import add_rows
from mixmodal.models.transformer import TransformerConfig
from mixmodal.records import write_json
from mixmodal.tokenization.control_tokens import ControlTokens, vocabulary_of
from mixmodal.tokenization.preprocessing import Preprocess
from mixmodal.vocabulary import Vocabulary, VocabularyConfig
from mixmodal.weights import say_size, write_weights

if TYPE_CHECKING:
    from mixmodal.tokenization.image import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What was found of a model.

    Args:
        config: the network's.
        text_tokenizer: its file.
        image_tokenizer: with or without a decoder.
        format: None without a text tokenizer, or without pictures to speak of.
        base: whether it is a text model that gets rows for pictures.
        missing: what was not found and what can not be done without, in words.
    """

    config: TransformerConfig
    text_tokenizer: Path | None
    image_tokenizer: ImageTokenizer | None
    format: SequenceFormat | None
    base: bool
    missing: tuple[str, ...]


def gather_parts(
    checkpoint: Checkpoint,
    *,
    text_tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
    image_size: int | None = None,
    preprocess: Preprocess = "meta",
    sequence_format: FormatName = "chameleon",
) -> Parts:
    """All that belongs to a checkpoint, read but for the network's weights.

    Raises:
        ValueError: naming the file, where parts are broken or do not belong together.
        ImportError: where a text tokenizer needs a library that is not installed.
    """
    config = read_shape(checkpoint)
    text = text_tokenizer or find_text_tokenizer(checkpoint)
    images = load_image_tokenizer(checkpoint, image_tokenizer, image_size, preprocess)
    missing = []
    control = None if text is None else read_text_tokenizer(text, config.vocab_size)
    if text is None:
        missing.append("the text tokenizer (tokenizer.json): prompts can not be spelled; give --text_tokenizer")
    if images is None:
        missing.append("the image tokenizer: give --image_tokenizer vqgan.ckpt, or a folder of ours")
    elif images.decoder is None:
        missing.append("the picture decoder: pictures can be read, and none drawn; give --image_tokenizer vqgan.ckpt")
    if text is None or control is None or images is None:
        return Parts(
            config=config, text_tokenizer=text, image_tokenizer=images, format=None, base=False, missing=tuple(missing)
        )
    is_base = not control.num_codes
    if is_base and checkpoint.layout is not LLAMA:
        raise ValueError(
            f"{text} names no image codes (IMGIMG...Z), and {checkpoint.folder} is a Chameleon, whose ids it can not "
            "be of; give the tokenizer of the model"
        )
    per_unit = images.codes_along(UNIT_PIXELS) if sequence_format == "lumina" else None
    if is_base:
        codes = {"image": images.codebook_size}
        reserved = 1 if per_unit is None else num_reserved(images.grid, per_unit)
        vocabulary = Vocabulary(
            VocabularyConfig(num_text_pieces=config.vocab_size, codebook_sizes=codes, num_reserved=reserved)
        )
        config = replace(config, vocab_size=vocabulary.size)
    else:
        vocabulary = Vocabulary(vocabulary_of(control, config.vocab_size))
        check_codes(control, images, text)
    format = build_format(sequence_format, vocabulary, {"image": images.grid}, codes_per_unit=per_unit)
    return Parts(
        config=config, text_tokenizer=text, image_tokenizer=images, format=format, base=is_base, missing=tuple(missing)
    )


def check_codes(control: ControlTokens, images: ImageTokenizer, text: Path) -> None:
    """Whether the picture tokenizer has the codes that the text tokenizer's file names.

    Raises:
        ValueError: where it has not.
    """
    if control.num_codes != images.codebook_size:
        raise ValueError(
            f"{text} names {control.num_codes} codes (IMGIMG...Z), and the image tokenizer has {images.codebook_size}: "
            "they are not of the same model"
        )


def write_model(checkpoint: Checkpoint, parts: Parts, out: Path, seed: int = 0) -> int:
    """Writes the exported folder; what stands at `out` is replaced once all is written.

    Args:
        seed: of the rows that a base model gets.

    Returns:
        Bytes of the network's weights.

    Raises:
        ValueError: naming the tensor that does not fit.
        OSError: where the disk is full.
    """
    config = describe_model(parts.config, parts.format)
    card = {
        "title": f"{checkpoint.folder.absolute().name} in mixmodal's format",
        "data": f"Imported from a checkpoint of layout {checkpoint.layout.name}; its own card says more.",
        "limits": ["Its licence is that of the checkpoint.", *(f"Missing: {one}." for one in parts.missing)],
    }
    with staged(out) as staging:
        size = write_weights(staging, read_tensors(checkpoint, parts, seed))
        write_json(staging / CONFIG, config)
        write_whole(staging / CARD, write_card(card, config).encode())
        if parts.text_tokenizer is not None:
            write_whole(staging / TEXT_TOKENIZERS[".json"], parts.text_tokenizer.read_bytes())
        if parts.image_tokenizer is not None:
            parts.image_tokenizer.save(staging / IMAGE_TOKENIZER)
    return size


def read_tensors(checkpoint: Checkpoint, parts: Parts, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors under our names; those of a base model with rows for what it does not know."""
    tensors = import_tensors(checkpoint, read_shape(checkpoint))
    if not parts.base or parts.format is None:
        yield from tensors
        return
    rows = draw_rows(checkpoint, parts.format.vocabulary, seed)
    for name, tensor in tensors:
        yield name, rows.pop(name, tensor)  # none is kept once it is written


def draw_rows(checkpoint: Checkpoint, vocabulary: Vocabulary, seed: int) -> dict[str, Tensor]:
    """Embedding and output of a base model for the whole vocabulary, by our names; a tied output is not among them."""
    layout = checkpoint.layout
    output = checkpoint.read(layout.output) if layout.output in checkpoint.shapes else None
    generator = torch.Generator().manual_seed(seed)
    rows = add_rows(checkpoint.read(layout.embedding), output, vocabulary, generator, checkpoint.settings.special)
    found = {"embedding.weight": rows.embedding}
    return found if rows.output is None else {**found, "output.weight": rows.output}


def describe_import(checkpoint: Checkpoint, parts: Parts, size: int, out: Path) -> dict[str, str]:
    """What was found, in words."""
    config, sizes = parts.config, parts.config.attention_sizes
    files = f"{len(checkpoint.shards)} shards" if len(checkpoint.shards) > 1 else "one piece"
    found = {
        "layout": f"{checkpoint.layout.name}, in {files}",
        "network": f"{config.num_layers} layers of {config.dim}, {sizes['num_heads']} heads, {sizes['num_kv_heads']} "
        f"for keys and values, norms {config.norm_placement}",
        "weights": say_size(size),
        "vocabulary": f"{config.vocab_size:,} rows",
    }
    if parts.format is not None:
        vocabulary = parts.format.vocabulary.config
        found["vocabulary"] += (
            f": {vocabulary.num_text_pieces:,} text pieces, {vocabulary.codebook_sizes['image']:,} codes"
        )
        found["format"] = f"{parts.format.name}, pictures of {' x '.join(map(str, parts.format.grids['image']))} codes"
    for number, one in enumerate(parts.missing):
        found[f"missing {number + 1}" if len(parts.missing) > 1 else "missing"] = one
    return {**found, "written to": str(out)}
