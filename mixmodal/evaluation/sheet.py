"""A contact sheet: originals above their reconstructions, as one PNG."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixmodal.files import write_whole
from mixmodal.tokenization.preprocessing import to_pictures

MIN_CELL = 96
"""Pixels a side that a picture has at least on the sheet; smaller ones are enlarged by a whole number, not smoothed."""
LABELS = ("original", "decoded")
FONT_SIZE = 14
PICTURES_SHOWN = 16
"""Pictures that a sheet of an evaluation shows."""
MARGIN = 72
"""Pixels left of the rows, for their labels."""


def draw_sheet(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """A picture with a row of originals, the row of their reconstructions right below, and so on.

    Args:
        originals: `(N, 3, H, W)` in [-1, 1].
        reconstructions: of the same shape.
        columns: pictures of a row, at most.

    Raises:
        ValueError: without pictures, or where the shapes differ.
    """
    if originals.shape != reconstructions.shape or not len(originals):
        shapes = f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"contact sheet: pictures of shapes {shapes}; give as many of each, and at least one")
    height, width = originals.shape[-2:]
    factor = max(1, -(-MIN_CELL // min(height, width)))
    height, width = factor * height, factor * width
    columns = min(columns, len(originals))
    bands = -(-len(originals) // columns)
    inner, outer = max(2, height // 48), max(8, height // 12)  # between a pair, and between bands
    band = 2 * height + inner + outer
    size = (MARGIN + columns * (width + inner) - inner + outer, outer + bands * band)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for row, (label, images) in enumerate(zip(LABELS, (originals, reconstructions), strict=True)):
        for number in range(bands):
            middle = outer + number * band + row * (height + inner) + height // 2
            draw.text((MARGIN - 8, middle), label, fill="black", font=font, anchor="rm")
        for number, picture in enumerate(to_pictures(images)):
            left = MARGIN + number % columns * (width + inner)
            top = outer + number // columns * band + row * (height + inner)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return sheet


def save_sheet(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 8) -> None:
    """Write the sheet of `draw_sheet` as PNG; the folder is made where it is missing.

    Raises:
        ValueError: as `draw_sheet`.
        OSError: naming the file, where it can not be written.
    """
    data = io.BytesIO()
    draw_sheet(originals, reconstructions, columns).save(data, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())
