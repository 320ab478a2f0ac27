"""Curves over steps as one PNG: a panel for each quantity, a colour for each arm, a line for each seed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mixmodal.files import write_whole

PANEL, GAP, LEFT, HEAD, FOOT = (420, 240), 26, 58, 30, 26
ENTRY = 24
SCALE = 2
"""Drawn so many times larger and then shrunk, which smooths the lines."""
INK, FAINT, PAPER = (20, 20, 20), (205, 205, 205), (255, 255, 255)
COLORS = ((27, 98, 174), (214, 84, 32), (40, 140, 70), (130, 70, 170), (230, 180, 0), (225, 50, 140), (70, 70, 70))

Series = Sequence[tuple[float, float]]
"""Steps and values; what is not finite ends the line with a cross."""


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[Series]]], path: Path, columns: int = 2, logarithmic: bool = True
) -> None:
    """Writes the picture.

    Args:
        panels: by title, the series of each arm; arms stand in one order in all panels.
        path: PNG to write.
        columns: panels side by side.
        logarithmic: whether values have a logarithmic axis; then those that are not above 0 are left out.
    """
    arms = list(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    rows = -(-len(panels) // columns)
    cell = (LEFT + PANEL[0] + GAP, HEAD + PANEL[1] + FOOT)
    size = columns * cell[0], rows * cell[1] + ENTRY * -(-len(arms) // columns) + GAP
    sheet = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), PAPER)
    pencil = ImageDraw.Draw(sheet)
    for number, (title, series) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        _draw_panel(pencil, (column * cell[0] + LEFT, row * cell[1] + HEAD), title, series, arms, logarithmic)
    for number, arm in enumerate(arms):
        row, column = divmod(number, columns)
        left, middle = column * cell[0] + LEFT, rows * cell[1] + row * ENTRY + ENTRY // 2
        _line(pencil, [(left, middle), (left + 36, middle)], COLORS[number % len(COLORS)], 4)
        _text(pencil, (left + 46, middle), arm, "lm")
    data = io.BytesIO()
    sheet.resize(size, Image.Resampling.LANCZOS).quantize(
        256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(data, "png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())


def _draw_panel(
    pencil: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    series: Mapping[str, Sequence[Series]],
    arms: Sequence[str],
    logarithmic: bool,
) -> None:
    left, top = corner
    width, height = PANEL
    _text(pencil, (left, top - 10), title, "ls")
    lines = {arm: [_finite(one, logarithmic) for one in found] for arm, found in series.items()}
    points = [point for found in lines.values() for one, _ in found for point in one]
    if not points:
        return
    last = max(step for step, _ in points) or 1
    ticks = axis(min(value for _, value in points), max(value for _, value in points), logarithmic)
    scale = math.log if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        return left + width * step / last, top + height * (high - scale(value)) / (high - low)

    for tick in ticks:
        y = place(0, tick)[1]
        _line(pencil, [(left, y), (left + width, y)], FAINT, 1)
        _text(pencil, (left - 6, y), f"{tick:g}", "rm")
    for step in (0, last):
        _text(pencil, (place(step, ticks[0])[0], top + height + 6), f"{step:g}", "mt")
    for arm, found in lines.items():
        color = COLORS[arms.index(arm) % len(COLORS)]
        for one, is_broken in found:
            places = [place(*point) for point in one]
            _line(pencil, places, color, 3)
            if is_broken and places:
                x, y = places[-1]
                _line(pencil, [(x - 5, y - 5), (x + 5, y + 5)], color, 3)
                _line(pencil, [(x - 5, y + 5), (x + 5, y - 5)], color, 3)


def _finite(series: Series, logarithmic: bool) -> tuple[list[tuple[float, float]], bool]:
    """The points up to the first that is not finite, and whether there is one."""
    points: list[tuple[float, float]] = []
    for step, value in series:
        if not math.isfinite(value):
            return points, True
        if value > 0 or not logarithmic:
            points.append((step, value))
    return points, False


def axis(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers from at most `low` to at least `high`, two or more."""
    if logarithmic:
        steps = [factor * 10.0**power for power in range(-12, 16) for factor in (1, 2, 5)]
        first = max(step for step in steps if step <= low)
        end = min(step for step in steps if step >= high and step > first)
        found = [step for step in steps if first <= step <= end]
        tens = [step for step in found if f"{step:e}"[0] == "1"]
        return found if len(found) <= 7 else sorted({first, *tens[:: -(-len(tens) // 6)], end})
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, which lies in the middle
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _line(
    pencil: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], color: tuple[int, int, int], width: int
) -> None:
    pencil.line([(SCALE * x, SCALE * y) for x, y in points], fill=color, width=width * SCALE // 2, joint="curve")


def _text(pencil: ImageDraw.ImageDraw, at: tuple[float, float], words: str, anchor: str) -> None:
    pencil.text((SCALE * at[0], SCALE * at[1]), words, fill=INK, font=ImageFont.load_default(13 * SCALE), anchor=anchor)
