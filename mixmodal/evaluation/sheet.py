"""Contact sheets: originals above what tokenizers make of them, or pictures with captions, as one PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixmodal.files import write_whole
from mixmodal.tokenization.preprocessing import to_pictures

MIN_CELL = 96
"""Pixels a side that a picture has at least on the sheet; smaller ones are enlarged by a whole number, not smoothed."""
ORIGINAL, DECODED = "original", "decoded"
FONT_SIZE = 14
PICTURES_SHOWN = 16
"""Pictures that a sheet of an evaluation shows."""
MARGIN = 72
"""Pixels left of the rows, for their labels, at least."""
GAP, COLUMNS = 12, 8
LINE_CHARACTERS, LINE_HEIGHT, MAX_LINES = 16, 14, 4
"""Of captions; characters in the width of the smallest cell."""


def draw_sheet(rows: Mapping[str, Tensor], columns: int = 8) -> Image.Image:
    """A picture with a row of the first pictures, the others of the same right below, and so on.

    Args:
        rows: by label, top down: pictures `(N, 3, H, W)` in [-1, 1], all of the same shape.
        columns: pictures of a row, at most.

    Raises:
        ValueError: without pictures, or where the shapes differ.
    """
    shapes = {label: tuple(images.shape) for label, images in rows.items()}
    if len({*shapes.values()}) != 1 or not all(shape[0] for shape in shapes.values()):
        raise ValueError(f"contact sheet: pictures of shapes {shapes}; give as many of each, and at least one")
    count, _, height, width = next(iter(shapes.values()))
    factor = max(1, -(-MIN_CELL // min(height, width)))
    height, width = factor * height, factor * width
    columns = min(columns, count)
    bands = -(-count // columns)
    inner, outer = max(2, height // 48), max(8, height // 12)  # within a band, and between bands
    band = len(rows) * (height + inner) - inner + outer
    font = ImageFont.load_default(FONT_SIZE)
    margin = max(MARGIN, *(int(font.getlength(label)) + 12 for label in rows))
    size = (margin + columns * (width + inner) - inner + outer, outer + bands * band)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        for number in range(bands):
            middle = outer + number * band + row * (height + inner) + height // 2
            draw.text((margin - 8, middle), label, fill="black", font=font, anchor="rm")
        for number, picture in enumerate(to_pictures(images)):
            left = margin + number % columns * (width + inner)
            top = outer + number // columns * band + row * (height + inner)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return sheet


def draw_captioned(captions: Sequence[str], *rows: Sequence[Image.Image]) -> Image.Image:
    """A picture with columns of one picture from each of `rows`, within the size of the first, and their caption."""
    first = rows[0][0]
    factor = max(1, -(-MIN_CELL // first.width))
    width, height = factor * first.width, factor * first.height
    columns = min(COLUMNS, len(captions))
    above = len(rows) * (height + GAP // 2)  # the caption
    band = above + 2 * GAP + MAX_LINES * LINE_HEIGHT
    size = columns * (width + GAP) + GAP, -(-len(captions) // columns) * band + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE_HEIGHT - 3)
    for number, (caption, *pictures) in enumerate(zip(captions, *rows, strict=True)):
        left, top = GAP + number % columns * (width + GAP), GAP + number // columns * band
        for row, picture in enumerate(pictures):
            scale = min(width / picture.width, height / picture.height)  # others may have another shape
            fitted = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
            enlarged = picture.convert("RGB").resize(fitted, Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + row * (height + GAP // 2)))
        characters = max(LINE_CHARACTERS, LINE_CHARACTERS * width // MIN_CELL)
        lines = textwrap.wrap(caption, characters, max_lines=MAX_LINES) or [""]
        for place, line in enumerate(lines):
            draw.text((left, top + above + place * LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def save_sheet(rows: Mapping[str, Tensor], path: Path, columns: int = 8) -> None:
    """Write the sheet of `draw_sheet` as PNG; the folder is made where it is missing.

    Raises:
        ValueError: as `draw_sheet`.
        OSError: naming the file, where it can not be written.
    """
    data = io.BytesIO()
    draw_sheet(rows, columns).save(data, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())
