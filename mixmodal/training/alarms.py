"""Alarms on growth of quantities that grow before a divergence (Chameleon, arXiv 2405.09818, section 2.3.2).

A quantity is compared with the median of all its logged values so far, those of the warm-up left out. So a spike shows
at once, slow exponential growth shows in time, and growth by a steady amount, whose newest value is twice its median,
does not show for factors above 2. Seen in 14 sound runs of the quickstart's recipes: 1.9 times at most.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMEDIES = {
    "grad_norm": "look at the rows of these steps, lower optimizer.lr, or lengthen optimizer.warmup_steps",
    "logit_norm": "raise z_loss_weight, or lower optimizer.lr",
    "output_norm": "lower optimizer.lr; in a new run, set model.qk_norm, or model.norm_placement post_sublayer",
    "attention_logit_max": "lower optimizer.lr; in a new run, set model.qk_norm",
}
"""What is watched, by its name in the metrics, and what has helped against its growth."""
MIN_LINES = 10
"""Logged values that a median needs before anything is compared with it."""
MAX_KEPT = 512
"""Most values that are kept of a quantity; then every second one is dropped, and half as many are taken."""


class Alarms:
    """Watches the metrics of a run.

    Args:
        growth: the factor over the median at which a warning is given; 0 watches nothing.
        first_step: lines of steps before this one are not looked at: those of the warm-up.
    """

    def __init__(self, growth: float, first_step: int) -> None:
        self.growth, self.first_step = growth, first_step
        self._histories: dict[str, _History] = {}
        self._raised: set[str] = set()

    def watch(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Takes one line of metrics; warnings by quantity, one for each time that it passes the factor."""
        if not self.growth or record["step"] < self.first_step:
            return {}
        warnings = {}
        for name, remedy in REMEDIES.items():
            value = record.get(name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            history = self._histories.setdefault(name, _History())
            median = history.median()
            history.add(value)
            if median is None or median <= 0 or value <= self.growth * median:
                self._raised.discard(name)
            elif name not in self._raised:
                self._raised.add(name)
                warnings[name] = (
                    f"step {record['step']}: {name} is {value:.4g}, {value / median:.1f} times the median so far "
                    f"({median:.4g}), which often ends in a divergence. Go back to an earlier checkpoint: {remedy}"
                )
        return warnings

    def replay(self, metrics: Path) -> None:
        """Takes the lines that an earlier call wrote, so that going on is like never having stopped."""
        if self.growth and metrics.is_file():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                self.watch(json.loads(line))


class _History:
    """Values of one quantity, thinned evenly where they become many."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._every, self._count = 1, 0

    def add(self, value: float) -> None:
        if self._count % self._every == 0:
            self._values.append(value)
            if len(self._values) > MAX_KEPT:
                self._values, self._every = self._values[::2], 2 * self._every
        self._count += 1

    def median(self) -> float | None:
        """Of what was added; None where that is too little."""
        return statistics.median(self._values) if len(self._values) >= MIN_LINES else None
