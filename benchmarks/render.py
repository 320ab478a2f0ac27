"""Renders docs/results.md, and the tables of pages written by hand, from benchmarks/results/*.jsonl:

    python benchmarks/render.py

Each line of those files is one measurement, written by the script that made it (see record.py). A table shows the
newest line for each benchmark, subject and kind of device, and says "not run" where there is none; below it stands what
measured them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
WRITTEN_PAGES = tuple(
    ROOT / "docs" / f"{name}.md" for name in ("checkpoints", "classifiers", "finetune", "retrieval", "sampling")
)
MARK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""In a page that is written by hand, what stands between is rendered."""
NAMES = {"cpu": "CPU", "cuda": "GPU"}
DEVICES = [*NAMES]
TITLES = {
    "quickstart": "The quickstart: figures of one run",
    "train_throughput": "Training: the trainer against a plain loop over transformers' Chameleon",
    "train_length": "Forward and backward by length of a row and documents in it",
    "interruptions": "Runs that are killed and started again",
    "ranks": "Trainings shared among processes, against one process: the worst difference",
    "saving": "What a checkpoint costs",
    "data": "Packed rows of a mixture: what they cost and how full they are",
    "decode": "Drawing pictures with guidance: codes a second, against transformers' Chameleon",
    "import": "Importing a checkpoint of 7B: seconds and peak of memory",
    "image_tokenizer": "Image tokenizers: ours and others with the same weights",
    "tokenizer_comparison": "Image tokenizers at 64 pixels, 64 codes, 500 steps of 16: held-out demo pictures",
    "stability": "Stability at a high learning rate: a value for each seed (docs/stability.md)",
}
ORDER = [*TITLES]
PIVOTED = (
    "modality_balance",
    "tuning_tasks",
    "tuning_adapters",
    "tuning_preference",
    "demo_classifiers",
    "digits",
    "elimination",
    "import",
    "tokenizer_comparison",
    "swap_test",
    "stability",
    "ranks",
    "train_length",
    "guidance",
    "infilling",
    "retrieval_encoder",
    "retrieval_image",
    "retrieval_text",
    "retrieval_drawn",
    "retrieval_leaks",
)
"""Benchmarks whose subjects are `ARM: FIGURE`: a row for each arm, a column for each figure, all repeats in a cell."""


ON_CPU = (
    "modality_balance",
    "tuning_tasks",
    "tuning_adapters",
    "tuning_preference",
    "classifier_exactness",
    "demo_classifiers",
    "digits",
    "elimination",
    "swap_test",
    "guidance",
    "import",
    "infilling",
    "memory",
    "retrieval_encoder",
    "retrieval_image",
    "retrieval_text",
    "retrieval_drawn",
    "retrieval_leaks",
)
"""Benchmarks of which a GPU would change nothing but the time they take, or nothing at all."""


def read_lines(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All measurements, oldest first."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["date"])


def render(lines: list[dict[str, Any]]) -> str:
    """The page as markdown."""
    page = [
        "# Results",
        "",
        "Written by `benchmarks/render.py` from `benchmarks/results/`; `make bench` measures again. Medians.",
    ]
    for benchmark in ORDER:
        draw = pivot if benchmark in PIVOTED else table
        page += ["", f"## {TITLES[benchmark]}", "", *draw(benchmark, lines)]
    return "\n".join(page) + "\n"


def fill(page: str, lines: list[dict[str, Any]]) -> str:
    """The page with a table between each `<!-- figures: BENCHMARK -->` and the `<!-- end -->` behind it."""

    def draw(match: re.Match[str]) -> str:
        rows = (pivot if match[2] in PIVOTED else table)(match[2], lines)
        return "\n".join([match[1], *rows, "", match[3]])

    return MARK.sub(draw, page)


def table(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """Rows of one benchmark: the newest line for each subject and device."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if line["benchmark"] == benchmark:
            newest[line["subject"], line["device_kind"]] = line
    origins = list(dict.fromkeys(map(origin, newest.values())))
    rows = ["| what | device | value | unit | repeats | measured by |", "|" + "---|" * 6]
    for (subject, kind), line in sorted(newest.items(), key=lambda item: DEVICES.index(item[0][1])):
        cells = [subject, NAMES[kind], short(line["median"]), line["unit"], str(len(line["repeats"]))]
        rows.append(f"| {' | '.join(cells)} | {1 + origins.index(origin(line))} |")
    missing = [kind for kind in devices_of(benchmark) if all(found != kind for _, found in newest)]
    rows += [f"| all | {NAMES[kind]} | not run | | | |" for kind in missing]
    return [*rows, *notes(origins)]


def pivot(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """A row for each arm, a column for each figure, then what measured them; devices apart."""
    rows: list[str] = []
    for kind in devices_of(benchmark):
        newest = {
            line["subject"]: line for line in lines if line["benchmark"] == benchmark and line["device_kind"] == kind
        }
        if not newest:
            rows += ["", f"{NAMES[kind]}: not run"]
            continue
        cells = {tuple(subject.split(": ", 1)): line for subject, line in newest.items()}
        arms, figures = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
        rows += [f"| {NAMES[kind]} | {' | '.join(figures)} |", "|" + "---|" * (1 + len(figures))]
        for arm in arms:
            values = [cells[arm, figure]["repeats"] if (arm, figure) in cells else [] for figure in figures]
            rows.append(f"| {arm} | {' | '.join(', '.join(map(short, found)) for found in values)} |")
        rows += notes(list(dict.fromkeys(map(origin, newest.values()))))
    return rows


def devices_of(benchmark: str) -> list[str]:
    """The kinds of device that it is worth running on."""
    return ["cpu"] if benchmark in ON_CPU else DEVICES


def origin(line: dict[str, Any]) -> str:
    """What measured a line: command, device, day, commit and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if version != "absent")
    return f"`{line['command']}`; {line['device']}; {line['date'][:10]}; commit {line['commit'][:9]}; {versions}"


def notes(origins: list[str]) -> list[str]:
    return ["", *(f"{number}. {text}" for number, text in enumerate(origins, 1))]


def short(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    measured = read_lines()
    filled = [(page, fill(page.read_text(encoding="utf-8"), measured)) for page in WRITTEN_PAGES]
    for page, text in ((PAGE, render(measured)), *filled):
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
