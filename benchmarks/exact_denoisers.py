"""Classes whose best denoiser is known in closed form, as scorers: what a classifier finds can be judged by Bayes.

A class is a mixture of Gaussians N(mean, width^2 I) with equal shares. With z = a x + s eps, the noise that the class
expects in z is s / w times the mean of z - a mean over the components given z, where w = a^2 width^2 + s^2.

Shapes: P pictures, K classes, C components, D numbers of a picture, n triples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixmodal.classification.units import Unit, draw_noise

NUM_STEPS = 1000


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


def _log_mean_exp(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = values.max(axis=-1)
    return top + np.log(np.exp(values - top[..., None]).mean(axis=-1))
