"""One JSON line a measurement, with all that is needed to judge it and to repeat it."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def record(
    benchmark: str, subject: str, repeats: Sequence[float], unit: str, device_kind: str, config: dict[str, Any]
) -> dict[str, Any]:
    """Appends a line to `results/BENCHMARK.jsonl` and prints its median.

    Args:
        benchmark: name of the file and of the table.
        subject: what was measured, in a few words.
        repeats: the values, in the order measured.
        unit: of the values.
        device_kind: `cpu` or `cuda`.
        config: what the value depends on.
    """
    from mixmodal.quickstart.environment import commit, device, versions

    line = {
        "benchmark": benchmark,
        "subject": subject,
        "median": statistics.median(repeats),
        "repeats": list(repeats),
        "unit": unit,
        "device_kind": device_kind,
        "device": device(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", relative(sys.argv[0]), *sys.argv[1:]]),
        "versions": versions(),
        "config": config,
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{benchmark}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{benchmark}, {subject}: {line['median']:,.4g} {unit}")
    return line


def relative(script: str) -> str:
    path = Path(script).resolve()
    root = RESULTS.parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
