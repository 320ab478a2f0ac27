"""Records the figures of a quickstart run and says which floors they meet.

python benchmarks/record_quickstart.py runs/quickstart
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from record import append

UNITS = {"seconds": "s", "peak_memory_bytes": "bytes", "psnr_heldout": "dB", "ssim_heldout": "SSIM"}
LEFT_OUT = ("versions", "commit", "counts", "stages")


class Floor(NamedTuple):
    """What a run must reach: the largest of the figures `names` at or above `bound`, or under it where `below`."""

    names: tuple[str, ...]
    bound: float
    below: bool = False

    def value(self, figures: Mapping[str, float]) -> float | None:
        """None where the figures are missing, or null for want of samples."""
        return max((figures[name] for name in self.names if name in figures), default=None)

    def met(self, figures: Mapping[str, float]) -> bool:
        value = self.value(figures)
        return value is not None and (value < self.bound if self.below else value >= self.bound)


FLOORS = (
    Floor(("seconds",), 600, below=True),
    Floor(("peak_memory_bytes",), 6e9, below=True),
    Floor(("tokenizer.psnr_heldout",), 19),
    Floor(("tokenizer.codebook_usage",), 0.8),
    Floor(("text_to_image.concept_accuracy_trained",), 0.9),
    Floor(("text_to_image.style_accuracy_trained",), 0.98),
    Floor(("text_to_image.style_accuracy_heldout",), 0.75),
    Floor(("text_to_image.concept_accuracy_heldout",), 0.25),
    Floor(("image_to_text.concept_accuracy_trained",), 0.9),
    Floor(("classification.image_given_text_heldout", "classification.text_given_image_heldout"), 0.35),
)


def floor_lines(figures: Mapping[str, float]) -> Iterator[str]:
    """A table of the floors with the value found and whether it is met."""
    for floor in FLOORS:
        first, *others = floor.names
        name = " or ".join([first, *(other.rpartition(".")[2] for other in others)])
        value = floor.value(figures)
        shown = "none" if value is None else f"{value:.4g}"
        bound = f"{'<' if floor.below else '>='} {floor.bound:g}"
        yield f"{name:<68} {shown:>10}  {bound:<8} {'met' if floor.met(figures) else 'NOT met'}"


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
    print("\n".join(floor_lines(figures)))
