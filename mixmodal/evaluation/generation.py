"""How near a set of drawn pictures is to a set of real ones, by the features of a named network.

Shape suffixes: N real and M drawn pictures, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixmodal.evaluation.features import FeatureNetwork, PooledEfficientNet, build_features, build_metric

FEATURE_BATCH = 64
"""Pictures that a network takes at a time: always the same, so that features do not depend on other settings."""
ROWS_AT_A_TIME = 1024


class Spread(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    deviation: float


class PrecisionRecall(NamedTuple):
    """Shares, 0 .. 1."""

    precision: float
    recall: float


class _Given(nn.Module):
    """Features in the place of a network that makes them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def build_network(network: FeatureNetwork, device: str | torch.device = "cpu") -> nn.Module:
    """Pixels, uint8 `(B, 3, H, W)`, to features `(B, D)`; see `build_features`.

    Raises:
        ValueError: where the network is unknown or not installed.
    """
    feature = build_features(network)
    found = feature if isinstance(feature, PooledEfficientNet) else build_metric(feature).inception
    return found.to(device).eval()


@torch.inference_mode()
def embed(network: nn.Module, pixels: Iterable[Tensor], device: str | torch.device = "cpu") -> Tensor:
    """Features `(N, D)` float32 on the CPU.

    Args:
        network: of `build_network`, on `device`.
        pixels: one picture each, uint8 `(3, H, W)`, all of a size.
        device: where it computes.

    Raises:
        ValueError: without pictures.
    """
    found = [network(torch.stack(batch).to(device)).float().cpu() for batch in _batches(pixels)]
    if not found:
        raise ValueError("there are no pictures to take features of")
    return torch.cat(found)


def _batches(pixels: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for one in pixels:
        batch.append(one)
        if len(batch) == FEATURE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def frechet_distance(real_ND: Tensor, drawn_MD: Tensor) -> float:
    """The Frechet distance of two sets of features as Gaussians (arXiv 1706.08500, section 2), by torchmetrics.

    Raises:
        ValueError: with fewer than two pictures on a side, which have no covariance.
    """
    _check_pair(real_ND, drawn_MD, least=2)
    metric = build_metric(_Given(real_ND.shape[1])).set_dtype(torch.float64)
    metric.update(real_ND.double(), real=True)
    metric.update(drawn_MD.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    real_ND: Tensor, drawn_MD: Tensor, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> Spread:
    """The squared maximum mean discrepancy under a cubic kernel (KID, arXiv 1801.01401, section 4), by torchmetrics.

    The estimate is unbiased: it may come out below 0.

    Args:
        real_ND, drawn_MD: features.
        subset_size: pictures of each side in a subset; fewer where there are fewer.
        num_subsets: drawn without replacement, each anew.
        seed: of these draws.

    Raises:
        ValueError: with fewer than two pictures on a side.
    """
    from torchmetrics.image.kid import poly_mmd

    _check_pair(real_ND, drawn_MD, least=2)
    size, rng = min(subset_size, len(real_ND), len(drawn_MD)), np.random.default_rng(seed)
    found = []
    for _ in range(num_subsets):
        real, drawn = (
            side[torch.from_numpy(rng.permutation(len(side))[:size])].double() for side in (real_ND, drawn_MD)
        )
        found.append(float(poly_mmd(real, drawn)))
    return Spread(float(np.mean(found)), float(np.std(found)))


def precision_recall(real_ND: Tensor, drawn_MD: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, section 2, equation 1).

    A picture lies within a set where it is no farther from one of the set than that one's k-th nearest other is.
    Precision is the share of drawn pictures within the real ones, recall the share of real ones within the drawn.

    Raises:
        ValueError: where a side has no more than `neighbours` pictures.
    """
    _check_pair(real_ND, drawn_MD, least=neighbours + 1)
    real, drawn = real_ND.double(), drawn_MD.double()
    return PrecisionRecall(_share_within(drawn, real, neighbours), _share_within(real, drawn, neighbours))


def _share_within(points: Tensor, others: Tensor, neighbours: int) -> float:
    exact = "donot_use_mm_for_euclid_dist"
    radii = torch.cat(
        [
            torch.cdist(part, others, compute_mode=exact).kthvalue(neighbours + 1, dim=1).values  # itself is the first
            for part in others.split(ROWS_AT_A_TIME)
        ]
    )
    hits = sum(
        int((torch.cdist(part, others, compute_mode=exact) <= radii).any(dim=1).sum())
        for part in points.split(ROWS_AT_A_TIME)
    )
    return hits / len(points)


def _check_pair(real_ND: Tensor, drawn_MD: Tensor, least: int) -> None:
    if real_ND.ndim != 2 or drawn_MD.ndim != 2 or real_ND.shape[1] != drawn_MD.shape[1]:
        raise ValueError(f"features of shapes {tuple(real_ND.shape)} and {tuple(drawn_MD.shape)} do not compare")
    if min(len(real_ND), len(drawn_MD)) < least:
        raise ValueError(f"{len(real_ND)} real and {len(drawn_MD)} drawn pictures; at least {least} of each are needed")
