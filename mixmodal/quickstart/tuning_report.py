"""The report page of the tuning: what the tuned model makes of held-out pairs, and its figures beside those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mixmodal.evaluation.concepts import Rate
from mixmodal.evaluation.page import (
    figure_of,
    figures,
    page,
    paragraph,
    percent,
    picture,
    section,
    tile,
    tiles,
    verdict,
)
from mixmodal.evaluation.page import table as html_table
from mixmodal.quickstart.charts import line_chart
from mixmodal.quickstart.demo_tasks import GROUPS, HELDOUT
from mixmodal.quickstart.recipe import RECORDS, TUNED
from mixmodal.quickstart.report import curve, made_by, read_metrics

SHOWN = 12
TITLES = {
    "style": "In the other style",
    "skin_tone": "With another tone of the skin",
    "gender": "As the other gender",
    "category": "What kind is it?",
    "which": "Which of the two?",
}
"""The first tasks on the page, in this order."""
LAST = {"drawing": "Drawn from a caption"}
Results = Mapping[str, Any]


def write_tuning_report(run: Path, summary: Results, items: Sequence[Results], stages: Sequence[Results]) -> Path:
    """Writes `run/finetune.html`, one self-contained page.

    Args:
        run: the quickstart's folder.
        summary: what `finetune.json` holds.
        items: what the tuned model answered, of both splits.
        stages: a mapping for each stage: `name`, `seconds`, `peak_memory_bytes`, `command`.
    """
    heldout = [item for item in items if item["heldout"]]
    tasks = in_order({item["task"] for item in heldout})
    body = [
        *_head(summary),
        _first_figures(summary),
        *(_shown(run, task, [item for item in heldout if item["task"] == task]) for task in tasks),
        _table(summary),
        _curves(run),
        made_by(summary, stages, f"Tuning: {summary['tokens_per_second_train']:,.0f} tokens a second."),
    ]
    path = run / "finetune.html"
    path.write_text(page("mixmodal quickstart, tuned", body), encoding="utf-8")
    return path


def in_order(tasks: Iterable[str]) -> list[str]:
    """As they stand on the page."""
    tasks = set(tasks)
    others = sorted(tasks - {*TITLES, *LAST})
    return [task for task in (*TITLES, *others, *LAST) if task in tasks]


def title_of(task: str) -> str:
    return {**TITLES, **LAST}.get(task, task.replace("captions", "Named in"))


def _head(summary: Results) -> Iterator[str]:
    yield "<header><h1>The same model, told what to do</h1>"
    yield paragraph(
        f"The quickstart's model, tuned on edits, questions and captions in {summary['seconds'] / 60:.1f} minutes. "
        "Shown first are held-out pairs of concept and style, which neither the model nor its image tokenizer was "
        "trained on: of an edit it is the result that was held out."
    )
    yield paragraph(f"Commit {summary['commit']}, {summary['versions'].get('device', 'unknown device')}.", "note")
    yield "</header>"


def _first_figures(summary: Results) -> str:
    after, before = (summary["tasks"][when]["heldout"] for when in ("after", "before"))

    def cards() -> Iterator[str]:
        for task in in_order(after):
            rates = after[task]
            for name in ("concept", "style") if task in GROUPS else ("right",):
                note = f"before: {percent(Rate(*before[task][name]).share)}"
                if task == "category":
                    note += f", chance {percent(1 / rates['kinds'])}, the commonest kind {percent(rates['majority'])}"
                if task == "which":
                    note += ", chance 50 %"
                said = title_of(task).rstrip("?") + ("" if name == "right" else f": right {name}")
                yield figure_of(Rate(*rates[name]), said, note)

    return section(
        "Held-out pairs",
        "Of a picture, the demo picture nearest to it tells what it shows; an answer in words is right when it is the "
        "very words. Before the tuning the model was made to answer with a picture, or with words.",
        figures(cards(), first=True),
    )


def _shown(run: Path, task: str, items: Sequence[Results]) -> str:
    show: Callable[[Path, Results], str] = _show_picture if task in GROUPS else _show_words
    return section(title_of(task), _introduction(task), tiles([show(run, item) for item in items], SHOWN, "more"))


def _introduction(task: str) -> str:
    if task == "drawing":
        return "The caption, the picture drawn, and the held-out picture."
    if task in GROUPS:
        return "What was given and asked, what came of it, and the held-out picture."
    return "What was given and asked, and the answer."


def _show_picture(run: Path, item: Results) -> str:
    record = item["record"]
    given = [_given(run, record["image1"], "given")] if "image1" in record else []
    drawn = [(picture(run / item["image"], "drawn"), "drawn")] if "image" in item else []
    truth = _given(run, record.get("image2") or record["image"], "held out")
    said = record.get("edit") or record["caption"]
    signs = f"{verdict(item['concept_right'], 'concept')} {verdict(item['style_right'], 'style')}"
    words = f"<br><small>it said: {escape(item['text'])}</small>" if item["text"] else ""
    return tile([*given, *drawn, truth], f"<b>{escape(said)}</b><br>{signs}{words}")


def _show_words(run: Path, item: Results) -> str:
    record = item["record"]
    files = [record[name] for name in ("image", "image1", "image2") if name in record]
    names = ("first", "second") if len(files) > 1 else ("given",)
    asked = f"<b>Which is {escape(record['name'])}?</b><br>" if "name" in record else ""
    wanted = record["answer"] if "answer" in record else record["caption"]
    truth = "" if item["right"] else f"<br><small>it is: {escape(wanted)}</small>"
    pictures = [_given(run, file, name) for file, name in zip(files, names, strict=True)]
    return tile(pictures, f"{asked}{verdict(item['right'], item['text'] or '(nothing)')}{truth}")


def _given(run: Path, file: str, words: str) -> tuple[str, str]:
    return picture(run / RECORDS / file, words), words


def rows_of(summary: Results) -> list[list[str]]:
    """Task, what is right, and the shares before and after of held-out and of trained pairs, with the numbers."""
    rows: list[list[str]] = []
    found_of = summary["tasks"]["after"][HELDOUT]
    for task in in_order(found_of):
        rates = found_of[task]
        for name in rates:
            if not isinstance(rates[name], list):
                continue
            cells = []
            for split in (HELDOUT, "trained"):
                for when in ("before", "after"):
                    found = Rate(*summary["tasks"][when][split].get(task, {}).get(name, (0, 0)))
                    cells.append(f"{percent(found.share)} ({found.hits} of {found.trials})" if found.trials else "")
            rows.append([title_of(task).rstrip("?"), name, *cells])
    return rows


HEADER = ("task", "right", "held out, before", "held out, tuned", "trained, before", "trained, tuned")


def _table(summary: Results) -> str:
    return section(
        "Before and after",
        "Held-out and trained pairs apart; what was trained on may simply be remembered.",
        html_table(HEADER, rows_of(summary), numbers=(2, 3, 4, 5)),
    )


def _curves(run: Path) -> str:
    metrics = read_metrics(run / TUNED / "metrics.jsonl")
    curves = [curve(metrics, f"loss_{key}", key, key) for key in ("text", "image")]
    chart = line_chart("Nats per token of the answers", curves)
    return section("Loss curves", "The loss of each modality of the answers.", f'<div class="charts">{chart}</div>')


def say_summary(summary: Results, say: Callable[[str], None]) -> None:
    """A line for each figure of the held-out pairs."""
    for task, right, before, after, *_ in rows_of(summary):
        say(f"      {task + ', ' + right:<42} {before:>18} -> {after}")
