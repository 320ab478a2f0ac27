"""Renders what a quickstart run has drawn as one picture for the README.

python benchmarks/picture.py runs/quickstart docs/quickstart.png

Generated pictures only: the demo pictures themselves are not part of this repository.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS, NUM_CAPTIONS = 3, 4, 6
CELL, SIDE, GAP, MARGIN = (326, 112), 96, 12, 12
HEAD, FOOT = 44, 34
LINE_CHARACTERS, LINE_HEIGHT = 27, 18
COLORS = 128
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
TITLES = (
    (True, "Held-out pairs: the model has seen the concept in the other style only"),
    (False, "Training pairs: the model has seen exactly these"),
)


def render(run: Path, out: Path) -> None:
    """Saves the first prompts of each split beside the pictures drawn for them, in the order of the run."""
    results = json.loads((run / "samples" / "results.json").read_text(encoding="utf-8"))
    captions = {item["label"]["key"]: item["caption"] for item in results["image_to_text"]}
    height = 2 * (HEAD + ROWS * CELL[1]) + FOOT + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * CELL[0] + 2 * MARGIN, height), PAPER)
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for heldout, title in TITLES:
        draw.text((MARGIN, top + 8), title, fill=INK, font=ImageFont.load_default(20))
        items = [item for item in results["text_to_image"] if item["label"]["heldout"] == heldout]
        draw_grid(sheet, draw, run, items[: COLUMNS * ROWS], captions, top + HEAD)
        top += HEAD + ROWS * CELL[1]
    words = "The first prompts of each split, not picked. Grey: what the model writes for the demo picture itself."
    draw.text((MARGIN, top + 8), words, fill=FAINT, font=ImageFont.load_default(14))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(COLORS, dither=Image.Dither.NONE).save(out, optimize=True)


def draw_grid(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    run: Path,
    items: Sequence[Mapping[str, Any]],
    captions: Mapping[str, str],
    top: int,
) -> None:
    """Pictures with the prompt to their right; the first also with the caption that the model wrote."""
    for number, item in enumerate(items):
        row, column = divmod(number, COLUMNS)
        left, upper = MARGIN + column * CELL[0], top + row * CELL[1]
        with Image.open(run / item["image"]) as picture:
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, upper))
        lines = [(line, INK) for line in textwrap.wrap(item["prompt"], LINE_CHARACTERS, max_lines=3)]
        caption = captions.get(item["label"]["key"])
        if caption is not None and number < NUM_CAPTIONS:
            words = f"reads: {caption or '(nothing)'}"
            lines += [(line, FAINT) for line in textwrap.wrap(words, LINE_CHARACTERS, max_lines=2)]
        for place, (line, color) in enumerate(lines):
            at = left + SIDE + GAP, upper + place * LINE_HEIGHT
            draw.text(at, line, fill=color, font=ImageFont.load_default(15))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    render(Path(sys.argv[1]), Path(sys.argv[2]))
