"""Which classes stay in the race: how many units are measured in each round, and who survives it.

Shapes: A classes still in the race, J times so far. A policy sees values `(A, J)` float64 (weighted costs, a pair of
units averaged) and nothing else, so that its decisions can not depend on batches, workers or other pictures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixmodal.classification.paired import among_best, compare, significantly_worse
from mixmodal.classification.units import (
    TimeDensity,
    TimeOrder,
    Unit,
    build_units,
    draw_times,
    even_times,
)


class Policy(ABC):
    """How many times each round measures, and which classes go on to the next."""

    @abstractmethod
    def build_units(self, *, seed: int, num_templates: int = 1, density: TimeDensity | None = None) -> list[Unit]:
        """All units that a class may be measured at, in the order of evaluation."""

    @abstractmethod
    def round_ends(self) -> Iterator[int]:
        """How many times are measured by the end of each round, rising."""

    @abstractmethod
    def survivors(self, values: np.ndarray, times: np.ndarray, num_classes: int, round_index: int) -> np.ndarray:
        """Which of the classes go on, `(A,)` bool, at least one.

        Args:
            values: weighted costs `(A, J)`, A at least 2.
            times: of the columns, `(J,)`.
            num_classes: with which the race began.
            round_index: of the round that has ended, from 0.
        """


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """All classes at all times: the exact comparison, which spends most.

    Args:
        num_times: times.
        order: of times.
        antithetic: pairs of noises from the second time on.
    """

    num_times: int = 256
    order: TimeOrder = "low_discrepancy"
    antithetic: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_times")

    def build_units(self, *, seed: int, num_templates: int = 1, density: TimeDensity | None = None) -> list[Unit]:
        times = draw_times(self.order, self.num_times, seed)
        return build_units(times, antithetic=self.antithetic, num_templates=num_templates, seed=seed, density=density)

    def round_ends(self) -> Iterator[int]:
        yield self.num_times

    def survivors(self, values: np.ndarray, times: np.ndarray, num_classes: int, round_index: int) -> np.ndarray:
        return np.ones(len(values), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Staged(Policy):
    """The fixed schedule of the published Diffusion Classifier (arXiv 2303.16203, "Efficient Classification").

    Of an even grid of max(samples) steps, each stage takes an evenly spaced part and measures what is new in it; the
    best few classes go on. Where classes tie for the last place, all of them go on. One stage is the grid for all
    classes: `Staged(samples=(250,), keep=(1,))` is every fourth step of a thousand.

    Args:
        samples: times of the grid that a class is measured at by the end of each stage, where stages nest; rising.
        keep: classes that go on after each stage, falling to 1.
        num_steps: discrete steps of the schedule that the grid is laid on.
    """

    samples: tuple[int, ...] = (20, 50, 100, 500)
    keep: tuple[int, ...] = (20, 10, 5, 1)
    num_steps: int = 1000

    def __post_init__(self) -> None:
        samples, keep = self.samples, self.keep
        if len(samples) != len(keep) or not samples:
            raise ValueError(f"staged policy: samples {samples} and keep {keep} need a number each for every stage")
        if sorted(set(samples)) != list(samples) or samples[0] < 1:
            raise ValueError(f"staged policy: samples {samples} must rise, from at least 1")
        if sorted(keep, reverse=True) != list(keep) or keep[-1] != 1:
            raise ValueError(f"staged policy: keep {keep} must fall, to 1")
        if samples[-1] > self.num_steps:
            raise ValueError(f"staged policy: {samples[-1]} samples, but the schedule has {self.num_steps} steps")

    def _stages(self) -> list[list[int]]:
        """Places of the grid that each stage adds."""
        size, seen, stages = self.samples[-1], set(), []
        for num in self.samples:
            stride = size // num
            chosen = range(stride // 2, size, stride)[:num]
            stages.append([place for place in chosen if place not in seen])
            seen.update(chosen)
        return stages

    def build_units(self, *, seed: int, num_templates: int = 1, density: TimeDensity | None = None) -> list[Unit]:
        if density is not None:
            raise ValueError("staged policy: its times are a fixed grid, which a density can not act on; leave it out")
        grid = even_times(self.samples[-1], self.num_steps)
        order = np.concatenate([np.array(stage, dtype=np.int64) for stage in self._stages()])
        return build_units(grid[order], num_templates=num_templates, seed=seed)

    def round_ends(self) -> Iterator[int]:
        yield from np.cumsum([len(stage) for stage in self._stages()]).tolist()

    def survivors(self, values: np.ndarray, times: np.ndarray, num_classes: int, round_index: int) -> np.ndarray:
        return among_best(values.mean(axis=1), self.keep[round_index])


@dataclass(frozen=True, kw_only=True)
class TTest(Policy):
    """Classes go when a paired t-test against the best finds them worse (arXiv 2303.15233, section 3.1).

    Args:
        p_value: below which a class goes; of a two-sided test.
        min_times: times before the first test.
        max_times: times after which the race ends.
        order: of times; the paper draws them at random.
    """

    p_value: float = 2e-3
    min_times: int = 20
    max_times: int = 2000
    order: TimeOrder = "random"

    def __post_init__(self) -> None:
        _check_test(self)

    def build_units(self, *, seed: int, num_templates: int = 1, density: TimeDensity | None = None) -> list[Unit]:
        times = draw_times(self.order, self.max_times, seed)
        return build_units(times, num_templates=num_templates, seed=seed, density=density)

    def round_ends(self) -> Iterator[int]:
        yield from range(self.min_times, self.max_times + 1)

    def survivors(self, values: np.ndarray, times: np.ndarray, num_classes: int, round_index: int) -> np.ndarray:
        return ~significantly_worse(compare(values), self.p_value / 2)


@dataclass(frozen=True, kw_only=True)
class Adaptive(Policy):
    """Antithetic pairs, a one-sided paired t-test on their means, and a cap on the survivors.

    Args:
        p_value: below which a class goes; of a one-sided test. It bounds one test of the many of a race.
        min_times: times before the first test.
        max_times: times after which the race ends: the budget; two evaluations each, but the first.
        times_per_round: times between tests.
        cap: after j times at most cap * num_classes / j classes go on, but at least two: the cap alone never decides
            between the last. It bounds the evaluations; where all classes are close it loses the best more often than
            the test does, and a larger one is safer.
        antithetic: pairs of noises from the second time on.
        variance: `successive` leaves out of the test's variance what changes slowly over time (`paired.compare`);
            `plain` is that of independent times, the only one that is right for random ones.
        order: of times.
    """

    p_value: float = 2e-3
    min_times: int = 4
    max_times: int = 128
    times_per_round: int = 1
    cap: float = 8.0
    antithetic: bool = True
    variance: Literal["successive", "plain"] = "successive"
    order: TimeOrder = "low_discrepancy"

    def __post_init__(self) -> None:
        _check_test(self)
        if self.variance not in ("successive", "plain"):
            raise ValueError(f"Adaptive policy: variance {self.variance!r} is unknown; choose successive or plain")
        if self.order == "random" and self.variance == "successive":
            raise ValueError(
                "Adaptive policy: random times do not cover time evenly, so that their variance over time is an error "
                "of the mean, which variance=successive leaves out; choose variance=plain or order=low_discrepancy"
            )
        _check_positive(self, "times_per_round", "cap")

    def build_units(self, *, seed: int, num_templates: int = 1, density: TimeDensity | None = None) -> list[Unit]:
        times = draw_times(self.order, self.max_times, seed)
        return build_units(times, antithetic=self.antithetic, num_templates=num_templates, seed=seed, density=density)

    def round_ends(self) -> Iterator[int]:
        ends = range(self.min_times, self.max_times, self.times_per_round)
        yield from ends
        yield self.max_times

    def survivors(self, values: np.ndarray, times: np.ndarray, num_classes: int, round_index: int) -> np.ndarray:
        compared = compare(values, times if self.variance == "successive" else None)
        limit = max(2, math.ceil(self.cap * num_classes / values.shape[1]))
        return ~significantly_worse(compared, self.p_value) & among_best(compared.means, limit)


def _check_positive(policy: Policy, *names: str) -> None:
    for name in names:
        if getattr(policy, name) <= 0:
            raise ValueError(f"{type(policy).__name__} policy: {name} is {getattr(policy, name)}; it must be above 0")


def _check_test(policy: TTest | Adaptive) -> None:
    name = type(policy).__name__
    if not 0 < policy.p_value < 0.5:
        raise ValueError(f"{name} policy: p_value is {policy.p_value}; give one above 0 and below 0.5")
    if policy.order == "even":
        raise ValueError(
            f"{name} policy: even times rise, so that the first of them cover a part of the schedule only; choose "
            "order=low_discrepancy or random"
        )
    if not 2 <= policy.min_times <= policy.max_times:
        raise ValueError(
            f"{name} policy: min_times is {policy.min_times} and max_times {policy.max_times}; a test needs at least "
            "2 times, and no more than there are"
        )
