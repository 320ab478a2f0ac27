"""Temperature and reliability on logits whose true probabilities are known (T10)."""

from __future__ import annotations

import numpy as np
import pytest

from mixmodal.classification.calibration import fit_temperature, mean_nll, measure_reliability, softmax


def draw(num: int, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(num, 6)` that are `temperature` times too large, and labels drawn from the true probabilities."""
    generator = np.random.default_rng(seed)
    true = 2 * generator.standard_normal((num, 6))
    labels = (softmax(true).cumsum(axis=1) < generator.random((num, 1))).sum(axis=1)
    return temperature * true, labels


@pytest.mark.parametrize("temperature", [1e-4, 0.2, 1.0, 8192.0])
def test_a_fitted_temperature_is_the_true_one_and_lowers_the_held_out_nll(temperature: float) -> None:
    fitted = fit_temperature(*draw(4000, temperature, 0))
    assert fitted == pytest.approx(temperature, rel=0.06)  # worst seen 0.02
    logits, labels = draw(2000, temperature, 1)
    before, after = mean_nll(logits, labels), mean_nll(logits, labels, fitted)
    assert after < before - 0.05 or temperature == 1
    assert mean_nll(logits, labels, 1.3 * fitted) > after < mean_nll(logits, labels, fitted / 1.3)
    reliable = measure_reliability(softmax(logits, fitted), labels)
    assert reliable.expected_error < 0.04  # worst seen 0.025
    if temperature != 1:
        assert measure_reliability(softmax(logits), labels).expected_error > 0.1


def test_the_fit_is_where_the_slope_of_the_nll_is_zero() -> None:
    logits, labels = draw(50, 3.0, 2)
    fitted = fit_temperature(logits, labels)
    best = mean_nll(logits, labels, fitted)
    grid = np.exp(np.linspace(-0.01, 0.01, 201)) * fitted
    assert min(mean_nll(logits, labels, one) for one in grid) >= best - 1e-12


def test_bins_hold_counts_confidences_and_accuracies() -> None:
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    found = measure_reliability(probabilities, np.array([0, 1, 1, 0]), num_bins=4)
    assert found.counts.tolist() == [0, 1, 1, 2]
    assert np.isnan([found.confidences[0], found.accuracies[0]]).all()
    assert found.confidences[1:] == pytest.approx([0.5, 0.7, 0.85])
    assert found.accuracies[1:].tolist() == [0.5, 0, 1]  # the tie counts a half
    assert found.expected_error == pytest.approx((0 + 0.7 + 2 * 0.15) / 4)
    assert measure_reliability(np.array([[1.0, 0.0]]), np.array([0])).counts[-1] == 1


def test_what_can_not_be_calibrated_is_said() -> None:
    logits, labels = draw(30, 1.0, 3)
    with pytest.raises(ValueError, match="best logit on each of 30"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(ValueError, match="no likelier than chance"):
        fit_temperature(logits, logits.argmin(axis=1))
    with pytest.raises(ValueError, match="are equal"):
        fit_temperature(np.ones((3, 2)), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="labels go from 0 to 9"):
        fit_temperature(logits, np.where(np.arange(30) == 4, 9, 0))
    with pytest.raises(ValueError, match="the first is 2"):
        fit_temperature(np.where(np.arange(30)[:, None] == 2, np.nan, logits), labels)
    with pytest.raises(ValueError, match="labels for a table"):
        fit_temperature(logits, labels[:3])
    with pytest.raises(ValueError, match="no distribution"):
        measure_reliability(logits, labels)
