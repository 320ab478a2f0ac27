"""Figures of an evaluation as PNG files: who is taken for whom, and how far confidence can be relied on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mixmodal.classification.calibration import Reliability
from mixmodal.files import replacing

INK, FAINT, PAPER, BAR = (20, 20, 20), (205, 205, 205), (255, 255, 255), (27, 98, 174)
MARGIN, FONT_SIZE, SIDE = 12, 13, 320
MAX_SIDE, MAX_CELL, MIN_LABELLED = 1200, 44, 14
"""Pixels: of a confusion picture at most, of a cell at most, and of a cell that has a label at least."""
LABEL_CHARACTERS = 24


def draw_confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """A square of counts `(K, K)`, darker where a row (the label) has a larger share of its pictures there.

    With many classes cells are small, and without labels and numbers.
    """
    cell = min(MAX_CELL, max(1, MAX_SIDE // len(labels)))
    font = ImageFont.load_default(FONT_SIZE)
    names = [name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 3]}..." for name in labels]
    room = max(int(font.getlength(name)) for name in names) + 8 if cell >= MIN_LABELLED else 0
    left, top, side = MARGIN + FONT_SIZE + 8 + room, MARGIN + FONT_SIZE + 8 + room, cell * len(labels)
    sheet = Image.new("RGB", (max(left + side + MARGIN, 200), top + side + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colors = np.array(PAPER) + shares[..., None] * (np.array(BAR) - np.array(PAPER))
    square = Image.fromarray(colors.round().astype(np.uint8))
    sheet.paste(square.resize((side, side), Image.Resampling.NEAREST), (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=FAINT)
    draw.text((left + side / 2, MARGIN), "taken for", fill=INK, font=font, anchor="mt")
    _draw_sideways(sheet, "label", (MARGIN, top + side // 2), font, middle=True)
    if room:
        for place, name in enumerate(names):
            middle = place * cell + cell // 2
            draw.text((left - 5, top + middle), name, fill=INK, font=font, anchor="rm")
            _draw_sideways(sheet, name, (left + middle - FONT_SIZE // 2, top - 5), font)
        for row, column in zip(*np.nonzero(counts)):
            text, color = str(counts[row, column]), PAPER if shares[row, column] > 0.5 else INK
            if font.getlength(text) + 2 <= cell:
                at = left + column * cell + cell // 2, top + row * cell + cell // 2
                draw.text(at, text, fill=color, font=font, anchor="mm")
    save(sheet, path)


def draw_reliability(found: Reliability, title: str, path: Path) -> None:
    """Accuracy over confidence in bins of it, the diagonal where they agree, and below it how many pictures."""
    counts, confidences, accuracies = found
    font, left, top, foot = ImageFont.load_default(FONT_SIZE), 52, MARGIN + FONT_SIZE + 14, 60
    sheet = Image.new("RGB", (left + SIDE + 24, top + SIDE + foot + 52), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((left, MARGIN), title, fill=INK, font=font, anchor="lt")

    def place(x: float, y: float) -> tuple[float, float]:
        return left + SIDE * x, top + SIDE * (1 - y)

    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.line([place(0, tick), place(1, tick)], fill=FAINT)
        draw.text((left - 6, place(0, tick)[1]), f"{tick:g}", fill=INK, font=font, anchor="rm")
        draw.text((place(tick, 0)[0], top + SIDE + foot + 8), f"{tick:g}", fill=INK, font=font, anchor="mt")
    width, base, highest = SIDE / len(counts), top + SIDE + foot, max(int(counts.max()), 1)
    for number, count in enumerate(counts):
        if count:
            start, end = left + number * width + 1, left + (number + 1) * width - 1
            draw.rectangle((start, base - (foot - 12) * count / highest, end, base), fill=FAINT)
            draw.rectangle((start, place(0, accuracies[number])[1], end, top + SIDE), fill=BAR)
            x, y = place(float(confidences[number]), float(accuracies[number]))
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=PAPER, outline=INK)
    draw.line([place(0, 0), place(1, 1)], fill=INK)
    draw.text((left + SIDE / 2, base + 26), "confidence (grey: pictures)", fill=INK, font=font, anchor="mt")
    _draw_sideways(sheet, "accuracy", (MARGIN - 6, top + SIDE // 2), font, middle=True)
    save(sheet, path)


def save(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG file at once; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        sheet.save(part, "png", optimize=True)


def _draw_sideways(
    sheet: Image.Image,
    text: str,
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    *,
    middle: bool = False,
) -> None:
    """Text that runs upwards from `at`, or around it."""
    width = int(font.getlength(text)) + 2
    strip = Image.new("RGB", (width, FONT_SIZE + 4), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, fill=INK, font=font)
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (at[0], at[1] - (width // 2 if middle else width)))
