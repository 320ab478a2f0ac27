"""Records the figures of a quickstart run and says which bars they reach.

python benchmarks/record_quickstart.py runs/quickstart
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from bars import judge, load_bars
from record import append

UNITS = {"seconds": "s", "peak_memory_bytes": "bytes", "psnr_heldout": "dB", "ssim_heldout": "SSIM"}
LEFT_OUT = ("versions", "commit", "counts", "stages")


def bar_lines(figures: Mapping[str, float]) -> Iterator[str]:
    """A table of the claims about this run, with the value found and whether it reaches the bar."""
    lines = {
        ("quickstart", name, "cpu"): {"median": value, "repeats": [value], "unit": ""}
        for name, value in figures.items()
    }
    rows = [row for _, group in load_bars().values() for row in group]
    for row in rows:
        if row.checks and all(check.benchmark == "quickstart" for check in row.checks):
            found = judge(row, lines)
            yield f"{row.claim:<64} {found.measured or 'none':>20}  {row.stated:<20} {found.verdict}"


def read_figures(summary: dict[str, object], prefix: str = "") -> dict[str, float]:
    """Numbers by dotted name."""
    figures: dict[str, float] = {}
    for key, value in summary.items():
        if isinstance(value, dict) and key not in LEFT_OUT:
            figures |= read_figures(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            figures[f"{prefix}{key}"] = float(value)
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    summary = json.loads((Path(sys.argv[1]) / "summary.json").read_text())
    versions = dict(summary["versions"])
    device = versions.pop("device")
    figures = read_figures(summary)
    for name, value in figures.items():
        unit = UNITS.get(name.split(".")[-1], "tokens/s" if name.startswith("tokens_per") else "")
        append(
            benchmark="quickstart",
            subject=name,
            repeats=[value],
            unit=unit,
            device=device,
            device_kind="cpu" if "cores" in device else "cuda",
            commit=summary["commit"],
            versions=versions,
            command="make quickstart",
            config=summary["counts"],
        )
    print("\n".join(bar_lines(figures)))
