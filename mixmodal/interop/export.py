"""The folder of an exported model: everything that sampling and classification need, without pickle.

config.json  model.safetensors  text_tokenizer.model  image_tokenizer/  README.md
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmodal.document import SequenceFormat, build_format
from mixmodal.files import write_whole
from mixmodal.hub import find_folder
from mixmodal.models.transformer import Transformer, TransformerConfig, load_weights, save_weights
from mixmodal.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mixmodal.tokenization.codec import Codec

CONFIG, WEIGHTS, TEXT_TOKENIZER, IMAGE_TOKENIZER, CARD = (
    "config.json",
    "model.safetensors",
    "text_tokenizer.model",
    "image_tokenizer",
    "README.md",
)
EXPORT_FILES = [CONFIG, "model*.safetensors", TEXT_TOKENIZER, f"{IMAGE_TOKENIZER}/*", CARD]
CARD_SECTIONS = {
    "data": "Training data",
    "attribution": "Attribution",
    "figures": "Figures",
    "limits": "Limits",
}


class ExportError(ValueError):
    """A folder that is not a whole exported model; the message names folder and file."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an exported folder holds.

    Args:
        model: the network, in evaluation mode.
        codec: both tokenizers.
        vocabulary: the id space of the model's rows.
        format: how documents are spelled, with the text tokenizer.
    """

    model: Transformer
    codec: Codec
    vocabulary: Vocabulary
    format: SequenceFormat


def save_export(
    folder: Path | str,
    model: Transformer,
    format: SequenceFormat,
    text_tokenizer: Path | str,
    image_tokenizer: Path | str,
    card: Mapping[str, Any],
) -> None:
    """Writes the folder beside its place and then renames it: what stood there stays in force until all is written.

    Args:
        folder: where the export goes; an export that stands there is replaced.
        format: names the vocabulary and the grids.
        text_tokenizer: file of the sentencepiece model.
        image_tokenizer: folder with the image tokenizer's `config.json` and `model.safetensors`.
        card: `data`, `attribution`, `figures` and `limits` of the model card: text, a list, or a mapping of names to
            values; `title` is optional.

    Raises:
        ExportError: for a tokenizer that is not there or a card with unknown fields.
        OSError: where the disk is full; an older export is untouched then.
    """
    folder = Path(folder).absolute()
    config = {
        "format_version": 1,
        "model": asdict(model.config),
        "vocabulary": format.vocabulary.to_dict(),
        "sequence_format": format.settings,
    }
    text = write_card(card, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        staging.mkdir()
        write_whole(staging / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_whole(staging / CARD, text.encode())
        shutil.copyfile(_existing(Path(text_tokenizer), "text tokenizer"), staging / TEXT_TOKENIZER)
        (staging / IMAGE_TOKENIZER).mkdir()
        for name in (CONFIG, WEIGHTS):  # named files only: nothing else of that folder may slip in
            source = _existing(Path(image_tokenizer) / name, "image tokenizer")
            shutil.copyfile(source, staging / IMAGE_TOKENIZER / name)
        save_weights(model, staging / WEIGHTS)
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; a folder that stood there is put back where that fails, else removed."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = new.with_suffix(".old")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_export(folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Export:
    """Network, tokenizers, vocabulary and format from `folder`.

    Args:
        device: where network and image tokenizer go.
        dtype: of the network's weights; None keeps the stored one.

    Raises:
        ExportError: naming folder and file, for what is missing, broken or of other shapes.
    """
    # here: the bare network needs no tokenizer
    from mixmodal.tokenization.codec import Codec
    from mixmodal.tokenization.image import ImageTokenizer
    from mixmodal.tokenization.text import TextTokenizer

    folder = Path(folder)
    config = _read_config(folder)
    for name in (TEXT_TOKENIZER, IMAGE_TOKENIZER):
        if not (folder / name).exists():
            raise ExportError(f"{folder} is not a whole exported model: {name} is missing")
    model = load_transformer(folder, device, dtype)
    try:
        vocabulary = Vocabulary.from_dict(config["vocabulary"])
        text_tokenizer = TextTokenizer.load(folder / TEXT_TOKENIZER)
        format = build_format(vocabulary=vocabulary, text_tokenizer=text_tokenizer, **config["sequence_format"])
        image_tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER).to(device).eval()
        codec = Codec(text_tokenizer, image_tokenizer, format)
    except KeyError as error:
        raise ExportError(f"{folder / CONFIG}: the key {error} is missing; export the model again") from error
    except (TypeError, ValueError, OSError) as error:
        raise ExportError(f"{folder} can not be loaded: {error}") from error
    if model.config.vocab_size < vocabulary.size:
        raise ExportError(
            f"{folder / CONFIG}: model.vocab_size is {model.config.vocab_size}, the vocabulary {vocabulary.size}"
        )
    return Export(model=model, codec=codec, vocabulary=vocabulary, format=codec.format)


def load_transformer(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The bare network, `(B, T)` tokens to `(B, T, V)` logits; needs `config.json` and `model.safetensors` only.

    Raises:
        ExportError: naming folder and file, for what is missing, broken or of other shapes.
    """
    folder = Path(folder)
    options = _read_config(folder).get("model")
    known = {field.name for field in fields(TransformerConfig)}
    if not isinstance(options, dict) or set(options) - known:
        unknown = sorted(set(options or {}) - known)
        raise ExportError(f"{folder / CONFIG}: section 'model' has unknown keys {unknown}; known are {sorted(known)}")
    try:
        model = Transformer(TransformerConfig(**options))
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG}: section 'model' can not be used: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise ExportError(f"{folder} is not an exported model: {WEIGHTS} is missing")
    try:
        load_weights(model, folder / WEIGHTS)
    except ValueError as error:
        raise ExportError(str(error)) from error
    return model.to(device=device, dtype=dtype).eval()


def find_export(source: Path | str) -> Path:
    """A local folder as it is; else the snapshot of a hub id.

    Raises:
        ExportError: where there is neither.
    """
    try:
        return find_folder(source, EXPORT_FILES, "an exported model")
    except ValueError as error:
        raise ExportError(str(error)) from error


def write_card(card: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The model card in Markdown."""
    unknown = sorted(set(card) - {"title", *CARD_SECTIONS})
    if unknown:
        raise ExportError(f"model card: unknown fields {unknown}; known are title, {', '.join(CARD_SECTIONS)}")
    vocabulary, spelled = config["vocabulary"], config["sequence_format"]
    lines = ["---", "library_name: mixmodal", "---", "", f"# {card.get('title', 'A mixmodal model')}", ""]
    lines += [
        "One decoder-only transformer over text pieces and image codes. Load it with",
        '`mixmodal.MixedModal.from_pretrained("this folder")`.',
        "",
        f"- sequence format: {spelled['name']}, code grids {spelled['grids']}",
        f"- vocabulary: {vocabulary['num_text_pieces']} text pieces, codebooks {vocabulary['codebook_sizes']}",
        f"- network: {', '.join(f'{name} {value}' for name, value in config['model'].items())}",
    ]
    for key, heading in CARD_SECTIONS.items():
        lines += ["", f"## {heading}", "", *_card_lines(card.get(key))]
    return "\n".join(lines) + "\n"


def _card_lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {name}: {one}" for name, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [f"- {one}" for one in value]
    return [str(value) if value else "Not stated."]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the folder of an exported model, such as runs/NAME/export")
    path = folder / CONFIG
    if not path.is_file():
        hint = f"; did you mean {folder / 'export'}?" if (folder / "export" / CONFIG).is_file() else ""
        raise ExportError(f"{folder} is not an exported model: {CONFIG} is missing{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format_version") != 1:
        raise ExportError(f"{path}: format_version is not 1; this version of mixmodal reads 1 only")
    return config


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ExportError(f"export: the {what} is not at {path}")
    return path
