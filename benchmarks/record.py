"""One JSON line a measurement, with all that is needed to judge it and to repeat it: written and read."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def record(
    benchmark: str, subject: str, repeats: Sequence[float], unit: str, device_kind: str, config: dict[str, Any]
) -> dict[str, Any]:
    """Appends what the running script has measured, here and now.

    Args:
        benchmark: name of the file and of the table.
        subject: what was measured, in a few words.
        repeats: the values, in the order measured.
        unit: of the values.
        device_kind: `cpu` or `cuda`.
        config: what the value depends on.
    """
    from mixmodal.environment import commit, device, versions

    return append(
        benchmark=benchmark,
        subject=subject,
        repeats=list(repeats),
        unit=unit,
        device=device(device_kind),
        device_kind=device_kind,
        commit=commit(),
        versions=versions(),
        command=command(),
        config=config,
    )


def append(**fields: Any) -> dict[str, Any]:
    """Appends a line to `results/BENCHMARK.jsonl`, with date and median, and prints it in short."""
    line = {**fields, "date": now(), "median": statistics.median(fields["repeats"])}
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{line['benchmark']}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{line['benchmark']}, {line['subject']}: {line['median']:,.4g} {line['unit']}")
    return line


def read_lines(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All measurements, oldest first."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["date"])


def newest(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Of measurements, oldest first, the last of each benchmark, subject and kind of device."""
    return {(line["benchmark"], line["subject"], line["device_kind"]): line for line in lines}


def command() -> str:
    """The command line that runs this."""
    return " ".join(["python", relative(sys.argv[0]), *sys.argv[1:]])


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def relative(script: str) -> str:
    path = Path(script).resolve()
    root = RESULTS.parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
