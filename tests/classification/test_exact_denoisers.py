"""Races over classes whose best denoiser is known: they find the likelihood, or agree with Bayes (T1, T2, T5)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.policies import Adaptive, Full, Policy, Staged
from mixmodal.classification.units import build_units, draw_noise, even_times, fit_density, measure_spread


@pytest.fixture
def exact(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("exact_denoisers")


@pytest.mark.parametrize(
    ("grid", "span", "num_times", "tolerance"),
    [("lambda", 20, 50, 1e-6), ("lambda", 30, 400, 1e-9), ("flow", 0, 1000, 1e-3)],
)
def test_exact_gaussians_give_their_log_likelihoods(
    exact: ModuleType, grid: Literal["lambda", "flow"], span: float, num_times: int, tolerance: float
) -> None:
    assert exact.measure_gaussians(grid, span, num_times) < tolerance  # seen 6.7e-8, 5.4e-12 and 4.8e-6


def test_errors_integrated_over_lambda_are_log_likelihoods_of_mixtures(exact: ModuleType) -> None:
    """In products of what is shared, triple by triple, and by Bayes."""
    world = exact.draw_world(4, 3, 6, 30, width=1.0, spread=1.0, seed=2)
    units = exact.grid_units(12, 4)
    assert [unit.index for unit in units] == list(range(48))
    scorer = exact.LikelihoodScorer(world, seed=1)
    costs = [[scorer.cost([p] * 48, [k] * 48, units).mean() for k in range(4)] for p in range(3)]
    found = exact.integrate_likelihoods(world, 12, 4, seed=1)
    np.testing.assert_allclose(found[:3], -scorer.scale * np.array(costs), rtol=1e-12)
    found, exactly = exact.integrate_likelihoods(world, 128, 16), world.log_likelihoods()
    errors = (found - exactly) - (found - exactly).mean(axis=1, keepdims=True)
    assert np.sqrt(np.square(errors).mean()) < 0.3  # nats
    assert np.ptp(exactly, axis=1).mean() > 3


@pytest.mark.parametrize(
    ("policy", "floor"),
    [
        (Full(num_times=96, antithetic=True), 0.97),
        (Staged(samples=(20, 100), keep=(4, 1)), 0.97),
        (Adaptive(max_times=64), 0.97),
    ],
    ids=["full", "staged", "adaptive"],
)
def test_policies_agree_with_bayes_on_mixtures(exact: ModuleType, policy: Policy, floor: float) -> None:
    world = exact.draw_world(8, 3, 8, 100, width=1.0, spread=1.0, seed=5)
    bayes = world.log_likelihoods().argmax(axis=1)
    engine = Elimination(exact.MixtureScorer(world), 8, policy, EliminationConfig(batch_size=4096))
    found = engine.score(range(100))
    agreement = np.mean([one.costs.argmin() == label for one, label in zip(found, bayes)])
    assert agreement >= floor  # seen .98, .99, .98
    assert 0.5 < (bayes == world.labels).mean() < 0.95  # not an easy world


def test_the_engine_is_a_naive_loop_over_pictures_classes_times_and_noises(exact: ModuleType) -> None:
    """Written from the formulas, one number at a time, and with importance weights."""
    world = exact.draw_world(3, 2, 4, 2, width=1.0, spread=1.0, seed=6)
    pilot = build_units(even_times(16))
    times = np.array([unit.time for unit in pilot])
    density = fit_density(times, measure_spread(exact.MixtureScorer(world, seed=9), range(2), 3, pilot))
    policy = Full(num_times=6, antithetic=True)
    schedule = exact.stable_diffusion_schedule()
    expected = np.zeros((2, 3))
    for picture in range(2):
        for label in range(3):
            for unit in policy.build_units(seed=0, density=density):
                a2 = schedule[int(unit.time * 1000)]
                noise = draw_noise(0, unit, (4,)).double().numpy()
                z = np.sqrt(a2) * world.pictures[picture] + np.sqrt(1 - a2) * noise
                w = a2 * world.width**2 + 1 - a2
                shares = [np.exp(-0.5 * ((z - np.sqrt(a2) * mean) ** 2).sum() / w) for mean in world.means[label]]
                guess = sum(
                    share * np.sqrt(1 - a2) / w * (z - np.sqrt(a2) * mean)
                    for share, mean in zip(shares, world.means[label])
                ) / sum(shares)
                share_of_time = 1 / 6 if unit.noise == 0 else 1 / 12
                expected[picture, label] += share_of_time * unit.weight * ((noise - guess) ** 2).mean()
    for batch_size in (1, 5, 1000):
        scorer = exact.MixtureScorer(world, num_terms=40)
        engine = Elimination(scorer, 3, policy, EliminationConfig(batch_size=batch_size), density=density)
        found = engine.score([0, 1])
        assert np.stack([one.costs for one in found]) == pytest.approx(expected, rel=1e-12)
        assert found[0].logits == pytest.approx(-2 * expected[0], rel=1e-12)  # half of four numbers
