"""Winograd's convolution, with the norm before it, is what torch computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.models import winograd
from mixmodal.tokenization.autoencoder import norm_silu_conv


def draw(channels: int, height: int, width: int, batch: int = 2) -> Tensor:
    images = torch.randn(batch, channels, height, width) * torch.rand(channels, 1, 1) + torch.randn(channels, 1, 1)
    return images.to(memory_format=torch.channels_last)


def draw_layers(out_channels: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(32, 128), nn.Conv2d(128, out_channels, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv


@pytest.fixture
def layers() -> tuple[nn.GroupNorm, nn.Conv2d]:
    return draw_layers(160)


def direct(images: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    parameters = [p.to(dtype) for p in (norm.weight, norm.bias, conv.weight, conv.bias) if p is not None]
    images = F.silu(F.group_norm(images.to(dtype), norm.num_groups, parameters[0], parameters[1], norm.eps))
    return F.conv2d(images, parameters[2], parameters[3], padding=1)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 3), (5, 4), (6, 6), (8, 20), (32, 27)])
@pytest.mark.parametrize("out_channels", [160, 128])
def test_it_is_the_direct_convolution(
    out_channels: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, conv = draw_layers(out_channels)
    images = draw(128, height, width)
    kept = images.clone()
    expected = direct(images, norm, conv, torch.float64)
    whole = winograd.norm_silu_conv(images, norm, conv)
    assert whole.shape == expected.shape
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, kept)
    worst = (whole - expected).abs().max() / expected.std()
    assert worst < 4e-5  # 1.1e-5 seen; a direct convolution in float32 has 8e-6
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 1)
    for inplace in (False, True):
        found = winograd.norm_silu_conv(images, norm, conv, inplace)
        torch.testing.assert_close(found, whole, rtol=0, atol=5e-5)
    assert (found.data_ptr() == images.data_ptr()) == (out_channels == 128)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(layers: tuple[nn.GroupNorm, nn.Conv2d]) -> None:
    norm, conv = layers
    images = draw(128, 64, 64, batch=3)
    assert winograd.pays(images, conv.weight)
    assert torch.equal(norm_silu_conv(norm, conv, images)[1:2], norm_silu_conv(norm, conv, images[1:2]))


def test_training_and_small_layers_take_the_direct_convolution(layers: tuple[nn.GroupNorm, nn.Conv2d]) -> None:
    norm, conv = layers
    images = draw(128, 64, 40)
    assert not winograd.pays(images, conv.weight), "gradients are asked for"
    norm_silu_conv(norm, conv, images).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        assert winograd.pays(images, conv.weight)
        assert not winograd.pays(images[:0], conv.weight), "no pictures"
        assert norm_silu_conv(norm, conv, images[:0]).shape == (0, 160, 64, 40)
        assert not winograd.pays(images[:, :, :63], conv.weight), "too few pixels"
        assert not winograd.pays(images[:, :64], conv.weight[:, :64]), "too few channels"
        assert not winograd.pays(images.bfloat16(), conv.weight), "another type"
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd.pays(images, conv.weight)
            assert norm_silu_conv(norm, conv, images).dtype == torch.bfloat16


def test_weights_that_change_are_seen_at_once(layers: tuple[nn.GroupNorm, nn.Conv2d]) -> None:
    norm, conv = layers
    images = draw(128, 64, 64)
    with torch.no_grad():
        before = norm_silu_conv(norm, conv, images)
        conv.weight.data.mul_(2)
        conv.bias.data.mul_(2)  # pyright: ignore[reportOptionalMemberAccess]
        torch.testing.assert_close(norm_silu_conv(norm, conv, images), 2 * before, rtol=0, atol=2e-4)


@torch.no_grad()
def test_moments_of_flat_pictures_are_exact() -> None:
    norm, _ = draw_layers(128)
    images = draw(128, 1, 1).expand(-1, -1, 128, 96).clone(memory_format=torch.channels_last)
    images[:, :, 40:60, 40:60] = draw(128, 20, 20)
    expected = F.group_norm(images.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    scale, shift = winograd.affine(images, norm)
    found = images * scale[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)  # 4e-5 seen; torch's has 1.3e-3
