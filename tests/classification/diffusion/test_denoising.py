"""The algebra of denoisers against its definitions and against exact Gaussians; weightings, fixed and learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixmodal.classification.denoising import (
    KINDS,
    Flow,
    Schedule,
    VariancePreserving,
    Weighting,
    build_weighting,
    error_scale,
    fit_weighting,
    mean_error,
    target,
)

TIMES = (np.arange(50) + 0.5) / 50


def schedule_of(kind: str) -> Schedule:
    return Flow() if kind == "flow" else VariancePreserving(1 / (1 + np.exp(-np.linspace(9, -9, 50))))


def mixed(kind: str, times: np.ndarray) -> tuple[Tensor, ...]:
    """x, eps, alpha, sigma and z in float64 for each time."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn((2, len(times), 16), generator=generator, dtype=torch.float64)
    mix = schedule_of(kind).mix(times)
    alpha, sigma = (torch.from_numpy(one)[:, None] for one in (mix.alpha, mix.sigma))
    return x, eps, alpha, sigma, alpha * x + sigma * eps


def to_eps(kind: str, z: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that the network's output means."""
    match kind:
        case "epsilon":
            return out
        case "sample":
            return (z - alpha * out) / sigma
        case "v_prediction":
            return alpha * out + sigma * z
        case _:
            return z + (1 - sigma) * out


def to_x0(kind: str, z: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The picture that the network's output means."""
    match kind:
        case "epsilon":
            return (z - sigma * out) / alpha
        case "sample":
            return out
        case "v_prediction":
            return alpha * z - sigma * out
        case _:
            return z - sigma * out


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gives_back_noise_and_picture(kind: str) -> None:
    x, eps, alpha, sigma, z = mixed(kind, TIMES)
    out = target(kind, x, eps, alpha, sigma)
    # worst 4.4e-16 in these scales: a division by a or s of 1 / 90 carries the rounding of z, 1.5e-14
    assert ((to_eps(kind, z, out, alpha, sigma) - eps).abs() * sigma).max() < 1e-15
    assert ((to_x0(kind, z, out, alpha, sigma) - x).abs() * alpha).max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_the_errors_of_both_spaces_are_multiples_of_the_networks_own(kind: str) -> None:
    x, eps, alpha, sigma, z = mixed(kind, TIMES)
    wanted = target(kind, x, eps, alpha, sigma)
    out = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = (out - wanted).square().mean(dim=1)
    for space, found, true in (("eps", to_eps, eps), ("x0", to_x0, x)):
        errors = (found(kind, z, out, alpha, sigma) - true).square().mean(dim=1)
        scale = torch.from_numpy(error_scale(kind, space, alpha[:, 0].numpy(), sigma[:, 0].numpy()))
        torch.testing.assert_close(errors, scale.square() * own, rtol=1e-12, atol=0)  # worst 1.5e-14


def test_all_kinds_of_one_oracle_score_the_same() -> None:
    """A posterior mean that depends on z / a and lambda alone, asked through each kind of output."""
    scores = {}
    log_ratios = np.linspace(9, -9, 50)
    ratio = torch.from_numpy(np.exp(log_ratios / 2))[:, None]  # a / s
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn((2, 50, 16), generator=generator, dtype=torch.float64)
    for kind in KINDS:
        sigma = 1 / (1 + ratio) if kind == "flow" else (1 + ratio**2).rsqrt()
        alpha = ratio * sigma
        z = alpha * x + sigma * eps
        x0_hat = z / alpha * ratio**2 / (ratio**2 + 0.7)
        out = target(kind, x0_hat, (z - alpha * x0_hat) / sigma, alpha, sigma)
        residual = out - target(kind, x, eps, alpha, sigma)
        scores[kind] = [
            (torch.from_numpy(error_scale(kind, space, alpha[:, 0].numpy(), sigma[:, 0].numpy()))[:, None] * residual)
            .square()
            .mean(dim=1)
            for space in ("eps", "x0")
        ]
    for kind in KINDS:
        for found, expected in zip(scores[kind], scores["epsilon"]):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # worst 8.3e-15


@pytest.mark.parametrize(("flow", "tolerance"), [(False, 1e-9), (True, 1e-4)])  # worst 6.4e-12, 6.1e-6
def test_the_weighting_elbo_is_the_log_likelihood_of_exact_gaussians(flow: bool, tolerance: float) -> None:
    """Classes N(mu, s2 I) with closed-form errors: only a constant that all classes share may be left."""
    generator = np.random.default_rng(0)
    dim, variance = 16, 0.5
    means, x = generator.normal(size=(6, dim)), generator.normal(size=dim)
    num_times = 1000 if flow else 400
    times = (np.arange(num_times) + 0.5) / num_times
    schedule = Flow() if flow else VariancePreserving(1 / (1 + np.exp(-np.linspace(30, -30, num_times))))
    mix = schedule.mix(times)
    spread = mix.alpha**2 * variance + mix.sigma**2
    squares = ((x - means) ** 2).sum(axis=1)[:, None]
    errors = dim * (mix.alpha**2 * variance / spread) ** 2 + (mix.alpha * mix.sigma / spread) ** 2 * squares
    logits = -0.5 * (build_weighting("elbo").weights(schedule, times) * errors).mean(axis=1)
    exact = -squares[:, 0] / (2 * variance)
    np.testing.assert_allclose(logits - logits[0], exact - exact[0], atol=tolerance)


def test_a_step_is_found_from_its_share_of_the_schedule() -> None:
    schedule = VariancePreserving(np.linspace(0.999, 0.001, 1000))
    steps = np.arange(1000)
    for times in (steps / 1000, (steps + 0.5) / 1000):
        np.testing.assert_array_equal(schedule.steps(times), steps)
        np.testing.assert_array_equal(schedule.mix(times).model_times, steps)
    with pytest.raises(ValueError, match=r"shares of the schedule in \(0, 1\)"):
        schedule.steps(np.array([1.0]))


def test_the_first_steps_keep_their_noise() -> None:
    """In half precision sigma of the first step is off by 7 percent; here it is the root of float64."""
    squares = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    mix = VariancePreserving(squares).mix(np.array([0.0005]))
    assert mix.sigma[0] == np.sqrt(1 - squares[0])
    assert mix.sigma.dtype == np.float64
    np.testing.assert_allclose(mix.alpha**2 + mix.sigma**2, 1, rtol=1e-15)


def test_the_losses_are_those_of_their_names() -> None:
    rows = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    assert mean_error("l2", rows).tolist() == [2.125, 0.5]
    assert mean_error("l1", rows).tolist() == [1.25, 0.5]
    assert mean_error("huber", rows).tolist() == [(0.125 + 1.5) / 2, 0.25]
    with pytest.raises(ValueError, match="'l3' is unknown; choose l2, l1, huber"):
        mean_error("l3", rows)


def test_weightings_have_the_space_and_the_weights_of_their_papers() -> None:
    schedule = Flow()
    times = np.array([0.1, 0.5])
    assert (build_weighting("uniform").space, build_weighting("elbo").space) == ("eps", "eps")
    assert build_weighting("exp").space == "x0"
    np.testing.assert_array_equal(build_weighting("uniform").weights(schedule, times), [1, 1])
    np.testing.assert_allclose(build_weighting("exp").weights(schedule, times), np.exp([-0.7, -3.5]))
    np.testing.assert_allclose(build_weighting("elbo").weights(schedule, times), [2 / 0.09, 8])
    learned = Weighting(name="learned", buckets=(3.0, 1.0))
    np.testing.assert_array_equal(learned.weights(schedule, times), [3, 1])


def test_a_weighting_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="'snr' is unknown; choose uniform, elbo, exp or learned"):
        build_weighting("snr")
    with pytest.raises(ValueError, match="learned is fitted on labelled pictures"):
        build_weighting("learned")
    with pytest.raises(ValueError, match="weights of buckets belong to learned"):
        Weighting(name="uniform", buckets=(1.0,))
    with pytest.raises(ValueError, match="prediction type 'velocity' is unknown"):
        error_scale("velocity", "eps", TIMES, TIMES)


def errors_where_few_buckets_tell(num_pictures: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors `(P, 4, 40)` whose buckets 5 to 7 of 20 know the label, in noise, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(4, size=num_pictures)
    errors = generator.normal(size=(num_pictures, 4, 40))
    errors[np.arange(num_pictures), labels, 10:16] -= 1.2
    return errors, labels


def test_a_learned_weighting_beats_a_uniform_one_on_other_pictures() -> None:
    times = (np.arange(40) + 0.5) / 40
    errors, labels = errors_where_few_buckets_tell(60, 0)
    weighting = fit_weighting(errors, times, labels)
    errors, labels = errors_where_few_buckets_tell(2000, 1)
    weights = weighting.weights(Flow(), times)
    learned, uniform = (((errors * one).sum(axis=2).argmin(axis=1) == labels).mean() for one in (weights, np.ones(40)))
    assert (len(weighting.buckets), weighting.name, weighting.space) == (20, "learned", "eps")
    assert np.mean(weighting.buckets) == pytest.approx(1)
    assert learned > uniform + 0.2  # .925 and .621


def test_what_no_weighting_can_be_learned_from_is_named() -> None:
    errors, labels = errors_where_few_buckets_tell(20, 0)
    times = (np.arange(40) + 0.5) / 40
    with pytest.raises(ValueError, match=r"buckets \[0, 1, .*\] of 20 hold none of the 40 times"):
        fit_weighting(errors, 0.5 + times / 2, labels)
    with pytest.raises(ValueError, match="need as many labels and times, not 20 and 39"):
        fit_weighting(errors, times[:39], labels)
    with pytest.raises(ValueError, match="must be finite"):
        fit_weighting(errors * np.nan, times, labels)
    with pytest.raises(ValueError, match="the same for all classes"):
        fit_weighting(np.ones_like(errors), times, labels)
    with pytest.raises(ValueError, match="check the labels"):
        fit_weighting(-errors, times, labels)
