"""Draws docs/retrieval.png: held-out captions, documents found for them, what is drawn without and with these."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

ROWS = 8
SIDE, CELL, MARGIN = 96, (150, 126), 14
WORDS = 210
HEAD, FOOT = 50, 66
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
COLORS = 200
FOOTNOTE = (
    "The first held-out pairs, not picked: the concept was never seen in this style. Greedy, first seed.\n"
    "Documents are shown as the image tokenizer redraws them, after Twemoji (Twitter, Inc. and others, CC-BY 4.0)\n"
    "and OpenMoji (CC BY-SA 4.0)."
)


class Row(NamedTuple):
    """One caption, the pictures and captions found for it, nearest first, and pictures drawn by number of documents."""

    caption: str
    found: Sequence[tuple[Image.Image, str]]
    drawn: Mapping[int, Image.Image]


def draw_sheet(rows: Sequence[Row], out: Path) -> None:
    """Saves the first rows as one PNG."""
    rows = rows[:ROWS]
    num_found = max(len(row.found) for row in rows)
    counts = sorted(rows[0].drawn)
    titles = ["prompt", *(f"found {place}" for place in range(1, num_found + 1))]
    titles += ["without" if not count else f"with {count} documents" for count in counts]
    lefts = [MARGIN, *(MARGIN + WORDS + place * CELL[0] for place in range(num_found + len(counts)))]
    size = (lefts[-1] + CELL[0] + MARGIN, HEAD + ROWS * CELL[1] + FOOT)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left, MARGIN), title, fill=INK, font=ImageFont.load_default(17))
    for number, row in enumerate(rows):
        top = HEAD + number * CELL[1]
        _write(pen, (lefts[0], top), row.caption, 24, INK, 15)
        for left, (picture, caption) in zip(lefts[1:], row.found):
            _paste(sheet, picture, (left, top))
            _write(pen, (left, top + SIDE + 2), caption, 25, FAINT, 10, most=2)
        for left, count in zip(lefts[1 + num_found :], counts):
            _paste(sheet, row.drawn[count], (left, top))
    pen.multiline_text((MARGIN, size[1] - FOOT + 12), FOOTNOTE, fill=FAINT, font=ImageFont.load_default(12))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(COLORS, dither=Image.Dither.NONE).save(out, optimize=True)


def _paste(sheet: Image.Image, picture: Image.Image, at: tuple[int, int]) -> None:
    sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), at)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, fill: Any, size: int, most: int = 5
) -> None:
    for place, line in enumerate(textwrap.wrap(text, width, max_lines=most, placeholder=" ...")):
        pen.text((at[0], at[1] + place * (size + 3)), line, fill=fill, font=ImageFont.load_default(size))
