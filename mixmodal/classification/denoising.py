"""What a denoiser's output says about the noise and the picture, and how errors at many times become one cost.

A picture `x` (or its latents) is mixed with noise, `z = a x + s eps`, and `lambda = log(a^2 / s^2)` tells how little. A
network predicts one of four targets from z and the time:

| kind | target | eps_hat | x0_hat |
|---|---|---|---|
| `epsilon` | eps | out | (z - s out) / a |
| `sample` | x | (z - a out) / s | out |
| `v_prediction` (a^2 + s^2 = 1) | a eps - s x | a out + s z | a z - s out |
| `flow` (a = 1 - u, s = u) | eps - x | z + (1 - u) out | z - u out |

Both errors are multiples of the network's own: `eps_hat - eps = k (out - target)` with the k of `error_scale`, so
nothing is divided by an s near 0. For an exact denoiser, `log p(x | c) = const - 1/2 integral E||eps_hat - eps||^2 d
lambda` with one const for all classes (VDM, arXiv 2107.00630, section 4): the weighting `elbo`.

Shapes: n times, P pictures, K classes, U units. Times are shares u of the schedule in (0, 1), float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["epsilon", "sample", "v_prediction", "flow"]
Space = Literal["eps", "x0"]
Loss = Literal["l2", "l1", "huber"]
KINDS: tuple[str, ...] = get_args(Kind)
LOSSES: tuple[str, ...] = get_args(Loss)
NUM_BUCKETS = 20
EDGE = 1e-9  # of a step: u = t / T read back in float64 must not fall to t - 1


class Mix(NamedTuple):
    """How pictures are mixed with noise at n times, each `(n,)`.

    Args:
        alpha: share of the picture, float64.
        sigma: share of the noise, float64.
        model_times: what the network takes as its time: int64 steps, or float32 1000 u.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    model_times: Tensor


class Schedule(Protocol):
    """From times to mixes."""

    def mix(self, times: np.ndarray) -> Mix:
        """The mix at times `(n,)`."""
        ...

    def slope(self, times: np.ndarray) -> np.ndarray:
        """-d lambda / du at times `(n,)`, float64: the density of log signal-to-noise ratio over the schedule."""
        ...


class VariancePreserving:
    """The discrete schedule of DDPM (arXiv 2006.11239, section 2): step t of T is u in [t / T, (t + 1) / T).

    Args:
        alphas_cumprod: a^2 of each step, `(T,)`, falling, in (0, 1); float64 from here on. In half precision s of the
            first steps would be wrong by several percent.

    Raises:
        ValueError: for numbers outside [0, 1].
    """

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)
        if self.alphas_cumprod.ndim != 1 or not ((self.alphas_cumprod >= 0) & (self.alphas_cumprod <= 1)).all():
            raise ValueError(f"alphas_cumprod must be numbers of 0 .. 1, one a step, not {self.alphas_cumprod}")

    def steps(self, times: np.ndarray) -> np.ndarray:
        """The step of each time, int64 `(n,)`."""
        num_steps = len(self.alphas_cumprod)
        return np.floor(checked(times) * num_steps + EDGE).astype(np.int64).clip(0, num_steps - 1)

    def mix(self, times: np.ndarray) -> Mix:
        steps = self.steps(times)
        squares = self.alphas_cumprod[steps]
        return Mix(np.sqrt(squares), np.sqrt(1 - squares), torch.from_numpy(steps))

    def slope(self, times: np.ndarray) -> np.ndarray:
        squares = self.alphas_cumprod.clip(np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
        log_ratios = np.log(squares) - np.log1p(-squares)
        return -np.gradient(log_ratios)[self.steps(times)] * len(squares)


class Flow:
    """Straight paths, a = 1 - u and s = u (rectified flow, arXiv 2209.03003, section 2.1).

    The shifted grid of a scheduler plays no part: it says where a sampler stops, and times here are u itself.

    Args:
        num_steps: what the network's time of u = 1 is, 1000 in diffusers.
    """

    def __init__(self, num_steps: int = 1000) -> None:
        self.num_steps = num_steps

    def mix(self, times: np.ndarray) -> Mix:
        times = checked(times)
        return Mix(1 - times, times, torch.from_numpy(times * self.num_steps).float())

    def slope(self, times: np.ndarray) -> np.ndarray:
        times = checked(times)
        return 2 / (times * (1 - times))


def checked(times: np.ndarray) -> np.ndarray:
    """Times as float64.

    Raises:
        ValueError: for times outside (0, 1); 0 is let through, as the first step of a discrete schedule.
    """
    times = np.asarray(times, dtype=np.float64)
    if not ((times >= 0) & (times < 1)).all():
        raise ValueError(f"times are shares of the schedule in (0, 1); found {times.min()} .. {times.max()}")
    return times


def target(kind: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should give; all tensors broadcast together."""
    match check_kind(kind):
        case "epsilon":
            return eps
        case "sample":
            return x
        case "v_prediction":
            return alpha * eps - sigma * x
        case _:
            return eps - x


def error_scale(kind: str, space: str, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """|k| of `k (out - target)`, the error of the noise (`eps`) or of the picture (`x0`), float64 `(n,)`."""
    ones = np.ones_like(alpha)
    match check_kind(kind):
        case "epsilon":
            eps, x0 = ones, sigma / alpha
        case "sample":
            eps, x0 = alpha / sigma, ones
        case "v_prediction":
            eps, x0 = alpha, sigma
        case _:
            eps, x0 = alpha, sigma
    return eps if space == "eps" else x0


def mean_error(loss: str, residual: Tensor) -> Tensor:
    """The mean loss of each row, float32 `(n,)`, of residuals `(n, ...)`; huber turns linear at 1."""
    rows = residual.float().flatten(1)
    match loss:
        case "l2":
            return rows.square().mean(dim=1)
        case "l1":
            return rows.abs().mean(dim=1)
        case "huber":
            return F.huber_loss(rows, torch.zeros_like(rows), reduction="none").mean(dim=1)
    raise ValueError(f"loss {loss!r} is unknown; choose {', '.join(LOSSES)}")


def check_kind(kind: str) -> str:
    """The kind itself.

    Raises:
        ValueError: naming the kinds that are, for another.
    """
    if kind not in KINDS:
        raise ValueError(f"prediction type {kind!r} is unknown; known are {', '.join(KINDS)}")
    return kind


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """In which space errors are taken, and what an error at each time weighs.

    `uniform`: the noise's error, 1 (Diffusion Classifier, arXiv 2303.16203, section 3.2). `elbo`: the noise's error,
    -d lambda / du, the likelihood itself. `exp`: the picture's error, exp(-7 u) (Clark and Jaini, arXiv 2303.15233,
    section 3.1). `learned`: a weight for each of equal buckets of time, see `fit_weighting`.

    Args:
        name: of the rule.
        space: `eps` or `x0`.
        buckets: the weights of `learned`, from u = 0 on; empty for the others.

    Raises:
        ValueError: for a rule or space that is not there, or buckets that can not act.
    """

    name: str
    space: Space = "eps"
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in (*SPACES, "learned"):
            raise ValueError(f"weighting {self.name!r} is unknown; choose {', '.join(SPACES)} or learned")
        if self.space not in get_args(Space):
            raise ValueError(f"space {self.space!r} is unknown; choose {' or '.join(get_args(Space))}")
        if bool(self.buckets) != (self.name == "learned"):
            raise ValueError(f"weights of buckets belong to learned, and learned needs them; {self.name} has not")

    def weights(self, schedule: Schedule, times: np.ndarray) -> np.ndarray:
        """The weight of the mean error at each time, float64 `(n,)`."""
        times = checked(times)
        match self.name:
            case "uniform":
                return np.ones_like(times)
            case "elbo":
                return schedule.slope(times)
            case "exp":
                return np.exp(-7 * times)
            case _:
                return np.array(self.buckets)[bucket_of(times, len(self.buckets))]


SPACES: dict[str, Space] = {"uniform": "eps", "elbo": "eps", "exp": "x0"}


def build_weighting(name: str) -> Weighting:
    """A weighting by name, in its space: `uniform`, `elbo` or `exp`.

    Raises:
        ValueError: for another name; `learned` comes from `fit_weighting`.
    """
    if name == "learned":
        raise ValueError("the weighting learned is fitted on labelled pictures; choose uniform, elbo or exp, or fit it")
    return Weighting(name=name, space=SPACES.get(name, "eps"))


def bucket_of(times: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket of each time, int64 `(n,)`."""
    return np.floor(checked(times) * num_buckets).astype(np.int64)


def fit_weighting(
    errors: np.ndarray,
    times: np.ndarray,
    labels: np.ndarray,
    space: Space = "eps",
    num_buckets: int = NUM_BUCKETS,
    ridge: float = 1e-2,
) -> Weighting:
    """Weights of buckets of time from a few labelled pictures, by logistic regression (Clark and Jaini, section 3.1).

    The features of a class are its mean errors in each bucket, less those of all classes, as many times the mean
    spread of the classes; the scores are minus their weighted sum. The penalty is on the distance to the mean weight,
    so that few pictures give nearly uniform weights.

    Args:
        errors: mean errors of the space, unweighted, `(P, K, U)` float64.
        times: of the units, the same for all pictures and classes, `(U,)`.
        labels: the right class of each picture, int64 `(P,)`.
        space: in which the errors were taken.
        num_buckets: equal parts of (0, 1).
        ridge: of the penalty.

    Raises:
        ValueError: for shapes that do not fit, errors that are not finite, a bucket without a unit, or errors that do
            not tell classes at all.
    """
    num_pictures, num_classes, num_units = errors.shape
    if len(times) != num_units or len(labels) != num_pictures:
        raise ValueError(f"errors {errors.shape} need as many labels and times, not {len(labels)} and {len(times)}")
    if not np.isfinite(errors).all():
        raise ValueError("errors to fit a weighting on must be finite")
    which = bucket_of(times, num_buckets)
    counts = np.bincount(which, minlength=num_buckets)
    if (counts == 0).any():
        raise ValueError(
            f"buckets {np.flatnonzero(counts == 0).tolist()} of {num_buckets} hold none of the {num_units} times; "
            "take more units or fewer buckets"
        )
    sums = np.zeros((num_buckets, num_pictures, num_classes))
    np.add.at(sums, which, np.moveaxis(errors, 2, 0))
    features = np.moveaxis(sums / counts[:, None, None], 0, 2)
    features = features - features.mean(axis=1, keepdims=True)
    spread = features.std()
    if spread == 0:
        raise ValueError("the errors are the same for all classes: no weighting can be learned from them")
    weights = _fit_logistic(torch.from_numpy(features / spread), torch.from_numpy(np.asarray(labels)), ridge)
    if weights.mean() <= 0:
        raise ValueError("wrong classes have the smaller errors in these pictures: check the labels")
    return Weighting(name="learned", space=space, buckets=tuple((weights / weights.mean()).tolist()))


def _fit_logistic(features: Tensor, labels: Tensor, ridge: float) -> np.ndarray:
    """The weights `(buckets,)` that minimize the cross-entropy of `-features @ weights`; the problem is convex."""
    weights = torch.full(features.shape[2:], 1 / features.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = (weights - weights.mean()).square().sum() + 1e-3 * weights.square().sum()
        loss = F.cross_entropy(-(features @ weights), labels) + ridge * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().numpy()
