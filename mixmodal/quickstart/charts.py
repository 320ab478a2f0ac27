"""Curves and a heat table as inline SVG and HTML; colours come from the page, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 92, 16, 34
MAX_POINTS = 240


class Curve(NamedTuple):
    """A named series of `(n,)` steps and values in a colour of the page; held-out curves are dashed."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str
    dashed: bool = False


def line_chart(title: str, curves: Sequence[Curve], x_name: str = "step") -> str:
    """Curves over steps, as an SVG; long series are averaged in bins, values that are not finite left out."""
    drawn = [_binned(curve) for curve in curves]
    drawn = [curve for curve in drawn if len(curve.values)]
    if not drawn:
        return f'<figure><figcaption class="soft">{escape(title)}: nothing was logged</figcaption></figure>'
    ticks = _ticks(min(min(c.values) for c in drawn), max(max(c.values) for c in drawn))
    low, high = ticks[0], ticks[-1]
    last = max(max(c.steps) for c in drawn) or 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in (0, last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>')
    heights = _apart([y(c.values[-1]) for c in drawn], gap=15)
    for curve, height in zip(drawn, heights, strict=True):
        points = " ".join(
            f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True)
        )
        style = f'class="curve{" dashed" if curve.dashed else ""}" style="stroke: var(--{curve.color})"'
        parts.append(f'<polyline {style} points="{points}"/>')
        label = f"{curve.name} {curve.values[-1]:.3g}"
        color = f'style="fill: var(--{curve.color})"'
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{height + 4:.1f}" {color}>{escape(label)}</text>')
    return f"<figure>{''.join(parts)}</svg><figcaption>{escape(title)}</figcaption></figure>"


def heat_table(names: Sequence[str], counts: np.ndarray, rows: str, columns: str) -> str:
    """A square of counts `(n, n)`, darker where a row has a larger share."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [f"<tr><th>{escape(rows)} &#8595; &nbsp; {escape(columns)} &#8594;</th>{head}</tr>"]
    for name, row, share in zip(names, counts, shares, strict=True):
        cells = "".join(
            f'<td style="background: rgba(var(--heat), {0.75 * s:.2f})">{count or ""}</td>'
            for count, s in zip(row, share)
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="heat">{"".join(lines)}</table></div>'


def _binned(curve: Curve) -> Curve:
    pairs = np.array([[s, v] for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]).reshape(
        -1, 2
    )
    bins = np.array_split(pairs, min(MAX_POINTS, len(pairs)) or 1)
    means = np.array([part.mean(axis=0) for part in bins if len(part)]).reshape(-1, 2)
    return curve._replace(steps=means[:, 0].tolist(), values=means[:, 1].tolist())


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose `low` and `high`, four to seven of them."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, count = math.floor(low / step), math.ceil(high / step) - math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(count + 1)]


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights of labels moved down where they would overlap."""
    moved = list(heights)
    previous = -math.inf
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        moved[index] = previous = max(heights[index], previous + gap)
    return moved
