"""Renders docs/results.md, and the tables of pages written by hand, from benchmarks/results/*.jsonl:

    python benchmarks/render.py

Each line of those files is one measurement, written by the script that made it (see record.py). A table shows the
newest line for each benchmark, subject and kind of device, and says "not run" where there is none; below it stands what
measured them. What is claimed, and whether the lines hold it, comes first (bars.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bars import Row, judge, load_bars, short
from record import newest, read_lines

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
WRITTEN_PAGES = (ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {PAGE}))
MARK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""In a page that is written by hand, what stands between is rendered."""
VERDICTS = {
    "met": "the newest lines reach the bar; computed from them, as all that follows",
    "not met": "they do not",
    "shown": "the bar asks for a figure, and here it is",
    "tested": "tests hold it, and fail where it does not hold; their numbers stand in the last column",
    "told": "no script measures it; the page says what was found",
    "met in part": "some figures are not there yet; those that are reach the bar",
    "not run": "no figure is recorded yet",
    "not run (GPU)": "no figure is recorded yet, and it needs a GPU",
}
ELSEWHERE = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)*([\w.+-]+)")
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
    "own_pictures": "A folder of 500 pictures, by the three commands of the tutorial",
    "evaluation": "The quickstart's model, evaluated by tasks",
    "house": "The package: how it starts, what it weighs, how much of it the tests run",
    "mutations": "Places that were broken: how many the tests noticed",
    "import": "Importing a checkpoint of 7B: seconds and peak of memory",
    "image_tokenizer": "Image tokenizers: ours and others with the same weights",
    "tokenizer_comparison": "Image tokenizers at 64 pixels, 64 codes, 500 steps of 16: held-out demo pictures",
    "stability": "Stability at a high learning rate: a value for each seed",
}
ORDER = [*TITLES]
PIVOTED = (
    "quickstart",
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
DOTTED = ("quickstart",)
"""Those whose subjects are `ARM.FIGURE`, as in a JSON file."""
APART = ("quickstart",)
"""Those of which arms with other figures stand in a table of their own."""

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
    "own_pictures",
    "evaluation",
    "house",
    "mutations",
    "retrieval_encoder",
    "retrieval_image",
    "retrieval_text",
    "retrieval_drawn",
    "retrieval_leaks",
)
"""Benchmarks of which a GPU would change nothing but the time they take, or nothing at all."""


def render(lines: list[dict[str, Any]]) -> str:
    """The page as markdown."""
    page = [
        "# Results",
        "",
        "Written by `benchmarks/render.py` from `benchmarks/results/`, a line for each measurement. First what is",
        "claimed, beside the newest measurement of it; then all that was measured, with the command, the machine and",
        "the versions that did. `make bench` measures again what a CPU can, `make gpu` the rest. Values are medians",
        "where nothing else is said.",
        "",
        *bar_tables(lines),
    ]
    for benchmark in ORDER:
        draw = pivot if benchmark in PIVOTED else table
        page += ["", f"## {TITLES[benchmark]}", "", *draw(benchmark, lines)]
    return "\n".join(page) + "\n"


def fill(page: str, lines: list[dict[str, Any]]) -> str:
    """The page with a table between each `<!-- figures: BENCHMARK -->` and the `<!-- end -->` behind it."""

    def draw(match: re.Match[str]) -> str:
        if match[2] == "headlines":
            return "\n".join([match[1], *headlines(lines), "", match[3]])
        rows = (pivot if match[2] in PIVOTED else table)(match[2], lines)
        return "\n".join([match[1], *rows, "", match[3]])

    return MARK.sub(draw, page)


def bar_tables(lines: list[dict[str, Any]]) -> list[str]:
    """The claims by group, and how many of them are held."""
    groups, known = load_bars(), newest(lines)
    judged = {title: [judge(row, known) for row in rows] for title, (_, rows) in groups.items()}
    counts = Counter(found.verdict for rows in judged.values() for found in rows)
    said = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    page = ["## What is claimed", "", f"{sum(counts.values())} claims: {said}.", ""]
    page += [f"- **{name}**: {meaning}" for name, meaning in VERDICTS.items() if counts[name]]
    missed = [found.row for rows in judged.values() for found in rows if found.verdict == "not met"]
    page += ["", "Not met:", ""] * bool(missed)
    page += [f"- {row.claim} ([{row.group}](#{anchor(row.group)}))" for row in missed]
    places = find_places()
    for title, (about, _) in groups.items():
        page += ["", f"### {title}", ""] + [about, ""] * bool(about)
        page += ["| what | bar | newest measurement | held | from |", "|" + "---|" * 5]
        tests = list(dict.fromkeys(test for found in judged[title] for test in found.row.tests))
        for found in judged[title]:
            measured = "; ".join(filter(None, (found.measured, found.row.remark)))
            source = ", ".join([*links(found.row, places), *(str(1 + tests.index(name)) for name in found.row.tests)])
            page.append(f"| {found.row.claim} | {found.row.stated} | {measured} | {bold(found.verdict)} | {source} |")
        page += notes([f"`{name}`" for name in tests]) if tests else []
    return page


def headlines(lines: list[dict[str, Any]]) -> list[str]:
    """A table of the claims that README.md shows."""
    known, rows = newest(lines), ["| what | bar | newest measurement | |", "|" + "---|" * 4]
    for found in (
        judge(row, known, bounded=True) for _, group in load_bars().values() for row in group if row.headline
    ):
        rows.append(f"| {found.row.headline} | {found.row.stated} | {found.measured} | {bold(found.verdict)} |")
    return rows


def bold(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "not met" else verdict


def find_places() -> dict[str, str]:
    """Where the table of each benchmark stands, as a link from docs/results.md."""
    found = {benchmark: f"#{anchor(title)}" for benchmark, title in TITLES.items()}
    for path in WRITTEN_PAGES:
        heading = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            elif match := re.match(r"<!-- figures: (\w+) -->", line):
                found[match[1]] = f"{path.name}#{anchor(heading)}"
    return found


def links(row: Row, places: dict[str, str]) -> list[str]:
    """To the tables that a row's figures stand in, and to what else tells of it."""
    names = dict.fromkeys(check.benchmark for check in row.checks)
    tables = [f"[{name.replace('_', ' ')}]({places[name]})" for name in names if name in places]
    return [*tables, *(f"[{page.partition('.')[0]}]({page})" for page in row.pages)]


def anchor(heading: str) -> str:
    """Of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def table(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """Rows of one benchmark: the newest line for each subject and device."""
    found = {key[1:]: line for key, line in newest(lines).items() if key[0] == benchmark}
    origins = list(dict.fromkeys(map(origin, found.values())))
    rows = ["| what | device | value | unit | repeats | measured by |", "|" + "---|" * 6]
    for (subject, kind), line in sorted(found.items(), key=lambda item: DEVICES.index(item[0][1])):
        cells = [subject, NAMES[kind], short(line["median"]), line["unit"], str(len(line["repeats"]))]
        rows.append(f"| {' | '.join(cells)} | {1 + origins.index(origin(line))} |")
    missing = [kind for kind in devices_of(benchmark) if all(other != kind for _, other in found)]
    rows += [f"| all | {NAMES[kind]} | not run | | | |" for kind in missing]
    return [*rows, *notes(origins)]


def pivot(benchmark: str, lines: list[dict[str, Any]]) -> list[str]:
    """A row for each arm, a column for each figure, then what measured them; devices apart."""
    rows: list[str] = []
    for kind in devices_of(benchmark):
        found = {key[1]: line for key, line in newest(lines).items() if (key[0], key[2]) == (benchmark, kind)}
        if not found:
            rows += ["", f"{NAMES[kind]}: not run"]
            continue
        if benchmark in DOTTED:
            cells = {
                (subject.rpartition(".")[0] or "the run", subject.rpartition(".")[2]): found[subject]
                for subject in found
            }
        else:
            cells = {tuple(subject.split(": ", 1)): line for subject, line in found.items()}
        for arms, figures in shapes(cells, apart=benchmark in APART):
            rows += ["", f"| {NAMES[kind]} | {' | '.join(figures)} |", "|" + "---|" * (1 + len(figures))]
            for arm in arms:
                values = [cells[arm, figure]["repeats"] if (arm, figure) in cells else [] for figure in figures]
                rows.append(f"| {arm} | {' | '.join(', '.join(map(short, repeats)) for repeats in values)} |")
        rows += notes(merged(found.values()))
    return rows[1:]


def shapes(cells: Iterable[tuple[str, ...]], apart: bool) -> list[tuple[list[str], list[str]]]:
    """Arms and figures of one table; of one for all arms with equal figures where these are to stand `apart`."""
    of: dict[str, dict[str, None]] = {}
    for arm, figure in cells:
        of.setdefault(arm, {})[figure] = None
    if not apart:
        return [([*of], list(dict.fromkeys(figure for _, figure in cells)))]
    tables: dict[tuple[str, ...], list[str]] = {}
    for arm, figures in of.items():
        tables.setdefault((*figures,), []).append(arm)
    return [(arms, [*figures]) for figures, arms in tables.items()]


def devices_of(benchmark: str) -> list[str]:
    """The kinds of device that it is worth running on."""
    return ["cpu"] if benchmark in ON_CPU else DEVICES


def origin(line: dict[str, Any]) -> str:
    """What measured a line: command, device, day, commit and versions."""
    return f"`{command(line)}`; {circumstances(line)}"


def command(line: dict[str, Any]) -> str:
    """Of folders elsewhere on the machine only the last name is told."""
    return ELSEWHERE.sub(r".../\1", line["command"])


def circumstances(line: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if version != "absent")
    return f"{line['device']}; {line['date'][:10]}; commit {line['commit'][:9]}; {versions}"


def merged(lines: Iterable[dict[str, Any]]) -> list[str]:
    """What measured lines, with all commands that did so in the same circumstances together."""
    commands: dict[str, dict[str, None]] = {}
    for line in lines:
        commands.setdefault(circumstances(line), {})[f"`{command(line)}`"] = None
    return [f"{', '.join(found)}; {where}" for where, found in commands.items()]


def notes(origins: list[str]) -> list[str]:
    return ["", *(f"{number}. {text}" for number, text in enumerate(origins, 1))]


if __name__ == "__main__":
    measured = read_lines()
    pages = {page: fill(page.read_text(encoding="utf-8"), measured) for page in WRITTEN_PAGES}
    for page, text in {PAGE: render(measured), **pages}.items():
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
