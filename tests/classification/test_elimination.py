"""The engine of the races: independent of batches and order, exact in its counts, loud about broken costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mixmodal.classification.elimination import Elimination, EliminationConfig, Outcome
from mixmodal.classification.policies import Adaptive, Full, Policy, Staged, TTest
from mixmodal.classification.units import TimeDensity, Unit, even_times

POLICIES = [
    Full(num_times=24, antithetic=True),
    Staged(samples=(5, 20, 100), keep=(4, 2, 1)),
    TTest(p_value=1e-2, min_times=5, max_times=60),
    Adaptive(max_times=40),
]
NAMES = [type(policy).__name__ for policy in POLICIES]
MAX_UNITS = 130
EACH = pytest.mark.parametrize("policy", POLICIES, ids=NAMES)


class Synthetic:
    """Costs gap(class) + what all classes of a (picture, unit) share + independent noise; counts what it measures.

    Args:
        gaps: `(P, K)`.
        names: which class stands at each place, `(K,)`, where the order of the classes is changed.
    """

    def __init__(self, gaps: np.ndarray, noise: float = 1.0, names: Sequence[int] | None = None, seed: int = 0) -> None:
        self.gaps, self.noise, self.seed = gaps, noise, seed
        self.names = np.arange(gaps.shape[1]) if names is None else np.asarray(names)
        self.counts = np.zeros(gaps.shape, dtype=np.int64)
        self.seen: set[tuple[int, int, int]] = set()
        self.batches: list[int] = []
        self.drawn: dict[int, np.ndarray] = {}

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        self.batches.append(len(units))
        return np.array([self._one(*triple) for triple in zip(pictures, classes, units)])

    def _one(self, picture: int, place: int, unit: Unit) -> float:
        assert (picture, place, unit.index) not in self.seen, "measured twice"
        self.seen.add((picture, place, unit.index))
        self.counts[picture, place] += 1
        if picture not in self.drawn:
            draw = np.random.default_rng([self.seed, picture]).standard_normal((MAX_UNITS, self.gaps.shape[1] + 1))
            self.drawn[picture] = 10 + 3 * draw[:, :1] + self.noise * draw[:, 1:]
        name = self.names[place]
        return float(self.drawn[picture][unit.index, name] + self.gaps[picture, name])


def draw_gaps(num_pictures: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 3, (num_pictures, num_classes))


def score(scorer: Synthetic, policy: Policy, **options: int) -> list[Outcome]:
    engine = Elimination(scorer, scorer.gaps.shape[1], policy, EliminationConfig(**options))
    return engine.score(range(len(scorer.gaps)))


def assert_same(one: Outcome, other: Outcome, order: np.ndarray | slice = slice(None)) -> None:
    for name in ("costs", "logits", "probabilities", "standard_errors", "evaluations", "tied", "is_left"):
        assert np.array_equal(getattr(one, name)[order], getattr(other, name)), name
    assert one.num_rounds == other.num_rounds


@EACH
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "max_in_flight": 1}, {"batch_size": 5000}])
def test_results_do_not_depend_on_batches_or_on_pictures_in_flight(policy: Policy, options: dict[str, int]) -> None:
    gaps = draw_gaps(5, 6)
    expected = score(Synthetic(gaps), policy, batch_size=64)
    for one, other in zip(score(Synthetic(gaps), policy, **options), expected):
        assert_same(one, other)


@EACH
def test_results_do_not_depend_on_the_order_of_classes_or_on_sharding(policy: Policy) -> None:
    gaps, order = draw_gaps(5, 6), np.array([3, 5, 0, 2, 1, 4])
    expected = score(Synthetic(gaps), policy)
    for one, other in zip(expected, score(Synthetic(gaps, names=order), policy)):
        assert_same(one, other, order)
    for shard in range(2):
        engine = Elimination(Synthetic(gaps), 6, policy)
        pictures = range(shard, 5, 2)
        for picture, found in zip(pictures, engine.score(pictures)):
            assert_same(found, expected[picture])


@EACH
def test_every_evaluation_is_counted_once_and_batches_are_full_to_the_end(policy: Policy) -> None:
    scorer = Synthetic(draw_gaps(30, 6))
    found = score(scorer, policy, batch_size=16)
    assert np.array_equal(np.stack([one.evaluations for one in found]), scorer.counts)
    assert sum(one.num_evaluations for one in found) == sum(scorer.batches)
    full = [size == 16 for size in scorer.batches]
    first_part = full.index(False) if False in full else len(full)
    late = sum(scorer.batches[first_part:])
    assert set(scorer.batches[:first_part]) == {16}
    assert late / sum(scorer.batches) < 0.3  # only when no picture waits
    for one in found:
        assert one.probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert one.is_left[one.costs.argmin()]
        assert (one.probabilities > 0).all()
        assert (one.costs[~one.is_left] > one.costs[one.is_left].min()).all()


@pytest.mark.parametrize(
    ("samples", "keep", "num_classes", "expected"),
    [
        ((50, 500), (5, 1), 10, 2_750),
        ((100, 500), (5, 1), 10, 3_000),
        ((25, 250), (5, 1), 37, 2_050),
        ((20, 50, 100, 500), (20, 10, 5, 1), 101, 5_570),
        ((20, 50, 100, 500), (20, 10, 5, 1), 102, 5_590),
        ((50, 100, 500, 1000), (25, 10, 5, 1), 113, 14_400),
        ((50, 100, 500, 1000), (500, 50, 10, 1), 1000, 124_500),
        ((250,), (1,), 100, 25_000),
    ],
)
def test_the_staged_policy_takes_the_evaluations_of_the_published_schedules(
    samples: tuple[int, ...], keep: tuple[int, ...], num_classes: int, expected: int
) -> None:
    class Easy:
        def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
            return np.array(classes, dtype=np.float64)

    policy = Staged(samples=samples, keep=keep)
    (found,) = Elimination(Easy(), num_classes, policy, EliminationConfig(batch_size=8192)).score([0])
    assert found.num_evaluations == expected
    assert found.tied.nonzero()[0].tolist() == [0]


def test_a_stage_covers_its_evenly_spaced_part_of_the_grid() -> None:
    policy = Staged(samples=(20, 50, 100, 500))
    units, ends = policy.build_units(seed=0), list(policy.round_ends())
    steps = [int(unit.time * 1000) for unit in units]
    assert steps[:3] == [25, 75, 125]  # places 12, 37, 62 of the grid 1, 3, 5, ...
    assert steps[20:23] == [11, 31, 51]
    assert ends == [20, 70, 150, 500]
    assert sorted(steps) == list(range(1, 1000, 2))
    assert sorted(unit.time for unit in units) == pytest.approx(even_times(500, 1000))


@EACH
def test_costs_are_those_of_a_naive_loop(policy: Policy) -> None:
    """Means and decisions are recomputed from single costs, without the engine's arrays."""
    gaps = draw_gaps(3, 6, seed=4)
    engine = Elimination(Synthetic(gaps), 6, policy, EliminationConfig(batch_size=13))
    for picture, found in enumerate(engine.score(range(3))):
        for place in np.flatnonzero(found.is_left):
            scorer, total, means = Synthetic(gaps), 0.0, []
            units = engine.plan.units[: int(found.evaluations[place])]
            for noise in dict.fromkeys(unit.noise for unit in units):
                costs = [scorer._one(picture, int(place), unit) for unit in units if unit.noise == noise]
                means.append(sum(costs) / len(costs))
            total = sum(means) / len(means)
            assert found.costs[place] == pytest.approx(total, rel=1e-12)
            assert found.logits[place] == -found.costs[place]


def test_a_class_that_went_early_keeps_its_distance_to_the_best_of_that_time() -> None:
    gaps = np.array([[0.0, 0.5, 40.0]])
    (found,) = score(Synthetic(gaps, noise=0.01), Adaptive(min_times=3, max_times=50))
    assert found.evaluations[2] == 5
    assert found.costs - found.costs[0] == pytest.approx(gaps[0], abs=0.02)
    assert found.standard_errors[0] == 0
    assert 0 < found.standard_errors[2] < 0.02


@pytest.mark.parametrize("p_value", [1e-2, 2e-3])
def test_the_best_class_is_rarely_lost(p_value: float) -> None:
    """Eleven classes 0.3 behind the best in noise 1; the test comes after every pair, so that p bounds one of many."""
    gaps = np.full((60, 12), 0.3)
    gaps[:, 0] = 0
    found = score(Synthetic(gaps, seed=1), Adaptive(p_value=p_value, cap=1000, max_times=64), batch_size=4096)
    lost = np.mean([not one.is_left[0] for one in found])
    assert lost <= 9 * p_value  # seen on 300 races: 0.05 and 0.0
    assert np.mean([one.is_left.sum() for one in found]) < 9  # seen 4.6 and 7.8
    assert all(one.is_left.any() for one in found)


def test_the_cap_bounds_the_survivors_whatever_the_noise() -> None:
    gaps = np.zeros((4, 40))
    policy = Adaptive(cap=2, max_times=60, min_times=4)
    scorer = Synthetic(gaps, noise=100.0)
    found = score(scorer, policy, batch_size=512)
    for one in found:
        allowed = [40] * 7  # the first four times are one round
        for num in range(4, 60):
            allowed += [max(2, int(np.ceil(2 * 40 / num)))] * 2
        alive = [(one.evaluations > unit).sum() for unit in range(119)]
        assert (np.array(alive) <= allowed[:119]).all()
        assert one.is_left.sum() >= 1
        assert alive[0] == 40


def test_equal_classes_are_reported_as_a_tie_and_none_is_let_go() -> None:
    class Twins:
        def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
            means = np.array([2.0, 1.0, 3.0, 1.0])[list(classes)]
            return means + np.array([unit.time for unit in units])

    for policy in POLICIES:
        (found,) = Elimination(Twins(), 4, policy).score([0])
        assert found.tied.tolist() == [False, True, False, True], policy
        assert found.probabilities[1] == found.probabilities[3]


def test_a_scale_makes_the_logits_and_a_far_class_has_no_chance_of_zero() -> None:
    class Scaled(Synthetic):
        scale = 8192.0

    (found,) = score(Scaled(np.array([[0.0, 1.0, 50.0]]), noise=0.01), Full(num_times=8))
    assert found.logits.tolist() == (-8192 * found.costs).tolist()
    assert (found.probabilities > 0).all()
    assert found.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_cost_names_picture_class_and_time(broken: float) -> None:
    class Broken(Synthetic):
        def _one(self, picture: int, place: int, unit: Unit) -> float:
            return broken if (picture, place, unit.index) == (2, 1, 3) else super()._one(picture, place, unit)

    with pytest.raises(ValueError, match=rf"picture 2, class 1 at time 0\.75 \(unit 3\) is {broken}"):
        score(Broken(draw_gaps(3, 4)), Full(num_times=6, antithetic=True))


def test_a_scorer_that_gives_too_few_costs_is_found_out() -> None:
    class Short:
        def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
            return np.zeros(1)

    with pytest.raises(ValueError, match=r"shape \(1,\) for 18 triples"):
        Elimination(Short(), 3, Full(num_times=6)).score([0])


def test_policies_and_races_complain_of_what_they_can_not_do() -> None:
    density = TimeDensity(values=np.ones(10))
    with pytest.raises(ValueError, match="a density can not act on"):
        Elimination(Synthetic(draw_gaps(1, 3)), 3, Staged(), density=density)
    with pytest.raises(ValueError, match="at least two classes, not 1"):
        Elimination(Synthetic(draw_gaps(1, 3)), 1, Full())
    with pytest.raises(ValueError, match="batch_size is 0"):
        EliminationConfig(batch_size=0)
    wrong: list[tuple[type[Policy], dict[str, object], str]] = [
        (Staged, {"samples": (20, 50), "keep": (5,)}, "for every stage"),
        (Staged, {"samples": (50, 20), "keep": (5, 1)}, "must rise"),
        (Staged, {"samples": (20, 50), "keep": (5, 2)}, "must fall, to 1"),
        (Staged, {"samples": (20, 5000), "keep": (5, 1)}, "1000 steps"),
        (TTest, {"p_value": 0.0}, "p_value is 0"),
        (TTest, {"order": "even"}, "even times rise"),
        (Adaptive, {"min_times": 1}, "min_times is 1"),
        (Adaptive, {"order": "random"}, "choose variance=plain"),
        (Adaptive, {"variance": "none"}, "variance 'none' is unknown"),
        (Full, {"num_times": 0}, "num_times is 0"),
    ]
    for policy, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            policy(**options)
