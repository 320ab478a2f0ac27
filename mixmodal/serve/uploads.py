"""What visitors upload and paint: checked, and no larger than the model sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.Image import Image as Picture

from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.preprocessing import open_picture

EDIT_SIDE = 512
"""Pixels of the side at which pictures are painted on: little ones are enlarged to it."""


class Limits(NamedTuple):
    """What one request may ask for.

    Args:
        max_pixels: of an uploaded picture, before it is reduced.
        max_pictures: in one prompt.
        max_text_chars: in one prompt.
        max_num: samples.
        max_retrieve: documents of the memory.
    """

    max_pixels: int = 1 << 25
    max_pictures: int = 4
    max_text_chars: int = 2000
    max_num: int = 4
    max_retrieve: int = 4


def read_prompt(text: str | None, files: Sequence[str], limits: Limits, codec: Codec, *, padded: bool) -> list[Any]:
    """The pictures, then the text: parts of a prompt.

    Pictures are brought to the size that the model's encoder takes, which changes no code of theirs.

    Args:
        files: paths of uploaded pictures.
        codec: of the model.
        padded: whether the prompt is a turn of a conversation: a model that was tuned on such is shown whole pictures.

    Raises:
        ValueError: for an empty prompt, or what is broken or exceeds a limit.
    """
    text = (text or "").strip()
    if not text and not files:
        raise ValueError("the prompt is empty; write a text or add a picture")
    check_text(text, limits)
    if len(files) > limits.max_pictures:
        raise ValueError(f"the prompt has {len(files)} pictures; {limits.max_pictures} are allowed")
    parts: list[Any] = []
    for number, file in enumerate(files, 1):
        opened = open_picture(Path(file).read_bytes(), f"picture {number}", limits.max_pixels)
        parts.append(codec.fit(opened, padded=padded and codec.conversations))
    return [*parts, text] if text else parts


def check_text(text: str, limits: Limits) -> None:
    """Raises:
    ValueError: for a text that is longer than allowed.
    """
    if len(text) > limits.max_text_chars:
        raise ValueError(f"the text has {len(text)} characters; {limits.max_text_chars} are allowed")


def enlarge(picture: Picture, side: int = EDIT_SIDE) -> Picture:
    """A little picture with every pixel as a square of pixels, for painting on; `reduce_exactly` is the inverse."""
    factor = max(1, side // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def reduce_exactly(picture: Picture, size: int) -> Picture:
    """The picture of `size` pixels whose enlargement this is; any other picture as it is."""
    if picture.width == picture.height > size and picture.width % size == 0:
        small = picture.resize((size, size), Image.Resampling.NEAREST)
        if small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
            return small
    return picture


def read_painting(value: Mapping[str, Any] | None, limits: Limits, size: int) -> tuple[Picture, Picture]:
    """The picture under a painting, and its region: mode L of the same size, white where anything is painted.

    Args:
        value: `background` and `layers` as PIL pictures; layers are transparent where nothing is painted.
        size: of the model's pictures, pixels.

    Raises:
        ValueError: where there is no picture, or nothing is painted on it.
    """
    if value is None or value.get("background") is None:
        raise ValueError("there is no picture; add one, then paint over what is to be drawn anew")
    picture = open_picture(value["background"], "the picture", limits.max_pixels)
    region = Image.new("L", picture.size, 0)
    for layer in value.get("layers") or []:
        if layer is not None:
            painted = layer.convert("RGBA").getchannel("A").point([255 * (alpha > 32) for alpha in range(256)])
            fitted = painted if painted.size == picture.size else painted.resize(picture.size, Image.Resampling.NEAREST)
            region.paste(255, mask=fitted)
    if region.getbbox() is None:
        raise ValueError("nothing is painted; paint over what is to be drawn anew")
    reduced = reduce_exactly(picture, size)
    if reduced.size != region.size:  # a pixel is drawn anew where at least a tenth of its square is painted
        region = region.resize(reduced.size, Image.Resampling.BOX).point([255 * (share > 25) for share in range(256)])
    if region.getbbox() is None:
        raise ValueError("too little is painted; paint over what is to be drawn anew")
    return reduced, region
