"""What costs are measured at: times, noises and templates that all classes of a picture share.

Differences between classes at one unit have far less variance than the costs themselves, so a classifier compares
classes unit by unit (arXiv 2303.15233, section 3.1; arXiv 2303.16203, "Variance Reduction via Difference Testing"). A
unit is drawn from its index alone: it is the same for every picture, worker, batch and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

TimeOrder = Literal["low_discrepancy", "even", "random"]
NUM_BINS = 1000
"""Of a density over time."""
DEGREE = 6
"""Of the polynomial that smooths the logarithm of a measured spread."""


class Unit(NamedTuple):
    """What costs are measured at, the same for all classes of a picture.

    Args:
        index: place in the bank, which is the order of evaluation.
        time: u in (0, 1), share of the schedule (or of whatever the scorer has).
        noise: which noise of the bank; an antithetic pair shares it.
        sign: +1 or -1, of the noise.
        template: which prompt template.
        weight: of the cost: 1, or 1 / density where times are drawn by importance.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # no tuple is searched
    time: float
    noise: int
    sign: int
    template: int
    weight: float


class Scorer(Protocol):
    """Whatever measures how badly classes fit pictures.

    It may have a `scale`, float: the factor that makes a mean cost a sum in nats (D / 2 for a mean squared error over
    D numbers).
    """

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        """Costs of n (picture, class, unit) triples, float64 `(n,)`: lower fits better. One batch; any mixture."""
        ...


def low_discrepancy_times(num_times: int) -> np.ndarray:
    """The van der Corput sequence in base 2 from its second element on, `(num_times,)` float64 in (0, 1).

    Every beginning of it is near-uniform: 1/2, 1/4, 3/4, 1/8, 5/8, ...
    """
    numbers, times, digit = np.arange(1, num_times + 1), np.zeros(num_times), 0.5
    while numbers.any():
        times += digit * (numbers & 1)
        numbers, digit = numbers >> 1, digit / 2
    return times


def even_times(num_times: int, num_steps: int | None = None) -> np.ndarray:
    """Evenly spaced times, rising, `(num_times,)` float64 in (0, 1).

    Args:
        num_steps: discrete steps of the schedule. Then `floor(time * num_steps)` are the steps s // 2, s // 2 + s, ...
            with s = num_steps // num_times, as in the published code of arXiv 2303.16203; without it the times are the
            middles of equal intervals.

    Raises:
        ValueError: for more times than steps.
    """
    if num_steps is None:
        return (np.arange(num_times) + 0.5) / num_times
    if num_times > num_steps:
        raise ValueError(
            f"{num_times} even times do not fit into a schedule of {num_steps} steps; give at most as many"
        )
    stride = num_steps // num_times
    return (stride // 2 + stride * np.arange(num_times) + 0.5) / num_steps


def random_times(num_times: int, seed: int) -> np.ndarray:
    """Independent uniform times, `(num_times,)` float64 in (0, 1); a longer draw of a seed starts as a shorter one."""
    found = np.random.default_rng([seed, 0]).random(num_times)
    return np.clip(found, np.finfo(np.float64).tiny, None)


def draw_times(order: TimeOrder, num_times: int, seed: int) -> np.ndarray:
    """Times of one of the orders, `(num_times,)` float64 in (0, 1).

    Raises:
        ValueError: for an unknown order.
    """
    if order == "low_discrepancy":
        return low_discrepancy_times(num_times)
    if order == "even":
        return even_times(num_times)
    if order == "random":
        return random_times(num_times, seed)
    raise ValueError(f"order of times {order!r} is unknown; choose low_discrepancy, even or random")


@dataclass(frozen=True, kw_only=True)
class TimeDensity:
    """A density over time, constant in equal bins.

    Args:
        values: density in each bin, float64 `(NUM_BINS,)`, of mean 1, above 0.
    """

    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not np.isfinite(self.values).all() or (self.values <= 0).any():
            raise ValueError("a density over time needs a row of finite values above 0")
        if abs(self.values.mean() - 1) > 1e-9:
            raise ValueError(f"a density over time has mean 1, not {self.values.mean():.6g}")

    def at(self, times: np.ndarray) -> np.ndarray:
        """The density at `times` `(n,)`, float64 `(n,)`."""
        return self.values[np.minimum((times * len(self.values)).astype(np.int64), len(self.values) - 1)]

    def place(self, shares: np.ndarray) -> np.ndarray:
        """The times below which `shares` `(n,)` of the mass lie, float64 `(n,)`: uniform shares become draws."""
        mass = np.concatenate([[0.0], self.values.cumsum()]) / self.values.sum()
        return np.interp(shares, mass, np.linspace(0, 1, len(mass)))


def fit_density(times: np.ndarray, spreads: np.ndarray, uniform_share: float = 0.15) -> TimeDensity:
    """A density proportional to a measured spread, smoothed, and mixed with the uniform one.

    Args:
        times: where it was measured, `(n,)` in (0, 1), at least 8 different ones.
        spreads: at each time, `(n,)`, for example the class spread that `measure_spread` finds; zeros are left out.
        uniform_share: of the mixture, in (0, 1]: no weight is above its inverse.

    Raises:
        ValueError: for too few times, a spread that is not finite, or a share out of range.
    """
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share is {uniform_share}; give a share above 0 and at most 1")
    if not np.isfinite(spreads).all() or (spreads < 0).any():
        raise ValueError("the spread of the classes is not finite and non-negative at every time")
    seen = spreads > 0
    if len(np.unique(times[seen])) < DEGREE + 2:
        raise ValueError(
            f"classes differ at {len(np.unique(times[seen]))} different times of the pilot; "
            f"{DEGREE + 2} are needed for a density: use more times, or no density"
        )
    smooth = np.polynomial.Polynomial.fit(times[seen], np.log(spreads[seen]), DEGREE, domain=[0, 1])
    bins = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    # the polynomial is not trusted beyond the times that it was fitted to
    logarithm = smooth(np.clip(bins, times[seen].min(), times[seen].max()))
    density = np.exp(logarithm - logarithm.max())
    return TimeDensity(values=(1 - uniform_share) * density / density.mean() + uniform_share)


def measure_spread(scorer: Scorer, pictures: Sequence[int], num_classes: int, units: Sequence[Unit]) -> np.ndarray:
    """Root mean square over unlabelled pilot pictures of the deviation of costs over classes, `(len(units),)` float64.

    It costs `len(pictures) * num_classes * len(units)` evaluations.

    Raises:
        ValueError: naming picture, class and time of a cost that is not finite.
    """
    squares = np.zeros(len(units))
    for picture in pictures:
        for place, unit in enumerate(units):
            found = scorer.cost([picture] * num_classes, range(num_classes), [unit] * num_classes)
            check_costs(found, [picture] * num_classes, range(num_classes), [unit] * num_classes)
            squares[place] += np.var(found)
    return np.sqrt(squares / len(pictures))


def build_units(
    times: np.ndarray,
    *,
    antithetic: bool = False,
    num_templates: int = 1,
    seed: int = 0,
    density: TimeDensity | None = None,
) -> list[Unit]:
    """The units at `times` `(n,)`, in this order.

    Templates come in rounds, each once a round, in an order drawn for the round: a fixed order would couple templates
    to times (every second element of a van der Corput sequence lies in one half).

    Args:
        antithetic: from the second time on a pair of units, of one noise with both signs.
        num_templates: prompt templates that are cycled over the times; a pair shares its template.
        seed: of the templates' order.
        density: what `times` are drawn by: they are taken as shares of its mass, and weights are 1 / density.

    Raises:
        ValueError: for times out of (0, 1), or fewer than one template.
    """
    if num_templates < 1:
        raise ValueError(f"num_templates is {num_templates}; at least one prompt template is needed")
    if len(times) == 0 or times.min() <= 0 or times.max() >= 1:
        raise ValueError("times of units are at least one number, and all above 0 and below 1")
    generator = np.random.default_rng([seed, 1])
    rounds = [generator.permutation(num_templates) for _ in range(-(-len(times) // num_templates))]
    templates = np.concatenate(rounds)
    weights = np.ones(len(times))
    if density is not None:
        times = density.place(times)
        weights = 1 / density.at(times)
    units: list[Unit] = []
    for noise, (time, template, weight) in enumerate(zip(times.tolist(), templates.tolist(), weights.tolist())):
        for sign in (1, -1) if antithetic and noise else (1,):
            units.append(Unit(len(units), time, noise, sign, template, weight))
    return units


def draw_noise(seed: int, unit: Unit, shape: Sequence[int]) -> Tensor:
    """The signed noise of a unit, float32 of `shape` on the CPU: standard normal, from (seed, unit.noise) alone."""
    (state,) = np.random.SeedSequence([seed, unit.noise]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state) >> 1)
    return unit.sign * torch.randn(*shape, generator=generator, dtype=torch.float32)


def check_costs(costs: np.ndarray, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> None:
    """Complains about costs of a batch that are missing or not finite.

    Raises:
        ValueError: naming picture, class and time of the first.
    """
    if costs.shape != (len(units),):
        raise ValueError(f"the scorer gave costs of shape {costs.shape} for {len(units)} triples; it must be one each")
    broken = np.flatnonzero(~np.isfinite(costs))
    if len(broken):
        first = int(broken[0])
        raise ValueError(
            f"the cost of picture {pictures[first]}, class {classes[first]} at time {units[first].time:.6g} "
            f"(unit {units[first].index}) is {costs[first]}, not a finite number ({len(broken)} of {len(costs)} in the "
            "batch); check the picture, and the precision of the model"
        )
