"""Claims with a bar, judged by the newest recorded lines.

`claims/*.yaml` say what is claimed and where its figure stands; whether a bar is met is computed from the lines and
written nowhere. A row has checks (figures of recorded lines, each with its bound), tests that hold it, pages that tell
of it, or several of these.
Figures of training and of held-out pictures never share a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

CLAIMS = Path(__file__).resolve().parent / "claims"
GROUPS = (
    *("quickstart", "image_tokenizers", "pretraining", "retrieval", "sampling", "classification"),
    *("checkpoints", "finetuning", "package"),
)
"""Files of `claims/`, in the order of the page."""
Lines = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""The newest line of each benchmark, subject and kind of device."""
COMPARISONS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
    "equal": (operator.eq, ""),
}
INHERITED = ("benchmark", "device", "scale", "unit", "each", "awaited")
"""What a group or a row says for all its checks."""
SHOWN_NUMBERS = 4
"""More of them are shown by their worst."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a figure is compared with: a number, another figure, or by how much a figure differs between repeats.

    Args:
        number: in the unit that is shown.
        subject: of another line of the same benchmark.
        spread: the range of the repeats of that subject, or of the figure itself (`own`).
        times: what the other figure, or the range, is multiplied by.
    """

    number: float | None = None
    subject: str = ""
    spread: str = ""
    times: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure and its bound.

    Args:
        benchmark, subject, device: of the line; in `subject`, `*` stands for anything, and the worst counts.
        lines: how many there must be.
        name: of the figure, where a row has several.
        minus: a subject whose figure is taken away, repeat by repeat.
        each: whether each repeat must reach the bound; the median, otherwise.
        scale, unit: what is shown is the figure times `scale`; the line's own unit, where none is given.
        comparison, bound: one of `COMPARISONS`; none where the figure is only reported.
        awaited: whether nobody has measured it yet.
    """

    benchmark: str
    subject: str
    device: str = "cpu"
    lines: int = 1
    name: str = ""
    minus: str = ""
    each: bool = False
    scale: float = 1.0
    unit: str | None = None
    comparison: str = ""
    bound: Bound = Bound()
    awaited: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A claim.

    Args:
        group: the heading that it stands under.
        claim: what is held, in a few words.
        bar: in words; made of the bounds where there is none.
        checks: all must hold, or one of them where `any` is set.
        tests: `tests/FILE.py::NAME`, what holds it as well, or holds it alone.
        pages: of docs/ that tell more, as `PAGE.md#HEADING`.
        remark: what one must know to read the figure; no figures.
        headline: words for the table of README.md; none where it does not stand there.
    """

    group: str
    claim: str
    bar: str = ""
    checks: tuple[Check, ...] = ()
    any: bool = False
    tests: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    remark: str = ""
    headline: str = ""

    @property
    def stated(self) -> str:
        """The bar in words."""
        return self.bar or "; ".join(dict.fromkeys(map(stated, self.checks)))

    @property
    def verdict_without_figures(self) -> str:
        on_gpu = bool(self.checks) and all(check.device == "cuda" for check in self.checks)
        return "not run (GPU)" if on_gpu else "not run"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the lines say of a check; `met` is None where it has no bound."""

    text: str
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row with what was measured, and whether that reaches the bar: one of `VERDICTS` of render.py."""

    row: Row
    measured: str
    verdict: str


def load_bars(folder: Path = CLAIMS, groups: Sequence[str] = GROUPS) -> dict[str, tuple[str, list[Row]]]:
    """For each group what stands below its heading, and its rows.

    Raises:
        ValueError: for a key that no row or check has, a check without a benchmark, or a row that nothing holds.
    """
    found: dict[str, tuple[str, list[Row]]] = {}
    for name in groups:
        given = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        title, about, rows = given.pop("group"), given.pop("about", ""), given.pop("rows")
        found[title] = about, [_row(title, given, row) for row in rows]
    return found


def judge(row: Row, lines: Lines, bounded: bool = False) -> Judged:
    """The row by the newest lines; one figure that is missing leaves it undecided, unless another one fails.

    Args:
        bounded: leaves out figures that are only reported.
    """
    checks = [check for check in row.checks if check.comparison or not bounded]
    found = [find(check, lines) for check in checks]
    needed = [one for one, check in zip(found, checks, strict=True) if check.comparison] or found
    texts = [finding.text for finding in found if finding is not None]
    mets = [finding.met for finding in found if finding is not None and finding.met is not None]
    if not row.checks:
        verdict = "tested" if row.tests else "told"
    elif not texts:
        verdict = row.verdict_without_figures
    elif row.any:
        verdict = "met" if any(mets) else "not run" if None in needed else "not met"
    elif not all(mets):
        verdict = "not met"
    elif None in needed:
        verdict = "met in part" if mets else "not run"
    else:
        verdict = "met" if mets else "shown"
    return Judged(row=row, measured="; ".join(texts), verdict=verdict)


def find(check: Check, lines: Lines) -> Finding | None:
    """The figure of a check beside its bound, or None where a line is missing."""
    found = _lines(check, check.subject, lines)
    others = [_lines(check, name, lines) for name in (check.minus, check.bound.subject) if name]
    if len(found) < check.lines or not all(others):
        return None
    numbers = [number * check.scale for line in found for number in _numbers(check, line)]
    if check.minus:
        taken = [number * check.scale for number in _numbers(check, others[0][0])]
        numbers = [one - other for one, other in zip(numbers, taken, strict=True)]
    bounds = _bounds(check, numbers, lines)
    if bounds is None:
        return None
    text = _text(check, numbers, bounds, str(found[0]["unit"]))
    if not check.comparison:
        return Finding(text=text, met=None)
    holds, _ = COMPARISONS[check.comparison]
    return Finding(text=text, met=all(map(holds, numbers, bounds)))


def stated(check: Check) -> str:
    """The bound in words."""
    if not check.comparison:
        return "reported"
    bound, unit = check.bound, check.unit or ""
    of = f" {bound.times:g} times" if bound.times != 1 else ""
    if bound.number is not None:
        what = f"{short(bound.number)} {unit}".strip()
    elif bound.subject:
        what = bound.subject
    else:
        what = "the seeds' spread"
    return f"{COMPARISONS[check.comparison][1]}{of} {what}".strip()


def short(value: float) -> str:
    """Four digits."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _row(group: str, inherited: Mapping[str, Any], given: dict[str, Any]) -> Row:
    place = f"{group}, {given.get('claim', given)}"
    own = {**inherited, **{name: given.pop(name) for name in INHERITED if name in given}}
    checks = tuple(_check(place, {**own, **check}) for check in given.pop("checks", ()))
    unknown = {*given, *inherited} - {field.name for field in fields(Row)} - {*INHERITED}
    if unknown:
        raise ValueError(f"{place}: unknown keys {', '.join(sorted(unknown))}")
    tests, pages = (tuple(given.pop(name, ())) for name in ("tests", "pages"))
    row = Row(group=group, checks=checks, tests=tests, pages=pages, **given)
    if not (checks or tests or pages):
        raise ValueError(f"{place}: neither checks nor tests nor pages")
    if not checks and not row.bar:
        raise ValueError(f"{place}: a row without checks needs a bar")
    return row


def _check(place: str, given: dict[str, Any]) -> Check:
    compared = [name for name in COMPARISONS if name in given]
    if len(compared) > 1 or "benchmark" not in given:
        raise ValueError(f"{place}: a check has a benchmark and at most one of {', '.join(COMPARISONS)}")
    known = {field.name for field in fields(Check)} - {"comparison", "bound"}
    if unknown := {*given} - known - {*compared}:
        raise ValueError(f"{place}: unknown keys {', '.join(sorted(unknown))}")
    if not compared:
        return Check(**given)
    bound = given.pop(compared[0])
    bound = Bound(**bound) if isinstance(bound, dict) else Bound(number=float(bound))
    return Check(comparison=compared[0], bound=bound, **given)


def _lines(check: Check, subject: str, lines: Lines) -> list[Mapping[str, Any]]:
    return [
        line
        for (benchmark, name, device), line in lines.items()
        if (benchmark, device) == (check.benchmark, check.device) and fnmatchcase(name, subject)
    ]


def _numbers(check: Check, line: Mapping[str, Any]) -> list[float]:
    return [*line["repeats"]] if check.each else [line["median"]]


def _bounds(check: Check, numbers: Sequence[float], lines: Lines) -> list[float] | None:
    """One for each number; None where the line that they come from is missing."""
    bound = check.bound
    if bound.spread:
        other = _lines(check, bound.spread, lines)
        if bound.spread != "own" and not other:
            return None
        values = numbers if bound.spread == "own" else [value * check.scale for value in other[0]["repeats"]]
        return [bound.times * (max(values) - min(values))] * len(numbers)
    if bound.subject:
        (line,) = _lines(check, bound.subject, lines)
        values = [bound.times * check.scale * value for value in _numbers(check, line)]
        return values if len(values) == len(numbers) else [line["median"] * bound.times * check.scale] * len(numbers)
    return [bound.number or 0.0] * len(numbers)


def _text(check: Check, numbers: Sequence[float], bounds: Sequence[float], unit: str) -> str:
    unit = unit if check.unit is None else check.unit
    many = len(numbers) > SHOWN_NUMBERS
    shown = ", ".join(map(short, numbers))
    if many and check.comparison:
        shown = short(_worst(check.comparison, numbers, bounds))
    elif many:
        shown = f"{short(min(numbers))} to {short(max(numbers))}"
    if check.bound.subject and not many:
        times = check.bound.times
        others = [short(bound / times) for bound in bounds]
        shown += (
            f" against {f'{times:.3g} times ' * (times != 1)}{', '.join(others if len({*others}) > 1 else others[:1])}"
        )
    shown = f"{shown} {unit}".strip()
    if check.bound.spread:
        shown += f"; the spread is {short(abs(bounds[0] / check.bound.times))}"
    elif many and check.comparison:
        shown += f" (the worst of {len(numbers)})"
    return f"{check.name}: {shown}" if check.name else shown


def _worst(comparison: str, numbers: Sequence[float], bounds: Sequence[float]) -> float:
    """The number that is nearest to missing its bound, or misses it by most."""
    if comparison == "equal":
        return max(zip(numbers, bounds, strict=True), key=lambda pair: abs(pair[0] - pair[1]))[0]
    sign = -1 if comparison in ("at_least", "above") else 1
    return max(zip(numbers, bounds, strict=True), key=lambda pair: sign * (pair[0] - pair[1]))[0]
