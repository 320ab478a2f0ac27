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
    rows = [
        (titles[name][0], metric, shown(value))
        for name, summary in result["tasks"].items()
        for metric, value in summary["metrics"].items()
    ]
    yield table(("task", "metric", "value"), rows, numbers=(2,))
    for name, summary in result["tasks"].items():
        title, introduction = titles[name]
        parts = [table(("metric", "value"), [(m, shown(v)) for m, v in summary["metrics"].items()], numbers=(1,))]
        counts = f"{summary['num_samples']} samples"
        if summary["skipped"]:
            counts += ", skipped " + ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
        parts.append(paragraph(counts, "note"))
        parts += [paragraph(note, "note") for note in summary["notes"]]
        if summary["shown"]:
            cells = [_tile(one, out / name) for one in summary["shown"]]
            parts.append(tiles(cells, TILES, "more"))
        parts.append(_settings(summary["settings"]))
        yield section(title, introduction, *parts)
    known = {key: value for key, value in result.items() if key != "tasks"}
    yield section("How it was measured", "Model, code and versions.", _rows(known))


def _tile(one: Mapping[str, Any], folder: Path) -> str:
    right, text = one["right"], escape(one["text"])
    words = text if right is None else f'<span class="{"yes" if right else "no"}">{YES if right else NO}</span> {text}'
    pictures = [(picture(folder / name, below or one["text"]), below) for name, below in one["pictures"].items()]
    return tile(pictures, words)


def _settings(settings: Mapping[str, Any]) -> str:
    return f"<details><summary>settings</summary>{_rows(settings)}</details>"


def _rows(known: Mapping[str, Any]) -> str:
    return table(("key", "value"), [(key, json.dumps(value, ensure_ascii=False)) for key, value in known.items()])


def shown(value: float | None) -> str:
    """A number with four digits."""
    return "n/a" if value is None else f"{value:,.4g}"
