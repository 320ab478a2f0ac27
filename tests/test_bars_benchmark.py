"""Claims of docs/results.md are judged by recorded lines and by nothing else."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
Load = Callable[[str], ModuleType]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As the scripts import it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bars")


@pytest.fixture
def rows(bars: ModuleType) -> list[Any]:
    return [row for _, group in bars.load_bars().values() for row in group]


@pytest.fixture
def lines(load: Load) -> dict[tuple[str, str, str], dict[str, Any]]:
    record = load("record")
    return record.newest(record.read_lines())


def measured(**figures: list[float]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Lines of a benchmark `speed` on a CPU, in seconds."""
    return {
        ("speed", subject.replace("_", " "), "cpu"): {
            "repeats": values,
            "median": sorted(values)[len(values) // 2],
            "unit": "s",
        }
        for subject, values in figures.items()
    }


def judged(bars: ModuleType, tmp_path: Path, row: dict[str, Any], **figures: list[float]) -> tuple[str, str]:
    """What is measured, and the verdict, of a row of its own file."""
    group = {"group": "Speed", "benchmark": "speed", "rows": [{"claim": "it is fast", **row}]}
    (tmp_path / "speed.yaml").write_text(yaml.safe_dump(group))
    ((_, (row_,)),) = bars.load_bars(tmp_path, ("speed",)).values()
    found = bars.judge(row_, measured(**figures))
    return found.measured, found.verdict


def test_every_file_of_claims_is_a_group_of_the_page(bars: ModuleType) -> None:
    assert sorted(bars.GROUPS) == sorted(path.stem for path in bars.CLAIMS.iterdir())


def test_every_figure_is_recorded_or_awaited(bars: ModuleType, rows: list[Any], lines: dict) -> None:
    missing = [
        (row.claim, check.subject)
        for row in rows
        for check in row.checks
        if bars.find(check, lines) is None and not check.awaited and check.device != "cuda"
    ]
    assert not missing


def test_every_test_that_is_named_is_there(rows: list[Any]) -> None:
    named = {name for row in rows for name in row.tests}
    assert len(named) > 20
    for name in named:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_bars_in_words_have_the_numbers_that_are_compared_with(bars: ModuleType, rows: list[Any]) -> None:
    """But for zero, which is "never", and for names and counts of other things."""
    for row in rows:
        said = {float(number) for number in re.findall(r"-?\d[\d.]*(?:e-?\d+)?", row.stated)}
        numbers = {check.bound.number for check in row.checks if check.bound.number}
        assert {abs(number) for number in numbers} <= said, row.claim


def test_claims_say_nothing_of_what_was_measured_in_their_remarks(rows: list[Any]) -> None:
    assert not [row.claim for row in rows if re.search(r"\d\.\d|\d+ ?%", row.remark)]


@pytest.mark.parametrize(
    ("check", "values", "text", "verdict"),
    [
        ({"below": 2}, [1.0, 1.5, 9.0], "1.5 s", "met"),
        ({"below": 2, "each": True}, [1.0, 1.5, 9.0], "1, 1.5, 9 s", "not met"),
        ({"below": 1.5}, [1.5], "1.5 s", "not met"),
        ({"at_most": 1.5}, [1.5], "1.5 s", "met"),
        ({"at_least": 1500, "scale": 1000, "unit": "ms"}, [1.5], "1,500 ms", "met"),
        ({"above": 1500, "scale": 1000, "unit": "ms"}, [1.5], "1,500 ms", "not met"),
        ({"equal": 0}, [0.0], "0 s", "met"),
        ({"equal": 0}, [1e-9], "1e-09 s", "not met"),
        ({}, [3.0], "3 s", "shown"),
        ({"at_least": 2, "each": True}, [3.0, 2.0, 4.0, 5.0, 6.0], "2 s (the worst of 5)", "met"),
        ({"below": 6, "each": True}, [3.0, 2.0, 4.0, 5.0, 6.0], "6 s (the worst of 5)", "not met"),
        ({"each": True}, [3.0, 2.0, 4.0, 5.0, 6.0], "2 to 6 s", "shown"),
    ],
)
def test_a_figure_is_held_against_its_bound(
    bars: ModuleType, tmp_path: Path, check: dict[str, Any], values: list[float], text: str, verdict: str
) -> None:
    found = judged(bars, tmp_path, {"checks": [{"subject": "ours", **check}]}, ours=values)
    assert found == (text, verdict)


@pytest.mark.parametrize(
    ("check", "text", "verdict"),
    [
        ({"below": {"subject": "other"}}, "2 against 4 s", "met"),
        ({"below": {"subject": "other"}, "each": True}, "1, 2, 3 against 4, 5, 2 s", "not met"),
        ({"below": {"subject": "lone"}, "each": True}, "1, 2, 3 against 3.5 s", "met"),
        ({"at_most": {"subject": "other", "times": 0.5}}, "2 against 0.5 times 4 s", "met"),
        ({"below": {"subject": "other", "times": 0.5}}, "2 against 0.5 times 4 s", "not met"),
        ({"minus": "other", "each": True, "below": 0}, "-3, -3, 1 s", "not met"),
        ({"at_most": {"spread": "other"}}, "2 s; the spread is 3", "met"),
        ({"below": {"spread": "own"}, "each": True}, "1, 2, 3 s; the spread is 2", "not met"),
    ],
)
def test_figures_are_held_against_each_other(
    bars: ModuleType, tmp_path: Path, check: dict[str, Any], text: str, verdict: str
) -> None:
    figures = {"ours": [1.0, 2.0, 3.0], "other": [4.0, 5.0, 2.0], "lone": [3.5]}
    assert judged(bars, tmp_path, {"checks": [{"subject": "ours", **check}]}, **figures) == (text, verdict)


def test_a_missing_line_leaves_a_claim_undecided_unless_another_one_fails(bars: ModuleType, tmp_path: Path) -> None:
    gone = {"subject": "gone", "below": 2, "awaited": True}
    good, bad = ({"subject": name, "below": 2} for name in ("good", "bad"))
    figures = {"good": [1.0], "bad": [3.0]}

    def verdict(*checks: dict[str, Any], **row: Any) -> str:
        return judged(bars, tmp_path, {"checks": [*checks], **row}, **figures)[1]

    assert verdict(gone) == "not run"
    assert verdict({**gone, "device": "cuda"}) == "not run (GPU)"
    assert verdict({**good, "device": "cuda"}) == "not run (GPU)"
    assert verdict(good, gone) == "met in part"
    assert verdict(bad, gone) == "not met"
    assert verdict(good, {"subject": "gone"}) == "met"
    assert verdict(gone, {"subject": "good"}) == verdict({"subject": "good"}, {"subject": "gone"}) == "not run"
    assert verdict(bad, good) == "not met"
    assert verdict(bad, good, any=True) == "met"
    assert verdict(bad, gone, any=True) == "not run"
    assert verdict({**good, "minus": "gone"}) == verdict({"subject": "good", "below": {"subject": "gone"}}) == "not run"
    assert verdict({"subject": "good", "below": {"spread": "gone"}}) == "not run"


def test_a_pattern_takes_the_worst_of_all_and_must_find_as_many_as_are_named(bars: ModuleType, tmp_path: Path) -> None:
    figures = {f"part_{number}": [float(number)] for number in range(5)}

    def found(**check: Any) -> tuple[str, str]:
        return judged(bars, tmp_path, {"checks": [{"subject": "part *", **check}]}, **figures)

    assert found(lines=5, below=4.5) == ("4 s (the worst of 5)", "met")
    assert found(lines=5, below=4) == ("4 s (the worst of 5)", "not met")
    assert found(lines=6, below=4.5) == ("", "not run")


def test_tests_or_pages_alone_are_no_measurement(bars: ModuleType, tmp_path: Path) -> None:
    assert judged(bars, tmp_path, {"bar": "always", "tests": ["tests/a.py::test_b"]}) == ("", "tested")
    assert judged(bars, tmp_path, {"bar": "always", "pages": ["log.md"]}) == ("", "told")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"checks": [{"subject": "ours", "belwo": 2}]}, "it is fast: unknown keys belwo"),
        ({"checks": [{"subject": "ours", "below": 2, "above": 1}]}, "at most one of"),
        ({"checks": [{"subject": "ours"}], "met": True}, "unknown keys met"),
        ({"bar": "always"}, "neither checks nor tests nor pages"),
        ({"tests": ["tests/a.py::test_b"]}, "needs a bar"),
    ],
)
def test_a_row_that_can_not_be_judged_is_refused(
    bars: ModuleType, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judged(bars, tmp_path, row)


def test_the_page_shows_claims_with_links_to_their_tables(load: Load, bars: ModuleType) -> None:
    page = load("render").render([])
    remark = "other runs on such a machine took longer than that"
    assert f"| the whole run | below 600 s | {remark} | not run | [quickstart](#" in page
    assert "[retrieval leaks](retrieval.md#leakage), 1 |" in page
    assert len(re.findall(r"^\d+\. `tests/", page, re.MULTILINE)) > 20


def test_the_readme_shows_bounded_figures_of_some_claims(load: Load, bars: ModuleType) -> None:
    render = load("render")
    table = render.headlines(render.read_lines())
    assert 6 <= len(table) - 2 <= 10
    assert not [row for row in table if "not run" in row or "bfloat16" in row]


def test_arms_with_other_figures_stand_in_tables_of_their_own(load: Load, bars: ModuleType) -> None:
    line = {"benchmark": "quickstart", "device_kind": "cpu", "device": "CPU", "date": "2026", "commit": "abc"}
    line |= {"versions": {}, "command": "make quickstart"}
    found = {
        "questions.blind": 0.25,
        "questions.exact": 0.5,
        "text.bits": 2.0,
        "again.blind": 0.75,
        "again.exact": 1.0,
    }
    rows = load("render").pivot(
        "quickstart", [{**line, "subject": name, "repeats": [value]} for name, value in found.items()]
    )
    assert rows[:3] == ["| CPU | blind | exact |", "|---|---|---|", "| questions | 0.25 | 0.5 |"]
    assert rows[3:8] == ["| again | 0.75 | 1 |", "", "| CPU | bits |", "|---|---|", "| text | 2 |"]


def test_folders_elsewhere_on_the_machine_are_not_told(load: Load, bars: ModuleType) -> None:
    told = load("render").command(
        {"command": "python benchmarks/a.py --run runs/a/b --out /home/me/x/out [/b/c.d,e/f]"}
    )
    assert told == "python benchmarks/a.py --run runs/a/b --out .../out [.../c.d,e/f]"
