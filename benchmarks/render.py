"""Renders docs/results.md from benchmarks/results/*.jsonl:  python benchmarks/render.py

Each line of those files is one measurement, written by the script that made it (see record.py). The table shows the
newest line for each benchmark, subject and kind of device, and says "not run" where there is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
DEVICES = ("cpu", "cuda")
TITLES = {
    "quickstart": "The quickstart: figures of one run",
    "train_throughput": "Training: the trainer against a plain loop over transformers' Chameleon",
    "train_length": "Forward and backward by length of a row and documents in it",
    "interruptions": "Runs that are killed and started again",
    "saving": "What a checkpoint costs",
    "data": "Packed rows of a mixture: what they cost and how full they are",
    "decode": "Generating with the tiny model",
    "image_tokenizer": "Image tokenizers: ours and others with the same weights",
    "tokenizer_comparison": "Image tokenizers at 64 pixels, 64 codes, 500 steps of 16: held-out demo pictures",
    "stability": "Stability at a high learning rate: a value for each seed (docs/stability.md)",
}
ORDER = [*TITLES]
PIVOTED = ("tokenizer_comparison", "stability")
"""Benchmarks whose subjects are `ARM: FIGURE`: a row for each arm, a column for each figure, all repeats in a cell."""


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


def table(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """Rows of one benchmark: the newest line for each subject and device."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if line["benchmark"] == benchmark:
            newest[line["subject"], line["device_kind"]] = line
    subjects = list(dict.fromkeys(subject for subject, _ in newest)) or ["all"]
    rows = ["| what | device | value | unit | repeats | date | commit | versions | command |", "|" + "---|" * 9]
    measured = [kind for kind in DEVICES if any(found == kind for _, found in newest)]
    rows += [row(subject, kind, newest.get((subject, kind))) for subject in subjects for kind in measured]
    rows += [row("all", kind, None) for kind in DEVICES if kind not in measured]
    return rows


def pivot(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """A row for each arm, then what all rows have in common; devices apart."""
    rows: list[str] = []
    for kind in DEVICES:
        newest = {
            line["subject"]: line for line in lines if line["benchmark"] == benchmark and line["device_kind"] == kind
        }
        if not newest:
            rows += ["", f"{'GPU' if kind == 'cuda' else kind.upper()}: not run"]
            continue
        cells = {tuple(subject.split(": ", 1)): line for subject, line in newest.items()}
        arms, figures = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
        rows += [f"| | {' | '.join(figures)} |", "|" + "---|" * (1 + len(figures))]
        for arm in arms:
            values = [cells[arm, figure]["repeats"] if (arm, figure) in cells else [] for figure in figures]
            rows.append(f"| {arm} | {' | '.join(', '.join(map(short, found)) for found in values)} |")
        last = list(newest.values())[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if name != "device")
        commits = ", ".join(sorted({line["commit"][:9] for line in newest.values()}))
        rows += ["", f"{last['device']}; {last['date'][:10]}; commit {commits}; {versions}; `{last['command']}`"]
    return rows


def short(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def row(subject: str, kind: str, line: dict[str, Any] | None) -> str:
    if line is None:
        return f"| {subject} | {'GPU' if kind == 'cuda' else kind.upper()} | not run | | | | | | |"
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if name != "device")
    cells = [
        subject,
        line["device"],
        short(line["median"]),
        line["unit"],
        str(len(line["repeats"])),
        line["date"][:10],
        line["commit"][:9],
        versions,
        f"`{line['command']}`",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(read_lines()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
