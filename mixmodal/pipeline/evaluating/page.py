"""An evaluation as one HTML page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mixmodal.evaluation.page import NO, YES, page, paragraph, picture, section, table, tile, tiles

TILES = 12
"""Tiles of a task before the rest is folded away."""
COMPARED = {"blind": "without the picture", "frequent": "most frequent answer", "held_out": "held-out pictures"}
"""Endings of metrics that stand beside another one, and what their columns are called."""


def write_page(result: Mapping[str, Any], titles: Mapping[str, tuple[str, str]], out: Path) -> str:
    """The page.

    Args:
        result: what `evaluation.json` holds.
        titles: title and introduction of each task.
        out: folder of the evaluation, with a folder of pictures for each task.
    """
    return page(f"Evaluation of {result['model']}", _body(result, titles, out))


def _body(result: Mapping[str, Any], titles: Mapping[str, tuple[str, str]], out: Path) -> Iterator[str]:
    yield f"<h1>Evaluation of {escape(str(result['model']))}</h1>"
    for name, summary in result["tasks"].items():
        title, introduction = titles[name]
        counts = f"{summary['num_samples']} samples"
        if summary["skipped"]:
            counts += ", skipped " + ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
        parts = [paragraph(note, "note") for note in (counts, *summary["notes"])]
        parts = [table(*_metrics(summary["metrics"]), numbers=range(1, 2 + len(COMPARED))), *parts]
        if summary["shown"]:
            cells = [_tile(one, out / name) for one in summary["shown"]]
            wanted = any(one["wanted"] for one in summary["shown"])
            introduction += " Below each stands what the model says, and smaller what is wanted." * wanted
            parts = [tiles(cells, TILES, "more"), *parts]
        parts.append(_settings(summary["settings"]))
        yield section(title, introduction, *parts)
    known = {key: value for key, value in result.items() if key != "tasks"}
    yield section("How it was measured", "Model, code and versions.", _rows(known))


def _metrics(metrics: Mapping[str, float | None]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a task, what a metric is compared with beside it, in a column where there is such a number."""
    rows: list[dict[str, str]] = []
    beside = {f"{metric}_{ending}" for metric in metrics for ending in COMPARED}
    for metric, value in metrics.items():
        if metric not in beside:
            found = {words: metrics.get(f"{metric}_{ending}") for ending, words in COMPARED.items()}
            more = {words: shown(one) for words, one in found.items() if one is not None}
            rows.append({"metric": metric, "value": shown(value), **more})
    columns = ("metric", "value", *(words for words in COMPARED.values() if any(words in row for row in rows)))
    return columns, [tuple(row.get(column, "") for column in columns) for row in rows]


def _tile(one: Mapping[str, Any], folder: Path) -> str:
    right, text = one["right"], escape(one["text"])
    words = text if right is None else f'<span class="{"yes" if right else "no"}">{YES if right else NO}</span> {text}'
    pictures = [(picture(folder / name, below or one["text"]), below) for name, below in one["pictures"].items()]
    return tile(pictures, words + (f"<small><br>{escape(one['wanted'])}</small>" if one["wanted"] else ""))


def _settings(settings: Mapping[str, Any]) -> str:
    return f"<details><summary>settings</summary>{_rows(settings)}</details>"


def _rows(known: Mapping[str, Any]) -> str:
    return table(("key", "value"), [(key, json.dumps(value, ensure_ascii=False)) for key, value in known.items()])


def shown(value: float | None) -> str:
    """A number with four digits."""
    return "n/a" if value is None else f"{value:,.4g}"
