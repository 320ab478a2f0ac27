"""Renders what a quickstart run has drawn as one picture for the README, and what its tuned model has edited.

python benchmarks/picture.py runs/quickstart docs/quickstart.png
python benchmarks/picture.py runs/quickstart docs/finetune.png edits

Generated pictures only: the demo pictures themselves are not part of this repository. Those that are edited are shown
as the image tokenizer redraws them, which is what the model is given.
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
EDITS, EDIT_HEIGHT = ("style", "skin_tone", "gender"), 150
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


def render_edits(run: Path, out: Path) -> None:
    """Saves the first edits of each kind whose result was held out: what was given, what was asked, what was drawn."""
    from mixmodal.tokenization.image import ImageTokenizer
    from mixmodal.tokenization.preprocessing import to_pictures, to_tensor

    tokenizer = ImageTokenizer.load(run / "export" / "image_tokenizer")

    def redraw(file: str) -> Image.Image:
        with Image.open(run / "finetune" / "records" / file) as picture:
            image = to_tensor(picture.convert("RGB"))[None]
        return to_pictures(tokenizer.decode(tokenizer.encode(image)))[0]

    items = json.loads((run / "finetune" / "answers" / "results.json").read_text(encoding="utf-8"))["after"]
    sheet = Image.new("RGB", (COLUMNS * CELL[0] + 2 * MARGIN, HEAD + ROWS * EDIT_HEIGHT + FOOT + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = "Edits whose result the model has never seen: what is given, and what it draws"
    draw.text((MARGIN, MARGIN + 8), title, fill=INK, font=ImageFont.load_default(20))
    for column, task in enumerate(EDITS):
        chosen = [item for item in items if item["task"] == task and item["heldout"] and "image" in item][:ROWS]
        for row, item in enumerate(chosen):
            left, upper = MARGIN + column * CELL[0], MARGIN + HEAD + row * EDIT_HEIGHT
            with Image.open(run / item["image"]) as drawn:
                for place, picture in enumerate((redraw(item["record"]["image1"]), drawn.convert("RGB"))):
                    large = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
                    sheet.paste(large, (left + place * (SIDE + GAP), upper))
            lines = [
                (item["record"]["edit"], INK),
                *((line, FAINT) for line in textwrap.wrap(item["text"], 44, max_lines=1)),
            ]
            for place, (line, color) in enumerate(lines):
                at = left, upper + SIDE + 4 + place * LINE_HEIGHT
                draw.text(at, line, fill=color, font=ImageFont.load_default(15 if place == 0 else 12))
    words = "The first of each kind, not picked. Grey: what the model says that it draws."
    draw.text((MARGIN, sheet.height - FOOT), words, fill=FAINT, font=ImageFont.load_default(14))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(COLORS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["edits"]):
        sys.exit(__doc__)
    (render_edits if sys.argv[3:] else render)(Path(sys.argv[1]), Path(sys.argv[2]))
