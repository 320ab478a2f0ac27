"""The bank of units: times, noises and templates, and the density that times are drawn by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mixmodal.classification.units import (
    NUM_BINS,
    TimeDensity,
    Unit,
    build_units,
    draw_noise,
    draw_times,
    even_times,
    fit_density,
    low_discrepancy_times,
    measure_spread,
    random_times,
)


def test_every_beginning_of_the_low_discrepancy_times_is_near_uniform() -> None:
    times = low_discrepancy_times(256)
    assert times[:5].tolist() == [0.5, 0.25, 0.75, 0.125, 0.625]
    for num in (4, 9, 30, 100, 256):
        places = np.sort(times[:num])
        gap = np.abs(places - (np.arange(num) + 0.5) / num).max()
        assert gap <= (np.log2(num) / 3 + 1.5) / num  # star discrepancy of the sequence, and half a step
    assert len(set(times)) == 256


@pytest.mark.parametrize(
    ("num", "steps"), [(500, [1, 3, 5]), (250, [2, 6, 10]), (100, [5, 15, 25]), (1000, [0, 1, 2]), (300, [1, 4, 7])]
)
def test_even_times_are_the_steps_of_the_published_grid(num: int, steps: list[int]) -> None:
    times = even_times(num, 1000)
    stride = 1000 // num
    assert np.floor(times * 1000).astype(int).tolist() == list(range(stride // 2, 1000, stride))[:num]
    assert np.floor(times * 1000)[:3].tolist() == steps


def test_random_times_begin_with_those_of_a_shorter_draw() -> None:
    assert random_times(50, 3)[:20].tolist() == random_times(20, 3).tolist()
    assert random_times(20, 3).tolist() != random_times(20, 4).tolist()


def test_a_pair_shares_all_but_its_sign_and_the_first_time_stands_alone() -> None:
    units = build_units(low_discrepancy_times(9), antithetic=True, num_templates=3)
    assert [unit.index for unit in units] == list(range(17))
    assert [unit.sign for unit in units] == [1, *[1, -1] * 8]
    for one, other in zip(units[1::2], units[2::2]):
        assert one._replace(index=0, sign=0) == other._replace(index=0, sign=0)
    assert [unit.noise for unit in units[1::2]] == list(range(1, 9))


@pytest.mark.parametrize("num_templates", [2, 3, 5])
def test_templates_come_once_a_round_and_are_not_coupled_to_times(num_templates: int) -> None:
    units = build_units(low_discrepancy_times(60 * num_templates), num_templates=num_templates)
    templates = np.array([unit.template for unit in units])
    rounds = templates.reshape(-1, num_templates)
    assert (np.sort(rounds, axis=1) == np.arange(num_templates)).all()
    times = np.array([unit.time for unit in units])
    means = [times[templates == template].mean() for template in range(num_templates)]
    assert np.ptp(means) < 0.12  # coupled, two templates would stand at 0.25 and 0.75


def test_a_noise_is_the_same_for_any_order_and_worker() -> None:
    units = build_units(low_discrepancy_times(6), antithetic=True)
    shape = (4, 3, 3)
    found = {unit.index: draw_noise(7, unit, shape) for unit in units}
    torch.manual_seed(1)  # another worker, the other way round
    for unit in reversed(units):
        assert torch.equal(draw_noise(7, unit, shape), found[unit.index])
    assert torch.equal(found[1], -found[2])
    assert found[0].dtype == torch.float32
    assert found[0].device.type == "cpu"
    different = [found[0], found[1], found[3], draw_noise(8, units[0], shape)]
    assert all(not torch.allclose(one, other) for one in different for other in different if one is not other)
    many = torch.cat([draw_noise(0, unit, (1000,)) for unit in build_units(even_times(50))])
    assert abs(float(many.mean())) < 0.02  # standard error 0.0045
    assert float(many.std()) == pytest.approx(1, abs=0.02)


class Bump:
    """Costs whose class spread over time is a bump; the cost itself is far larger."""

    def spread(self, times: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((times - 0.3) / 0.15) ** 2) + 0.01

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        times = np.array([unit.time for unit in units])
        return 100 * times + self.spread(times) * np.array(classes)


def test_weights_leave_the_objective_unbiased_and_times_follow_the_spread() -> None:
    pilot = build_units(even_times(32))
    times = np.array([unit.time for unit in pilot])
    spreads = measure_spread(Bump(), [0, 1], 4, pilot)
    assert spreads == pytest.approx(Bump().spread(times) * np.std(range(4)), rel=1e-9)
    density = fit_density(times, spreads)
    assert density.values.min() >= 0.15 - 1e-12
    units = build_units(low_discrepancy_times(4095), density=density)
    drawn, weights = np.array([unit.time for unit in units]), np.array([unit.weight for unit in units])
    assert weights == pytest.approx(1 / density.at(drawn))
    assert weights.max() <= 1 / 0.15 + 1e-9
    assert weights.mean() == pytest.approx(1, abs=2e-3)
    for function in (np.sin, np.square, Bump().spread):
        exact = function((np.arange(100_000) + 0.5) / 100_000).mean()
        assert (weights * function(drawn)).mean() == pytest.approx(exact, abs=2e-3)
        assert abs(function(drawn).mean() - exact) > 0.02  # without weights it is another objective
    assert ((drawn > 0.1) & (drawn < 0.5)).mean() > 0.7


def test_densities_and_units_complain_of_what_they_can_not_use() -> None:
    times = np.linspace(0.1, 0.9, 20)
    with pytest.raises(ValueError, match="different times"):
        fit_density(times[:7], np.ones(7))
    with pytest.raises(ValueError, match="uniform_share is 0"):
        fit_density(times, np.ones(20), uniform_share=0)
    with pytest.raises(ValueError, match="not finite"):
        fit_density(times, np.full(20, np.nan))
    with pytest.raises(ValueError, match="mean 1"):
        TimeDensity(values=np.full(NUM_BINS, 2.0))
    with pytest.raises(ValueError, match="above 0 and below 1"):
        build_units(np.array([0.0, 0.5]))
    with pytest.raises(ValueError, match="num_templates is 0"):
        build_units(times, num_templates=0)
    with pytest.raises(ValueError, match="schedule of 1000 steps"):
        even_times(1001, 1000)
    with pytest.raises(ValueError, match="order of times 'sobol' is unknown"):
        draw_times("sobol", 3, 0)  # pyright: ignore[reportArgumentType]
