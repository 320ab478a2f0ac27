"""Paired t-tests: the distribution against printed tables, variances against what was drawn, ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixmodal.classification.paired import among_best, compare, critical_t, significantly_worse, student_tail


@pytest.mark.parametrize(
    ("p_value", "degrees", "expected"),  # printed tables of Student's t, one-sided
    [
        (0.005, 1, 63.6567),
        (0.025, 4, 2.77645),
        (0.01, 10, 2.76377),
        (0.001, 30, 3.38518),
        (0.01, 100, 2.36422),
        (0.001, 1, 318.309),
    ],
)
def test_critical_values_are_those_of_the_tables(p_value: float, degrees: int, expected: float) -> None:
    assert critical_t(p_value, degrees) == pytest.approx(expected, rel=2e-6)


def test_tails_are_exact_where_they_have_a_closed_form() -> None:
    for t in (0.0, 0.3, 1.0, 4.0, 40.0):
        assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
        assert student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-14)
        assert student_tail(t, 1e7) == pytest.approx(math.erfc(t / math.sqrt(2)) / 2, abs=1e-7)


def test_successive_differences_leave_out_what_changes_slowly() -> None:
    generator = np.random.default_rng(0)
    times = generator.permutation((np.arange(400) + 0.5) / 400)
    noise = generator.standard_normal(400)
    values = np.stack([np.zeros(400), 5 + 3 * np.sin(3 * times) + noise])
    smooth, plain = compare(values, times), compare(values)
    assert smooth.standard_errors[1] == pytest.approx(1 / 20, rel=0.15)
    assert plain.standard_errors[1] > 1.2 / 20
    assert smooth.standard_errors[0] == plain.standard_errors[0] == 0
    assert plain.degrees == 399
    assert smooth.degrees == pytest.approx(2 / 3 * 399, rel=0.01)


@pytest.mark.parametrize("num", [3, 4, 8, 30])
def test_a_test_is_wrong_as_often_as_it_says(num: int) -> None:
    generator = np.random.default_rng(num)
    times, p_value, wrong = (np.arange(num) + 0.5) / num, 0.05, {True: 0, False: 0}
    for _ in range(3000):
        values = np.stack([np.zeros(num), generator.standard_normal(num)])  # neither is better
        for successive in wrong:
            compared = compare(values, times if successive else None)
            wrong[successive] += significantly_worse(compared, p_value).any()
    assert wrong[False] / 3000 == pytest.approx(2 * p_value, abs=0.02)  # either may seem the worse; error 0.0055
    assert wrong[True] / 3000 == pytest.approx(2 * p_value, abs=0.03)


def test_ties_are_kept_together() -> None:
    means = np.array([3.0, 1.0, 2.0, 2.0 + 1e-9, 4.0])
    assert among_best(means, 2).tolist() == [False, True, True, True, False]
    assert among_best(means, 1).tolist() == [False, True, False, False, False]
    values = np.tile(means[:, None], 5)
    assert significantly_worse(compare(values), 1e-3).tolist() == [True, False, True, True, True]
    twins = np.array([[1.0, 1.1, 0.9], [1.0, 1.1, 0.9 + 1e-9]])
    assert not significantly_worse(compare(twins), 0.4).any()
