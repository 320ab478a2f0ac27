"""Distances between pictures and their reconstructions that networks judge: perceptual, pair by pair, and Frechet.

The Frechet distance compares two sets as Gaussians over a network's features (arXiv 1706.08500, section 2). It is FID
on the features of Inception only; here it is named by its network, and values of two networks do not compare.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.data.pictures import to_images
from mixmodal.models.efficientnet import TRAINED_SIZE, load_efficientnet_lite0
from mixmodal.objectives.perceptual import PerceptualConfig, PerceptualLoss
from mixmodal.tokenization.preprocessing import to_pixels

FeatureNetwork = Literal["efficientnet_lite0", "inception"]

FEATURE_NETWORKS = ("efficientnet_lite0", "inception")
INCEPTION_FEATURES = 2048


class PairScore(Protocol):
    """A score over pairs that arrive in batches."""

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Take in pairs, both `(B, 3, H, W)` in [-1, 1], on the score's device."""
        ...

    def compute(self) -> dict[str, float]:
        """The values of all pairs so far, by name."""
        ...


class PerceptualDistance:
    """The mean over pairs of the perceptual distance, named by its backbone.

    `perceptual_efficientnet_lite0`, or `lpips_vgg`, which is LPIPS as published where its weights are.
    """

    def __init__(self, config: PerceptualConfig, device: str | torch.device = "cpu") -> None:
        self.name = "lpips_vgg" if config.backbone == "lpips_vgg" else f"perceptual_{config.backbone}"
        self.loss = PerceptualLoss(config).to(device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.num_pictures = 0

    @torch.no_grad()
    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        self.total += self.loss(reconstructions, images).double().sum()
        self.num_pictures += len(images)

    def compute(self) -> dict[str, float]:
        """
        Raises:
            ValueError: without pictures.
        """
        if not self.num_pictures:
            raise ValueError("there are no pictures to compare")
        return {self.name: float(self.total) / self.num_pictures}


class FrechetDistance:
    """The Frechet distance of the reconstructions, as pictures of 8 bits, from the originals; torchmetrics sums it up.

    Named `frechet_efficientnet_lite0`, or `fid` on Inception. It is 0 for equal sets up to rounding, which may
    come out negative (-2e-5 on 128 pictures), and biased upwards for small ones: compare values of the same pictures.

    Args:
        network: whose features; Inception comes with the extra `fid` and downloads its weights.
        device: where the network runs.

    Raises:
        ValueError: where the network is unknown or not installed.
    """

    def __init__(self, network: FeatureNetwork = "efficientnet_lite0", device: str | torch.device = "cpu") -> None:
        self.name = "fid" if network == "inception" else f"frechet_{network}"
        self.network = network
        feature = build_features(network)
        self.num_features = feature if isinstance(feature, int) else feature.num_features
        self.metric = build_metric(feature).to(device)
        self.num_pictures = 0

    @torch.no_grad()
    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        self.metric.update(to_pixels(images), real=True)
        self.metric.update(to_pixels(reconstructions), real=False)
        self.num_pictures += len(images)

    def compute(self) -> dict[str, float]:
        """
        Raises:
            ValueError: with fewer than two pictures, which have no covariance.
        """
        if self.num_pictures < 2:
            raise ValueError(f"{self.name}: {self.num_pictures} pictures; the distance needs at least 2")
        return {self.name: float(self.metric.compute())}

    def warning(self) -> str | None:
        """What to know about the value, if anything."""
        return warn_of_few(self.name, self.num_pictures, self.num_features)


def warn_of_few(name: str, num_pictures: int, num_features: int) -> str | None:
    """What to know about a Frechet distance of so few pictures; None where they are enough."""
    if num_pictures > num_features:
        return None
    return (
        f"{name}: {num_pictures} pictures do not determine a covariance of {num_features} features; "
        f"the value is biased upwards and compares only with values of the same pictures"
    )


class PooledEfficientNet(nn.Module):
    """Pixels, uint8 `(B, 3, H, W)`, to float32 `(B, 1280)`: resized to 224 a side, bilinear and antialiased."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet_lite0()
        self.num_features = self.network.num_features

    def forward(self, pixels: Tensor) -> Tensor:
        images = to_images(pixels)
        size = (TRAINED_SIZE, TRAINED_SIZE)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return self.network(images)


def build_features(network: FeatureNetwork) -> PooledEfficientNet | int:
    """What torchmetrics takes as `feature`: a network of ours, or the width of its own Inception's.

    Raises:
        ValueError: for another name.
    """
    if network == "efficientnet_lite0":
        return PooledEfficientNet()
    if network == "inception":
        return INCEPTION_FEATURES
    raise ValueError(f"features is {network!r}; choose one of {', '.join(FEATURE_NETWORKS)}")


def build_metric(feature: nn.Module | int) -> Any:
    """torchmetrics' Frechet distance; it takes pixels, uint8 `(B, 3, H, W)`, and sums in float64.

    Raises:
        ValueError: where Inception is asked for and torch-fidelity, which has it, is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        return FrechetInceptionDistance(feature=feature)
    except ModuleNotFoundError as error:
        raise ValueError(
            "features inception needs torch-fidelity and torchvision: pip install 'mixmodal[fid]'; it downloads "
            "Inception's weights on first use. features efficientnet_lite0 needs neither"
        ) from error
