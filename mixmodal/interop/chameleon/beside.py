"""What belongs to a foreign checkpoint beside its transformer: the text tokenizer's file and the image tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mixmodal.files import read_object
from mixmodal.interop.chameleon.checkpoint import Checkpoint
from mixmodal.interop.chameleon.layouts import META
from mixmodal.interop.chameleon.settings import CONFIG
from mixmodal.tokenization.preprocessing import Preprocess

if TYPE_CHECKING:
    from mixmodal.tokenization.image import ImageTokenizer

TEXT_FILES = ("tokenizer.json", "text_tokenizer.json", "tokenizer/text_tokenizer.json", "tokenizer.model")
VQGAN, VQGAN_CONFIG = "vqgan.ckpt", "vqgan.yaml"
DEFAULT_RESOLUTION = 512
"""Of `ChameleonVQVAEConfig` in transformers, whose files leave defaults out."""


def places(checkpoint: Checkpoint) -> Iterator[Path]:
    """Folders to look in: the checkpoint's, and for `models/NAME` of Meta's download the one above both."""
    yield checkpoint.folder
    if checkpoint.layout is META and checkpoint.folder.parent.name == "models":
        yield checkpoint.folder.parent.parent


def find_text_tokenizer(checkpoint: Checkpoint) -> Path | None:
    """The file of the text tokenizer; None where there is none."""
    files = (place / name for place in places(checkpoint) for name in TEXT_FILES)
    return next((path for path in files if path.is_file()), None)


def find_image_tokenizer(checkpoint: Checkpoint) -> Path | None:
    """Where the picture tokenizer's weights are: Meta's file, or the checkpoint itself; None where there are none."""
    for place in places(checkpoint):
        for path in (place / VQGAN, place / "tokenizer" / VQGAN):
            if path.is_file():
                return path
    inside = any(name.startswith("model.vqmodel.") for name in checkpoint.shapes)
    return checkpoint.folder if inside else None


def read_image_size(checkpoint: Checkpoint, weights: Path) -> int:
    """Height and width of pictures, pixels, which no weights show, from the file beside them.

    Raises:
        ValueError: naming the file that does not say it.
    """
    beside = weights.with_name(VQGAN_CONFIG)
    if weights.suffix == ".ckpt" and beside.is_file():
        try:
            size: Any = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]["ddconfig"]["resolution"]
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{beside} does not say model.params.ddconfig.resolution; give --image_size") from error
    elif (checkpoint.folder / CONFIG).is_file():
        beside = checkpoint.folder / CONFIG
        size = (read_object(beside).get("vq_config") or {}).get("resolution", DEFAULT_RESOLUTION)
    else:
        raise ValueError(f"{beside} is missing, and no weights show the size of pictures; give --image_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{beside}: resolution is {size!r}; pixels are needed")
    return size


def load_image_tokenizer(
    checkpoint: Checkpoint, source: Path | None, image_size: int | None, preprocess: Preprocess
) -> ImageTokenizer | None:
    """The picture tokenizer, with its decoder where there is one; None where there is none.

    Args:
        source: what the user gives: a folder of ours, or a file or folder of the VQGAN family; None looks beside the
            checkpoint, and then in it.
        image_size: pixels; None reads it beside the weights.

    Raises:
        ValueError: naming the file, for one that can not be read or does not say the size.
    """
    from mixmodal.interop.vqgan import load_vqgan
    from mixmodal.tokenization.image import ImageTokenizer, is_saved

    if source is not None and is_saved(source):
        return ImageTokenizer.load(source)
    given = source is not None
    source = source or find_image_tokenizer(checkpoint)
    if source is None:
        return None
    size = image_size or read_image_size(checkpoint, source)
    return load_vqgan(source, size, preprocess=preprocess, encoder_only=not given).tokenizer
