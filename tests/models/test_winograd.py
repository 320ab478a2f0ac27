"""Winograd's convolution is the convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.models import winograd
from mixmodal.tokenization.autoencoder import Conv3x3


def draw(channels: int, height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)


@pytest.fixture
def layer() -> Conv3x3:
    torch.manual_seed(0)
    return Conv3x3(128, 160)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 20), (32, 28)])
def test_it_is_the_direct_convolution(layer: Conv3x3, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer.bias is not None
    images = draw(128, height, width)
    expected = F.conv2d(images.double(), layer.weight.double(), layer.bias.double(), padding=1)
    whole = winograd.conv3x3(images, layer.weight, layer.bias)
    assert whole.shape == expected.shape
    assert whole.is_contiguous(memory_format=torch.channels_last)
    worst = (whole - expected).abs().max() / expected.std()
    assert worst < 1e-4  # 4.0e-5 seen; a direct convolution in float32 has 2e-6
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 1)
    torch.testing.assert_close(winograd.conv3x3(images, layer.weight, layer.bias), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(layer: Conv3x3) -> None:
    images = draw(128, 32, 32, batch=3)
    assert winograd.pays(images, layer.weight)
    assert torch.equal(layer(images)[1:2], layer(images[1:2]))


def test_training_and_small_layers_take_the_direct_convolution(layer: Conv3x3) -> None:
    images = draw(128, 32, 32)
    assert not winograd.pays(images, layer.weight), "gradients are asked for"
    with torch.no_grad():
        assert winograd.pays(images, layer.weight)
        assert not winograd.pays(images[:, :, :30], layer.weight), "no multiple of 4"
        assert not winograd.pays(images[:, :, :16, :16], layer.weight), "too few tiles"
        assert not winograd.pays(images[:, :64], layer.weight[:, :64]), "too few channels"
        assert not winograd.pays(images.bfloat16(), layer.weight), "another type"
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd.pays(images, layer.weight)
            assert layer(images).dtype == torch.bfloat16


def test_weights_that_change_are_seen_at_once(layer: Conv3x3) -> None:
    images = draw(128, 32, 32)
    with torch.no_grad():
        before = layer(images)
        layer.weight.data.mul_(2)
        layer.bias.data.mul_(2)  # pyright: ignore[reportOptionalMemberAccess]
        torch.testing.assert_close(layer(images), 2 * before, rtol=0, atol=1e-4)
