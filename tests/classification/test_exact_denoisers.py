"""Races over classes whose best denoiser is known: they find the likelihood, or agree with Bayes (T1, T2, T5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.policies import Adaptive, Full, Policy, Staged
from mixmodal.classification.units import Unit, build_units, draw_noise, even_times, fit_density, measure_spread

DIM, NUM_CLASSES, NUM_PICTURES = 16, 6, 20


@pytest.fixture
def exact(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("exact_denoisers")


class GaussianScorer:
    """Classes N(mean, variance I): the expected error of the noise in closed form, times -d lambda / d time / 2.

    Its mean over times is the integral over lambda that is -log p(picture | class) up to what all classes share.

    Args:
        grid: times are shares of lambda in [-span, span], or the u of a flow: a = 1 - u, s = u.
    """

    def __init__(self, grid: Literal["lambda", "flow"], span: float = 0) -> None:
        generator = np.random.default_rng(0)
        self.grid, self.span, self.variance = grid, span, 0.7
        self.means = generator.standard_normal((NUM_CLASSES, DIM))
        self.pictures = generator.standard_normal((NUM_PICTURES, DIM))

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        times = np.array([unit.time for unit in units])
        if self.grid == "lambda":
            signal = 1 / (1 + np.exp(-(2 * times - 1) * self.span))  # a^2
            noise, slope = 1 - signal, 2 * self.span * np.ones(len(units))
        else:
            signal, noise, slope = (1 - times) ** 2, times**2, 2 / (times * (1 - times))
        width = signal * self.variance + noise
        squares = np.square(self.pictures[list(pictures)] - self.means[list(classes)]).sum(axis=1)
        errors = DIM * (signal * self.variance / width) ** 2 + signal * noise / width**2 * squares
        return 0.5 * slope * errors

    def log_likelihoods(self) -> np.ndarray:
        return -0.5 * np.square(self.pictures[:, None] - self.means).sum(axis=2) / self.variance


@pytest.mark.parametrize(
    ("grid", "span", "num_times", "tolerance"),
    [("lambda", 20, 50, 1e-6), ("lambda", 30, 400, 1e-9), ("flow", 0, 1000, 1e-3)],
)
def test_exact_gaussians_give_their_log_likelihoods(
    grid: Literal["lambda", "flow"], span: float, num_times: int, tolerance: float
) -> None:
    scorer = GaussianScorer(grid, span)
    found = Elimination(scorer, NUM_CLASSES, Full(num_times=num_times, order="even")).score(range(NUM_PICTURES))
    logits, exact = np.stack([one.logits for one in found]), scorer.log_likelihoods()
    worst = np.abs((logits - logits[:, :1]) - (exact - exact[:, :1])).max()
    assert worst < tolerance  # seen 6.7e-8, 5.4e-12 and 4.8e-6


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
