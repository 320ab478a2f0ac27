"""Classes whose best denoiser is known in closed form, as scorers: what a classifier finds can be judged by Bayes.

A class is a Gaussian, or a mixture of Gaussians N(mean, width^2 I) with equal shares. With z = a x + s eps, the noise
that a mixture expects in z is s / w times the mean of z - a mean over the components given z, where
w = a^2 width^2 + s^2.

Shapes: P pictures, K classes, C components, D numbers of a picture, n triples, N noises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.classification.elimination import Elimination
from mixmodal.classification.policies import Full
from mixmodal.classification.units import Unit, draw_noise, even_times

NUM_STEPS = 1000
LOWEST, HIGHEST = -14.0, 16.0
"""Where lambda = log(a^2 / s^2) is integrated: beyond, the errors of all classes are alike."""


class GaussianScorer:
    """Classes N(mean, variance I): the expected error of the noise in closed form, times -d lambda / d time / 2.

    Its mean over times is the integral over lambda that is -log p(picture | class) up to what all classes share
    (arXiv 2107.00630, section 4).

    Args:
        grid: times are shares of lambda in [-span, span], or the u of a flow: a = 1 - u, s = u.
    """

    def __init__(
        self,
        grid: Literal["lambda", "flow"],
        span: float = 0,
        dim: int = 16,
        num_classes: int = 6,
        num_pictures: int = 20,
    ) -> None:
        generator = np.random.default_rng(0)
        self.grid, self.span, self.variance = grid, span, 0.7
        self.means = generator.standard_normal((num_classes, dim))
        self.pictures = generator.standard_normal((num_pictures, dim))

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        times = np.array([unit.time for unit in units])
        if self.grid == "lambda":
            signal = 1 / (1 + np.exp(-(2 * times - 1) * self.span))  # a^2
            noise, slope = 1 - signal, 2 * self.span * np.ones(len(units))
        else:
            signal, noise, slope = (1 - times) ** 2, times**2, 2 / (times * (1 - times))
        width = signal * self.variance + noise
        squares = np.square(self.pictures[list(pictures)] - self.means[list(classes)]).sum(axis=1)
        errors = self.means.shape[1] * (signal * self.variance / width) ** 2 + signal * noise / width**2 * squares
        return 0.5 * slope * errors

    def log_likelihoods(self) -> np.ndarray:
        """log p(picture | class), up to a constant that all classes share, `(P, K)`."""
        return -0.5 * np.square(self.pictures[:, None] - self.means).sum(axis=2) / self.variance


def measure_gaussians(grid: Literal["lambda", "flow"], span: float, num_times: int) -> float:
    """The largest difference between the engine's logits and log-likelihoods, both less those of the first class."""
    scorer = GaussianScorer(grid, span)
    policy = Full(num_times=num_times, order="even")
    found = Elimination(scorer, len(scorer.means), policy).score(range(len(scorer.pictures)))
    logits, exact = np.stack([one.logits for one in found]), scorer.log_likelihoods()
    return float(np.abs((logits - logits[:, :1]) - (exact - exact[:, :1])).max())


def stable_diffusion_schedule() -> np.ndarray:
    """a^2 of the scaled-linear schedule of Stable Diffusion, `(1000,)` float64."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, NUM_STEPS) ** 2)


class MixtureWorld(NamedTuple):
    """Classes and pictures drawn from them.

    Args:
        means: of the components, `(K, C, D)` float64.
        width: standard deviation of a component.
        pictures: `(P, D)` float64.
        labels: the classes that they were drawn from, `(P,)` int64.
    """

    means: np.ndarray
    width: float
    pictures: np.ndarray
    labels: np.ndarray

    def log_likelihoods(self) -> np.ndarray:
        """log p(picture | class), up to a constant that all classes share, `(P, K)`."""
        squares = np.square(self.pictures[:, None, None] - self.means).sum(axis=3)
        return _log_mean_exp(-0.5 * squares / self.width**2)


def draw_world(
    num_classes: int, num_components: int, dim: int, num_pictures: int, width: float, spread: float, seed: int
) -> MixtureWorld:
    """Class centres from N(0, 1), means of components around them by `spread`, pictures around those by `width`.

    All is then divided by what makes a picture's numbers of variance 1, as latents are.
    """
    generator = np.random.default_rng(seed)
    unit = np.sqrt(1 + spread**2 + width**2)
    width = width / unit
    centres = generator.standard_normal((num_classes, 1, dim))
    means = (centres + spread * generator.standard_normal((num_classes, num_components, dim))) / unit
    labels = generator.integers(num_classes, size=num_pictures)
    components = generator.integers(num_components, size=num_pictures)
    pictures = means[labels, components] + width * generator.standard_normal((num_pictures, dim))
    return MixtureWorld(means, float(width), pictures, labels)


class MixtureScorer:
    """Mean squared error of the noise that a class expects, on the schedule of Stable Diffusion.

    Args:
        world: classes and pictures.
        seed: of the noise bank.
        num_terms: numbers that stand in memory at once, about.
    """

    def __init__(self, world: MixtureWorld, seed: int = 0, num_terms: int = 2_000_000) -> None:
        self.world, self.seed, self.num_terms = world, seed, num_terms
        self.scale = world.means.shape[2] / 2
        self.schedule = stable_diffusion_schedule()
        self.noises: dict[int, np.ndarray] = {}

    def signal(self, times: np.ndarray) -> np.ndarray:
        """a^2 at `times`."""
        return self.schedule[(times * NUM_STEPS).astype(np.int64)]

    def noise(self, unit: Unit) -> np.ndarray:
        """Noise of a unit without its sign, `(D,)` float64."""
        if unit.noise not in self.noises:
            dim = self.world.means.shape[2]
            self.noises[unit.noise] = draw_noise(self.seed, unit._replace(sign=1), (dim,)).double().numpy()
        return self.noises[unit.noise]

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        """Mean squared errors `(n,)`."""
        found = np.zeros(len(units))
        num = max(1, self.num_terms // self.world.means[0].size)
        rows, columns = np.asarray(pictures), np.asarray(classes)
        for start in range(0, len(units), num):
            part = slice(start, start + num)
            squares = self.signal(np.array([unit.time for unit in units[part]]))
            noise = np.stack([self.noise(unit) for unit in units[part]])
            noise *= np.array([unit.sign for unit in units[part]])[:, None]
            a, s = np.sqrt(squares)[:, None], np.sqrt(1 - squares)[:, None]
            found[part] = self._errors(self.world.pictures[rows[part]], self.world.means[columns[part]], a, s, noise)
        return found

    def _errors(self, x: np.ndarray, means: np.ndarray, a: np.ndarray, s: np.ndarray, noise: np.ndarray) -> np.ndarray:
        z, w = a * x + s * noise, a**2 * self.world.width**2 + s**2
        offsets = z[:, None] - a[:, None] * means  # (n, C, D)
        logits = -0.5 * np.einsum("ncd,ncd->nc", offsets, offsets) / w
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        expected = s / w * np.einsum("nc,ncd->nd", shares, offsets)
        return np.square(noise - expected).mean(axis=1)


class LikelihoodScorer(MixtureScorer):
    """The same errors at times that are shares of lambda in [LOWEST, HIGHEST], times d lambda / d time.

    The mean over times and noises, times `scale`, is -log p(picture | class) up to what all classes share.
    """

    def signal(self, times: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(LOWEST + times * (HIGHEST - LOWEST))))

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        return (HIGHEST - LOWEST) * super().cost(pictures, classes, units)


def grid_units(num_times: int, num_noises: int) -> list[Unit]:
    """Units at even times, each with `num_noises` / 2 antithetic pairs of its own, time by time."""
    pairs = num_noises // 2
    return [
        Unit(2 * (row * pairs + pair) + (sign < 0), time, row * pairs + pair, sign, 0, 1.0)
        for row, time in enumerate(even_times(num_times).tolist())
        for pair in range(pairs)
        for sign in (1, -1)
    ]


def integrate_likelihoods(world: MixtureWorld, num_times: int, num_noises: int, seed: int = 0) -> np.ndarray:
    """What `LikelihoodScorer` makes of all pictures and classes at `grid_units`: estimates of log p, `(P, K)`.

    All is put in products of pictures, means and noises, which are shared, so that no `(P, K, N, D)` is formed.
    """
    scorer = LikelihoodScorer(world, seed)
    x, (num_classes, num_components, dim) = world.pictures, world.means.shape
    means = world.means.reshape(-1, dim)
    x_x, x_m = np.square(x).sum(axis=1)[:, None, None], (x @ means.T).reshape(len(x), num_classes, num_components, 1)
    m_m = np.einsum("kcd,kbd->kcb", world.means, world.means)
    far = x_x[..., None] - 2 * x_m + np.einsum("kcc->kc", m_m)[..., None]  # |x - m|^2, (P, K, C, 1)
    units = grid_units(num_times, num_noises)
    total = np.zeros((len(x), num_classes))
    for start in range(0, len(units), num_noises):
        part = units[start : start + num_noises : 2]
        squared = float(scorer.signal(np.array([part[0].time]))[0])
        a, s, w = squared**0.5, (1 - squared) ** 0.5, squared * world.width**2 + 1 - squared
        noises = np.stack([scorer.noise(unit) for unit in part])
        e_e = np.square(noises).sum(axis=1)
        x_e, m_e = x @ noises.T, (means @ noises.T).reshape(num_classes, num_components, -1)
        x_e = x_e[:, None]  # (P, 1, N)
        apart = x_e[:, :, None] - m_e  # (x - m) eps, (P, K, C, N)
        for sign in (1, -1):
            logits = -0.5 / w * (squared * far + 2 * a * s * sign * apart)  # less what components share
            shares = np.exp(logits - logits.max(axis=2, keepdims=True))
            shares /= shares.sum(axis=2, keepdims=True)
            to_noise = (shares * apart).sum(axis=2)  # (x - mean) eps of the expected mean, (P, K, N)
            spread = np.einsum("pkbn,pkcn,kcb->pkn", shares, shares, m_m, optimize=True)
            to_mean = x_x - 2 * (shares * x_m).sum(axis=2) + spread
            kept, pulled = 1 - s**2 / w, a * s / w
            errors = kept**2 * e_e - 2 * kept * pulled * sign * to_noise + pulled**2 * to_mean
            total += errors.sum(axis=2)
    return -0.5 * (HIGHEST - LOWEST) * total / (num_times * num_noises)


def _log_mean_exp(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = values.max(axis=-1)
    return top + np.log(np.exp(values - top[..., None]).mean(axis=-1))
