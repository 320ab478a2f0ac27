"""Records the figures of a quickstart run:  python benchmarks/record_quickstart.py runs/quickstart"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from record import append

UNITS = {"seconds": "s", "peak_memory_bytes": "bytes", "psnr_heldout": "dB", "ssim_heldout": "SSIM"}
LEFT_OUT = ("versions", "commit", "counts", "stages")


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
    for name, value in read_figures(summary).items():
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
