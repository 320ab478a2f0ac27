"""The folder of an exported model: everything that sampling and classification need, without pickle.

config.json  model.safetensors (or shards)  text_tokenizer.model (or .json)  image_tokenizer/  README.md
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmodal.document import SequenceFormat, build_format
from mixmodal.files import read_object, write_whole
from mixmodal.hub import HubOptions, find_folder
from mixmodal.interop.card import with_front_matter
from mixmodal.models.transformer import Transformer, TransformerConfig, load_weights, save_weights
from mixmodal.records import write_json
from mixmodal.vocabulary import Vocabulary
from mixmodal.weights import INDEX, SAFETENSORS

if TYPE_CHECKING:
    from mixmodal.tokenization.codec import Codec

CONFIG, WEIGHTS, TEXT_TOKENIZER, IMAGE_TOKENIZER, CARD = (
    "config.json",
    SAFETENSORS,
    "text_tokenizer.model",
    "image_tokenizer",
    "README.md",
)
TEXT_TOKENIZERS = {".model": TEXT_TOKENIZER, ".json": "text_tokenizer.json"}
"""Name of a text tokenizer in the folder by the suffix of its file."""
EXPORT_FILES = [CONFIG, "model*.safetensors", INDEX, *TEXT_TOKENIZERS.values(), f"{IMAGE_TOKENIZER}/*", CARD]
CARD_SECTIONS = {
    "data": "Training data",
    "attribution": "Attribution",
    "figures": "Figures",
    "limits": "Limits",
}
CONVERSATIONS = "conversations"
"""Key of `config.json`: true where the model was tuned on conversations, see `Codec`."""
NOT_STATED = "Not stated."


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
    card: Mapping[str, Any] | str,
    conversations: bool = False,
) -> None:
    """Writes the folder beside its place and then renames it: what stood there stays in force until all is written.

    Args:
        folder: where the export goes; an export that stands there is replaced.
        format: names the vocabulary and the grids.
        text_tokenizer: file of the sentencepiece model, or a `tokenizers` JSON file.
        image_tokenizer: folder with the image tokenizer's `config.json` and `model.safetensors`.
        card: `data`, `attribution`, `figures` and `limits` of the model card: text, a list, or a mapping of names to
            values; `title` is optional. Or a whole card in Markdown, which gets what its front matter lacks.
        conversations: whether the model was tuned on them, see `Codec`.

    Raises:
        ExportError: for a tokenizer that is not there, or a card with unknown fields or a broken front matter.
        OSError: where the disk is full; an older export is untouched then.
    """
    config = describe_model(model.config, format) | ({CONVERSATIONS: True} if conversations else {})
    text, text_tokenizer = finish_card(card, config), Path(text_tokenizer)
    text_name = TEXT_TOKENIZERS.get(text_tokenizer.suffix, TEXT_TOKENIZER)
    with staged(folder) as staging:
        write_json(staging / CONFIG, config)
        write_whole(staging / CARD, text.encode())
        shutil.copyfile(_existing(text_tokenizer, "text tokenizer"), staging / text_name)
        (staging / IMAGE_TOKENIZER).mkdir()
        for name in (CONFIG, WEIGHTS):  # named files only: nothing else of that folder may slip in
            source = _existing(Path(image_tokenizer) / name, "image tokenizer")
            shutil.copyfile(source, staging / IMAGE_TOKENIZER / name)
        save_weights(model, staging / WEIGHTS)


def describe_model(model: TransformerConfig, format: SequenceFormat | None = None) -> dict[str, Any]:
    """The content of `config.json`; without a format that of a bare network."""
    config: dict[str, Any] = {"format_version": 1, "model": asdict(model)}
    if format is not None:
        config |= {"vocabulary": format.vocabulary.to_dict(), "sequence_format": format.settings}
    return config


@contextmanager
def staged(folder: Path | str) -> Iterator[Path]:
    """A new folder beside `folder` to be filled; it takes its place where nothing is raised, and vanishes else."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        staging.mkdir()
        yield staging
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
    from mixmodal.tokenization.text_files import load_text_tokenizer

    folder = Path(folder)
    config = _read_config(folder)
    text_path = find_text_tokenizer(folder)
    for name in (text_path.name, IMAGE_TOKENIZER):
        if not (folder / name).exists():
            network = f"mixmodal.load_transformer('{folder}') gives its network alone"
            raise ExportError(f"{folder} is not a whole exported model: {name} is missing; {network}")
    model = load_transformer(folder, device, dtype)
    try:
        vocabulary = Vocabulary.from_dict(config["vocabulary"])
        text_tokenizer = load_text_tokenizer(text_path, vocabulary.config.num_text_pieces)
        spelled = config["sequence_format"]
        if not isinstance(spelled, dict) or not {"name", "grids"} <= set(spelled):
            raise ExportError(f"{folder / CONFIG}: section 'sequence_format' needs name and grids; it is {spelled!r}")
        format = build_format(vocabulary=vocabulary, text_tokenizer=text_tokenizer, **spelled)
        image_tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER).to(device).eval()
        codec = Codec(text_tokenizer, image_tokenizer, format, conversations=read_conversations(folder))
    except KeyError as error:
        raise ExportError(f"{folder / CONFIG}: the key {error} is missing; export the model again") from error
    except ExportError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise ExportError(f"{folder} can not be loaded: {error}") from error
    if model.config.vocab_size < vocabulary.size:
        raise ExportError(
            f"{folder / CONFIG}: model.vocab_size is {model.config.vocab_size}, the vocabulary {vocabulary.size}"
        )
    return Export(model=model, codec=codec, vocabulary=vocabulary, format=codec.format)


def read_conversations(folder: Path) -> bool:
    """Whether the model in `folder` was tuned on conversations.

    Raises:
        ExportError: where the config is missing or broken.
    """
    found = _read_config(folder).get(CONVERSATIONS, False)
    if not isinstance(found, bool):
        raise ExportError(f"{folder / CONFIG}: {CONVERSATIONS} is {found!r}; it must be true or false")
    return found


def load_transformer(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The bare network, `(B, T)` tokens to `(B, T, V)` logits; needs `config.json` and `model*.safetensors` only.

    Raises:
        ExportError: naming folder and file, for what is missing, broken or of other shapes.
    """
    folder = Path(folder)
    with torch.device("meta"):  # the weights are read in their own type, and none drawn
        model = Transformer(read_transformer_config(folder))
    fill_transformer(model, folder, device, dtype)
    return model.eval()


def read_transformer_config(folder: Path) -> TransformerConfig:
    """The shape of the network in `folder`.

    Raises:
        ExportError: naming folder and file, for what is missing or broken.
    """
    options = _read_config(folder).get("model")
    known = {field.name for field in fields(TransformerConfig)}
    if not isinstance(options, dict) or set(options) - known:
        unknown = sorted(set(options or {}) - known)
        raise ExportError(f"{folder / CONFIG}: section 'model' has unknown keys {unknown}; known are {sorted(known)}")
    for field in fields(TransformerConfig):
        kind, value = type(field.default), options.get(field.name, field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ExportError(f"{folder / CONFIG}: model.{field.name} is {value!r}; {kind.__name__} is needed")
    try:
        config = TransformerConfig(**options)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG}: section 'model' can not be used: {error}") from error
    if config.vocab_size < 1:
        raise ExportError(f"{folder / CONFIG}: section 'model' can not be used: vocab_size is {config.vocab_size}")
    return config


def find_text_tokenizer(folder: Path) -> Path:
    """The text tokenizer's file of an exported folder; where there is none, the name that it commonly has."""
    found = [folder / name for name in TEXT_TOKENIZERS.values() if (folder / name).is_file()]
    return found[0] if found else folder / TEXT_TOKENIZER


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary that a folder names; None for a bare network.

    Raises:
        ExportError: naming folder and file, where it is broken.
    """
    named = _read_config(folder).get("vocabulary")
    try:
        return None if named is None else Vocabulary.from_dict(named)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG}: section 'vocabulary' can not be used: {error}") from error


def read_format_name(folder: Path) -> str | None:
    """The sequence format that a folder names; None for a bare network."""
    spelled = _read_config(folder).get("sequence_format")
    return spelled.get("name") if isinstance(spelled, dict) else None


def fill_transformer(
    model: Transformer, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Puts the weights of `folder` into a network of its shape, which may be on the meta device.

    Args:
        device: where they go.
        dtype: of them; None keeps the stored one.

    Raises:
        ExportError: naming folder and file, for what is missing, broken or of other shapes, or NaN in a vector.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ExportError(f"{folder} is not an exported model: {WEIGHTS} is missing")
    try:
        load_weights(model, folder, device, dtype)
    except ValueError as error:
        raise ExportError(str(error)) from error
    for name, vector in model.named_parameters():
        if vector.dim() == 1 and not vector.isfinite().all():  # a training that diverges spoils these with all others
            raise ExportError(f"{folder}: {name} holds values that are not finite; the training has diverged")


def is_export(folder: Path) -> bool:
    """Whether a folder has the config of an exported model."""
    try:
        return "model" in _read_config(folder)  # an image tokenizer's config has other keys
    except ExportError:
        return False


def find_export(source: Path | str, options: HubOptions | None = None) -> Path:
    """A local folder as it is; else the snapshot of a hub id, fetched with `options`.

    Raises:
        ExportError: where there is neither, or an option can not act.
    """
    try:
        return find_folder(source, EXPORT_FILES, "an exported model", options)
    except ValueError as error:
        raise ExportError(str(error)) from error


def write_card(card: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The model card in Markdown."""
    unknown = sorted(set(card) - {"title", *CARD_SECTIONS})
    if unknown:
        raise ExportError(f"model card: unknown fields {unknown}; known are title, {', '.join(CARD_SECTIONS)}")
    vocabulary, spelled = config.get("vocabulary"), config.get("sequence_format")
    lines = [f"# {card.get('title', 'A mixmodal model')}", ""]
    if vocabulary and spelled:
        lines += [
            "One decoder-only transformer over text pieces and image codes. Load it with",
            '`mixmodal.MixedModal.from_pretrained("this folder")`.',
            "",
            f"- sequence format: {spelled['name']}, code grids {spelled['grids']}",
            f"- vocabulary: {vocabulary['num_text_pieces']} text pieces, codebooks {vocabulary['codebook_sizes']}",
        ]
    else:
        lines += ["A decoder-only transformer without its tokenizers. Load it with", "`mixmodal.load_transformer`.", ""]
    lines.append(f"- network: {', '.join(f'{name} {value}' for name, value in config['model'].items())}")
    for key, heading in CARD_SECTIONS.items():
        lines += ["", f"## {heading}", "", *_card_lines(card.get(key))]
    return with_front_matter("\n".join(lines) + "\n")


def finish_card(card: Mapping[str, Any] | str, config: Mapping[str, Any]) -> str:
    """`write_card`, or a card that is written already with what its front matter lacks."""
    if not isinstance(card, str):
        return write_card(card, config)
    try:
        return with_front_matter(card)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _card_lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {name}: {one}" for name, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [f"- {one}" for one in value]
    return [str(value) if value else NOT_STATED]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the folder of an exported model, such as runs/NAME/export")
    path = folder / CONFIG
    if not path.is_file():
        hint = f"; did you mean {folder / 'export'}?" if (folder / "export" / CONFIG).is_file() else ""
        raise ExportError(f"{folder} is not an exported model: {CONFIG} is missing{hint}")
    try:
        config = read_object(path)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if config.get("format_version") != 1:
        raise ExportError(f"{path}: format_version is not 1; this version of mixmodal reads 1 only")
    return config


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ExportError(f"export: the {what} is not at {path}")
    return path
