"""Classes race over units: a policy says who goes on, and a queue over pictures keeps the batches full.

Shapes: K classes, A of them still in the race, U units, J times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixmodal.classification.paired import compare, tie_tolerance
from mixmodal.classification.policies import Policy
from mixmodal.classification.templates import check_number
from mixmodal.classification.units import Scorer, TimeDensity, Unit, check_costs
from mixmodal.config import check_least


@dataclass(frozen=True, kw_only=True)
class EliminationConfig:
    """How a race is held; none of it but the seed changes a decision.

    Args:
        batch_size: (picture, class, unit) triples that the scorer is given at once; only the last batches are smaller.
        max_in_flight: pictures that are in the race at once; more are let in only where a batch is not full.
        seed: of random times and of the order of templates.
        num_templates: prompt templates that the scorer has.
    """

    batch_size: int = 64
    max_in_flight: int = 256
    seed: int = 0
    num_templates: int = 1

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size", "max_in_flight", "num_templates", section="elimination.")


class Outcome(NamedTuple):
    """What a race found for one picture, each but `num_rounds` `(K,)`.

    Args:
        costs: weighted mean costs, float64. A class that went early has no mean over all times: its cost is that of the
            class that was best when it went, plus how far it was behind then, so it is never below the best.
        logits: -scale * costs, float64, in nats where the scorer gives a scale.
        probabilities: softmax of the logits (equal priors), float64, above 0 for a class that went early, too.
        standard_errors: of a class's mean paired difference to the best over the times that both have, float64; NaN
            with fewer than two times.
        evaluations: that each class took, int64.
        tied: which classes share the best cost, bool: one, or more where there is a tie. A tie is for the caller to
            judge: no class is better for standing first.
        is_left: which classes were in the race to its end, bool.
        num_rounds: rounds that were held.
    """

    costs: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    standard_errors: np.ndarray
    evaluations: np.ndarray
    tied: np.ndarray
    is_left: np.ndarray
    num_rounds: int

    @property
    def num_evaluations(self) -> int:
        """Of all classes."""
        return int(self.evaluations.sum())


class Plan(NamedTuple):
    """What all races share: U units, and how they lie at J times.

    Args:
        policy: who goes on.
        num_classes: K.
        units: in the order of evaluation.
        weights: of the units, `(U,)`.
        starts: the first unit of each time, and U, `(J + 1,)`.
        times: `(J,)`.
        round_ends: times that are measured by the end of each round.
    """

    policy: Policy
    num_classes: int
    units: list[Unit]
    weights: np.ndarray
    starts: np.ndarray
    times: np.ndarray
    round_ends: list[int]


class Departure(NamedTuple):
    """A class that left the race: when, and what was best then."""

    left: int
    num_times: int
    best: np.ndarray


class Race:
    """One picture's costs so far, and which classes are still in the race."""

    def __init__(self, plan: Plan, picture: int) -> None:
        self.plan, self.picture = plan, picture
        self.alive = np.ones(plan.num_classes, dtype=bool)
        self.evaluations = np.zeros(plan.num_classes, dtype=np.int64)
        self.departures: list[Departure] = []
        self.num_rounds, self.num_times, self.num_pending = 0, 0, 0
        self.costs = np.full((plan.num_classes, 0), np.nan)

    def open_round(self) -> tuple[np.ndarray, np.ndarray]:
        """The classes and units `(n,)` of the next round, unit by unit."""
        first, self.num_times = self.num_times, self.plan.round_ends[self.num_rounds]
        units = np.arange(self.plan.starts[first], self.plan.starts[self.num_times])
        self._make_room(int(units[-1]) + 1)
        classes = np.flatnonzero(self.alive)
        self.num_pending = len(units) * len(classes)
        return np.tile(classes, len(units)), np.repeat(units, len(classes))

    def _make_room(self, num_units: int) -> None:
        if num_units > self.costs.shape[1]:
            size = min(max(num_units, 2 * self.costs.shape[1]), len(self.plan.units))
            more = np.full((self.plan.num_classes, size - self.costs.shape[1]), np.nan)
            self.costs = np.concatenate([self.costs, more], axis=1)

    def add(self, classes: np.ndarray, units: np.ndarray, costs: np.ndarray) -> None:
        """Takes costs `(n,)` of some triples of the round."""
        self.costs[classes, units] = costs
        np.add.at(self.evaluations, classes, 1)
        self.num_pending -= len(costs)

    def values(self, classes: np.ndarray, num_times: int) -> np.ndarray:
        """Weighted costs at the first times, pairs averaged, `(len(classes), num_times)`."""
        starts = self.plan.starts[: num_times + 1]
        weighted = self.costs[classes, : starts[-1]] * self.plan.weights[: starts[-1]]
        return np.add.reduceat(weighted, starts[:-1], axis=1) / np.diff(starts)

    def close_round(self) -> bool:
        """Lets classes go; whether the race is over."""
        round_index, classes = self.num_rounds, np.flatnonzero(self.alive)
        self.num_rounds += 1
        if self.num_rounds == len(self.plan.round_ends):
            return True
        if len(classes) > 1:
            values = self.values(classes, self.num_times)
            times = self.plan.times[: self.num_times]
            stay = self.plan.policy.survivors(values, times, self.plan.num_classes, round_index)
            means = values.mean(axis=1)
            best = classes[means == means.min()]
            assert stay[means == means.min()].all(), "a policy let the best class go"
            self.departures += [Departure(int(left), self.num_times, best) for left in classes[~stay]]
            self.alive[classes[~stay]] = False
        return int(self.alive.sum()) == 1

    def outcome(self, scale: float) -> Outcome:
        """What was found, once the race is over."""
        num_classes, classes = self.plan.num_classes, np.flatnonzero(self.alive)
        costs, errors = np.zeros(num_classes), np.zeros(num_classes)
        values = self.values(classes, self.num_times)
        compared = compare(values)
        costs[classes], errors[classes] = compared.means, compared.standard_errors
        winners = classes[compared.means == compared.means.min()]
        for left, num_times, best in reversed(self.departures):
            row, *others = self.values(np.array([left, *best]), num_times)
            costs[left] = min(costs[other] + (row - own).mean() for other, own in zip(best, others))
        for left, num_times, _ in self.departures:
            row, *others = self.values(np.array([left, *winners]), num_times)
            spreads = [(row - own).std(ddof=1) if num_times > 1 else np.nan for own in others]
            errors[left] = max(spreads) / np.sqrt(num_times)
        tied = np.zeros(num_classes, dtype=bool)
        tied[classes] = compared.excesses <= tie_tolerance(compared.means)
        logits = -scale * costs
        odds = np.exp(logits - logits.max())
        chances = np.maximum(odds / math.fsum(odds), np.finfo(np.float64).tiny)  # in any order the same sum
        return Outcome(costs, logits, chances, errors, self.evaluations, tied, self.alive.copy(), self.num_rounds)


class Elimination:
    """Scores pictures by races of their classes.

    Decisions depend on the costs of a picture alone: not on the batch size, the other pictures, the order of the
    classes, or how pictures are shared among workers.

    Args:
        scorer: measures triples; its `scale`, where it has one, makes the logits.
        num_classes: K, at least 2.
        policy: who goes on.
        density: what times are drawn by, for example from `fit_density`; workers that share pictures need the same.

    Raises:
        ValueError: for fewer than two classes, or a density that can not act on the policy.
    """

    def __init__(
        self,
        scorer: Scorer,
        num_classes: int,
        policy: Policy,
        config: EliminationConfig | None = None,
        density: TimeDensity | None = None,
    ) -> None:
        check_number(num_classes)
        self.scorer, self.config = scorer, config or EliminationConfig()
        units = policy.build_units(seed=self.config.seed, num_templates=self.config.num_templates, density=density)
        noises = np.array([unit.noise for unit in units])
        starts = np.flatnonzero(np.diff(noises, prepend=-1))
        self.plan = Plan(
            policy,
            num_classes,
            units,
            np.array([unit.weight for unit in units]),
            np.append(starts, len(units)),
            np.array([units[start].time for start in starts]),
            list(policy.round_ends()),
        )

    def score(self, pictures: Sequence[int]) -> list[Outcome]:
        """Outcomes in the order of the pictures, which are what the scorer calls them.

        Raises:
            ValueError: naming picture, class and time of a cost that is not finite.
        """
        found = dict(self.stream(pictures))
        return [found[place] for place in range(len(pictures))]

    def stream(self, pictures: Iterable[int]) -> Iterator[tuple[int, Outcome]]:
        """Outcomes as they are found, each with its picture's place among `pictures`.

        Raises:
            ValueError: naming picture, class and time of a cost that is not finite.
        """
        waiting = enumerate(pictures)
        queue: deque[_Part] = deque()
        num_queued, num_racing, all_started = 0, 0, False
        scale = float(getattr(self.scorer, "scale", 1.0))

        def open_round(place: int, race: Race) -> int:
            queue.append(_Part(place, race, *race.open_round()))
            return race.num_pending

        while True:
            while num_queued < self.config.batch_size and num_racing < self.config.max_in_flight and not all_started:
                if (entry := next(waiting, None)) is None:
                    all_started = True
                    break
                num_queued += open_round(entry[0], Race(self.plan, entry[1]))
                num_racing += 1
            if not num_queued:
                return
            parts = _take(queue, self.config.batch_size)
            num_queued -= sum(len(part.units) for part in parts)
            self._measure(parts)
            for part in parts:
                if part.race.num_pending:
                    continue
                if part.race.close_round():
                    num_racing -= 1
                    yield part.place, part.race.outcome(scale)
                else:
                    num_queued += open_round(part.place, part.race)

    def _measure(self, parts: Sequence[_Part]) -> None:
        pictures = [one for part in parts for one in [part.race.picture] * len(part.units)]
        classes = [one for part in parts for one in part.classes.tolist()]
        units = [self.plan.units[index] for part in parts for index in part.units.tolist()]
        costs = np.asarray(self.scorer.cost(pictures, classes, units), dtype=np.float64)
        check_costs(costs, pictures, classes, units)
        start = 0
        for part in parts:
            part.race.add(part.classes, part.units, costs[start : start + len(part.units)])
            start += len(part.units)


class _Part(NamedTuple):
    """Triples of one picture: its place and race, and classes and units `(n,)` of its round."""

    place: int
    race: Race
    classes: np.ndarray
    units: np.ndarray


def _take(queue: deque[_Part], num: int) -> list[_Part]:
    """Takes `num` triples, or all, from the front of the queue."""
    taken: list[_Part] = []
    while queue and num:
        part = queue.popleft()
        if len(part.units) > num:
            queue.appendleft(part._replace(classes=part.classes[num:], units=part.units[num:]))
            part = part._replace(classes=part.classes[:num], units=part.units[:num])
        taken.append(part)
        num -= len(part.units)
    return taken
