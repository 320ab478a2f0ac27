"""Paired comparisons of classes that were measured at the same times.

Shapes: A classes that are compared, J times. Values `(A, J)` float64 are weighted costs, a pair of units averaged.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

TIE_SHARE = 1e-6
"""Of the best mean cost: classes nearer than this are tied; float32 costs of equal classes differ by less."""


class Comparison(NamedTuple):
    """Classes against the best of them, arrays `(A,)` float64.

    Args:
        means: mean costs.
        excesses: mean costs above the best.
        standard_errors: of the excesses, from paired differences; 0 for the best, NaN with fewer than two times.
        degrees: of freedom of the standard errors.
    """

    means: np.ndarray
    excesses: np.ndarray
    standard_errors: np.ndarray
    degrees: float


def compare(values: np.ndarray, times: np.ndarray | None = None) -> Comparison:
    """Compares classes with the best; where several share the best mean exactly, the largest standard error counts.

    Args:
        values: `(A, J)`.
        times: `(J,)`. With them the variance is that of successive differences along time (von Neumann, 1941), which
            leaves out what changes slowly over time: evenly covered times average it away, so that it is no error of
            the mean. It has about two thirds of the degrees of freedom. Without times it is the plain variance, that
            of independent times.
    """
    means = values.mean(axis=1)
    errors = np.zeros(len(values))
    if times is not None:
        values = values[:, np.argsort(times, kind="stable")]
    num = values.shape[1]
    for best in np.flatnonzero(means == means.min()):
        differences = values - values[best]
        if num < 2:
            variances = np.full(len(values), np.nan)
            variances[best] = 0
        elif times is None:
            variances = differences.var(axis=1, ddof=1)
        else:
            variances = np.square(np.diff(differences, axis=1)).mean(axis=1) / 2
        errors = np.maximum(errors, np.sqrt(variances / num))
    degrees = num - 1.0 if times is None else 2 * (num - 1) ** 2 / (3 * num - 4)
    return Comparison(means, means - means.min(), errors, degrees)


def tie_tolerance(means: np.ndarray) -> float:
    """How far above the best mean cost a class is tied with it."""
    return TIE_SHARE * abs(float(means.min()))


def significantly_worse(compared: Comparison, p_value: float) -> np.ndarray:
    """Which classes a one-sided t-test finds worse than the best, `(A,)` bool; never one that is tied with it."""
    excesses, critical = compared.excesses, critical_t(p_value, compared.degrees)
    return (excesses > tie_tolerance(compared.means)) & (excesses > critical * compared.standard_errors)


def among_best(means: np.ndarray, num: int) -> np.ndarray:
    """Which classes have one of the `num` lowest means, `(A,)` bool: more where classes tie for the last place."""
    if num >= len(means):
        return np.ones(len(means), dtype=bool)
    return means <= np.partition(means, num - 1)[num - 1] + tie_tolerance(means)


@cache
def critical_t(p_value: float, degrees: float) -> float:
    """What a Student t variable of `degrees` of freedom exceeds with probability `p_value` in (0, 0.5)."""
    front = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    t, step = 0.0, 1.0
    while step > 1e-13 * (1 + t):  # Newton's steps from below: the tail is convex
        density = front * math.exp(-(degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (student_tail(t, degrees) - p_value) / density
        t += max(step, 0)
    return t


def student_tail(t: float, degrees: float) -> float:
    """Probability that a Student t variable exceeds `t` >= 0: half the incomplete beta function."""
    x, a = degrees / (degrees + t * t), degrees / 2
    front = math.exp(math.lgamma(a + 0.5) - math.lgamma(a) - math.lgamma(0.5) + a * math.log(x)) * math.sqrt(1 - x)
    if x < (a + 1) / (a + 2.5):
        return front * _beta_fraction(a, 0.5, x) / a / 2
    return 0.5 - front * _beta_fraction(0.5, a, 1 - x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    numerator, denominator = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = denominator
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for step in (even, odd):
            denominator = 1 / (1 + step * denominator or tiny)
            numerator = 1 + step / numerator or tiny
            change = denominator * numerator
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value
