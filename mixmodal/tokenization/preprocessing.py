"""Picture files to RGB pictures, and pictures to tensors in [-1, 1]: the only image preprocessing there is.

Two projects preprocess pictures for the same Chameleon weights in two ways, which give different codes:

| name | long side | what the encoder sees of a value 0 .. 255 |
|---|---|---|
| `meta` | rounded | value / 127.5 - 1, so -1 .. 1 |
| `transformers` | rounded down | value * 0.0078 - 1, so -1 .. 0.989 |

Images are in [-1, 1] everywhere; the tokenizer itself applies the scale of `transformers` before its encoder.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

Preprocess = Literal["meta", "transformers"]

RESCALE_FACTOR = 0.0078
"""Of `ChameleonImageProcessor` in transformers, where 1 / 127.5 = 0.00784 would be exact."""
MAX_PIXELS = 1 << 26
"""Default cap on the pixels of a picture, 67 million: above it lies what only decompression bombs and maps reach."""
MAX_ASPECT = 8
"""Longer pictures, in short sides, are cropped before resizing, so that resizing can not blow a thin strip up."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""PIL's decoders that are used, JPEG's for MPO too; of the others one starts Ghostscript."""
# What PIL's decoders raise on broken files besides OSError.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class PictureError(ValueError):
    """A picture that can not be used; the message names it."""


def open_picture(source: bytes | Path | Image.Image, key: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture to RGB: the first frame, upright by its EXIF tag, transparency blended onto white.

    Grey, palette, CMYK and 16-bit pictures are converted (without colour profiles).

    Args:
        source: the bytes of a picture file, its path, or a PIL picture.
        key: names the picture in messages.
        max_pixels: cap on width times height, checked against the header before anything is decoded.

    Raises:
        PictureError: where the file is no picture, broken, truncated, too large or of a mode without a defined range.
    """
    with warnings.catch_warnings():
        # PIL warns about oversized and slightly irregular files; the cap here decides on the first, the others decode.
        warnings.simplefilter("ignore")
        picture = _open(source, key)
        try:
            return _decode(picture, key, max_pixels)
        except PictureError:
            if picture is not source:
                picture.close()
            raise


def _open(source: bytes | Path | Image.Image, key: str) -> Image.Image:
    """The picture with its header read and nothing decoded."""
    if isinstance(source, Image.Image):
        return source
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{key}: refused before decoding, too many pixels ({error})") from error
    except FileNotFoundError as error:
        raise PictureError(f"{key}: there is no file {source}") from error
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise PictureError(f"{key}: not a picture that can be read ({', '.join(FORMATS)} are)") from error
    except DECODING_ERRORS as error:
        raise PictureError(f"{key}: not a picture that can be read ({error})") from error


def _decode(picture: Image.Image, key: str, max_pixels: int) -> Image.Image:
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError(f"{key}: {width}x{height} pixels are more than the {max_pixels} of max_pixels")
    if width * height == 0:
        raise PictureError(f"{key}: the picture is empty ({width}x{height})")
    try:
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture), key)
    except PictureError:
        raise
    except DECODING_ERRORS as error:
        raise PictureError(f"{key}: the picture is broken or truncated ({error})") from error


def _to_rgb(picture: Image.Image, key: str) -> Image.Image:
    if picture.mode in SIXTEEN_BIT_MODES:
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(f"{key}: values of mode {picture.mode} lie outside 0 .. 65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode.startswith("F"):
        raise PictureError(f"{key}: floating-point pictures have no defined range; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def resize_and_crop(picture: Image.Image, size: int | tuple[int, int], preprocess: Preprocess = "meta") -> Image.Image:
    """Short side to `size` pixels (Lanczos), then the centre square with offsets rounded down, as Chameleon does it.

    The two names differ in the long side's rounding, and so in pictures that are not square.

    Args:
        size: pixels; width and height give the centre of these sides, of the smallest picture that covers it.
    """
    target = (size, size) if isinstance(size, int) else size
    place = place_cropped(picture.size, target, preprocess)
    left, top, width, height = place.kept
    if (width, height) != picture.size:
        picture = picture.crop((left, top, left + width, top + height))
    if picture.size == target:
        return picture
    left, top = (-side for side in place.offset)
    return picture.resize(place.scaled, Image.Resampling.LANCZOS).crop((left, top, left + target[0], top + target[1]))


def resize_and_pad(picture: Image.Image, size: int | tuple[int, int], preprocess: Preprocess = "meta") -> Image.Image:
    """The whole picture (Lanczos) in the middle of `size` pixels, with white borders, as Chameleon reads prompts.

    Chameleon pads pictures of prompts and crops those of answers (arXiv 2405.09818, section 3.2); it does not say the
    colour. White is also what stands behind transparent pictures. A picture of the very shape is as cropping gives it.

    Args:
        size: pixels of the square, or width and height.
        preprocess: how sides are rounded; never below one pixel.
    """
    target = (size, size) if isinstance(size, int) else size
    place = place_padded(picture.size, target, preprocess)
    resized = picture if picture.size == place.scaled else picture.resize(place.scaled, Image.Resampling.LANCZOS)
    padded = Image.new("RGB", target, "white")
    padded.paste(resized, place.offset)
    return padded


class Placing(NamedTuple):
    """How a picture comes to lie in others sides; all in pixels.

    Args:
        kept: left, top, width and height of what is kept of the picture before it is resized.
        scaled: width and height that this is resized to.
        offset: left and top of that in the target; below 0 where it is cropped.
    """

    kept: tuple[int, int, int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]

    def move(self, box: Sequence[float], target: tuple[int, int]) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of a box in the target, clipped to it; None where nothing of it is left."""
        moved = []
        for side, value in enumerate(box):
            axis = side % 2
            place = (value - self.kept[axis]) * self.scaled[axis] / self.kept[2 + axis] + self.offset[axis]
            moved.append(min(max(place, 0), target[axis]))
        left, top, right, bottom = moved
        return (left, top, right, bottom) if left < right and top < bottom else None


def place_cropped(size: tuple[int, int], target: tuple[int, int], preprocess: Preprocess = "meta") -> Placing:
    """Where `resize_and_crop` puts a picture of width and height `size`."""
    short = min(size)
    width, height = (min(side, MAX_ASPECT * short) for side in size)
    kept = ((size[0] - width) // 2, (size[1] - height) // 2, width, height)
    if (width, height) == target:
        return Placing(kept, target, (0, 0))
    # the side along which the picture has least to spare
    side = 0 if target[0] * height >= target[1] * width else 1
    limit, length = target[side], (width, height)[side]
    scaled = (round(limit / length * width), round(limit / length * height))
    if preprocess == "transformers":
        scaled = (limit * width // length, limit * height // length)
    return Placing(kept, scaled, (-((scaled[0] - target[0]) // 2), -((scaled[1] - target[1]) // 2)))


def place_padded(size: tuple[int, int], target: tuple[int, int], preprocess: Preprocess = "meta") -> Placing:
    """Where `resize_and_pad` puts a picture of width and height `size`."""
    width, height = size
    side = 0 if target[0] * height <= target[1] * width else 1  # along which it touches the border
    limit, length = target[side], size[side]
    exact = (limit * width / length, limit * height / length)
    whole = [max(1, round(value) if preprocess == "meta" else int(value)) for value in exact]
    scaled = (whole[0], whole[1])
    return Placing((0, 0, width, height), scaled, ((target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 `(3, H, W)` in [-1, 1]."""
    import torch

    pixels = np.array(picture.convert("RGB"), dtype=np.float32)  # H W C
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def to_encoder_range(images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Images in [-1, 1] as the encoder sees them."""
    return images if preprocess == "meta" else (images + 1) * (127.5 * RESCALE_FACTOR) - 1


def check_preprocess(preprocess: str, key: str = "preprocess") -> None:
    """Complain about an unknown name.

    Raises:
        ValueError: naming the key.
    """
    if preprocess not in get_args(Preprocess):
        raise ValueError(f"{key} is {preprocess!r}; choose {' or '.join(get_args(Preprocess))}")


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor` for a batch: `(B, 3, H, W)` to RGB pictures; values outside [-1, 1] are clamped."""
    return [Image.fromarray(picture) for picture in to_pixels(images.detach()).permute(0, 2, 3, 1).cpu().numpy()]


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], of any shape, as the uint8 values that a file of them holds; outside values are clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
