"""The discriminator: its layers, its start, and what a judgement depends on."""

import pytest
import torch
from torch import nn

from mixmodal.models.discriminator import DiscriminatorConfig, PatchDiscriminator, check_discriminator


def build(**fields: object) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(DiscriminatorConfig(**{"channels": 16, **fields}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_layers", "size"), [(1, 6), (2, 32), (3, 64), (3, 31), (4, 64)])
def test_there_is_a_logit_for_each_patch(num_layers: int, size: int) -> None:
    logits = build(num_layers=num_layers)(torch.zeros(2, 3, size, size))
    side = size // 2**num_layers - 2
    assert logits.shape == (2, 1, side, side)


def test_the_layers_are_those_of_pix2pix() -> None:
    """The table of taming-transformers' NLayerDiscriminator with three layers of stride 2; norms apart."""
    layers = [*PatchDiscriminator(DiscriminatorConfig()).layers]
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    table = [(conv.in_channels, conv.out_channels, conv.stride[0]) for conv in convs]
    assert table == [(3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    assert all(conv.kernel_size == (4, 4) and conv.padding == (1, 1) for conv in convs)
    assert [layer.num_channels for layer in layers if isinstance(layer, nn.GroupNorm)] == [128, 256, 512]
    wide = [conv.out_channels for conv in build(channels=32, num_layers=5).layers if isinstance(conv, nn.Conv2d)]
    assert wide == [32, 64, 128, 256, 256, 256, 1]


def test_the_convolutions_of_a_judgement_see_seventy_pixels_and_its_norms_the_picture() -> None:
    def side_seen(layers: nn.Module) -> list[int]:
        images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layers(images)[0, 0, 7, 7].backward()
        assert images.grad is not None
        seen = images.grad.abs().sum((0, 1)).nonzero()
        return (seen.amax(0) - seen.amin(0) + 1).tolist()

    layers = build().layers
    assert side_seen(nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.GroupNorm)))) == [70, 70]
    assert side_seen(layers) == [128, 128]


def test_weights_start_as_in_pix2pix() -> None:
    torch.manual_seed(0)
    for module in PatchDiscriminator(DiscriminatorConfig()).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 50_000:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.GroupNorm):
            assert float(module.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
            assert 0 < module.weight.detach().std() < 0.04


def test_a_picture_is_judged_alone() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    discriminator = build()
    # measured difference: none
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]), rtol=0, atol=1e-6)


def test_pictures_too_small_for_the_layers_are_refused() -> None:
    config = DiscriminatorConfig(num_layers=3)
    check_discriminator(config, config.min_image_size)
    with pytest.raises(ValueError, match=r"discriminator\.num_layers is 3, which needs pictures of 24 pixels"):
        check_discriminator(config, 23)
    with pytest.raises(ValueError, match=r"these have 16"):
        PatchDiscriminator(config)(torch.zeros(1, 3, 16, 32))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"channels": 0}, "channels"),
        ({"num_layers": 0}, "num_layers"),
        ({"channels": 20}, "norm_groups"),
    ],
)
def test_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=rf"discriminator\.{key}"):
        DiscriminatorConfig(**fields)
