"""The autoencoder: every option builds, shapes hold, and values that can not work are named."""

import pytest
import torch

from mixmodal.tokenization.autoencoder import (
    AutoencoderConfig,
    Decoder,
    Encoder,
    ResBlock,
    Upsample,
    check_autoencoder,
)

SMALL = {"channels": 16, "channel_multipliers": (1, 2), "norm_groups": 8, "head_dim": 16}
CONFIGS = {
    "vqgan": AutoencoderConfig(**SMALL, attention_stages=(1,), latent_channels=12),
    "patches": AutoencoderConfig(**SMALL, patch_size=4, resample="pixel_shuffle", mid_blocks=("res", "transformer")),
    "no_blocks": AutoencoderConfig(
        **SMALL, resample="pixel_shuffle", num_res_blocks=(1, 0), num_decoder_res_blocks=0, mid_blocks=()
    ),
    "wide_decoder": AutoencoderConfig(**SMALL, decoder_channels=32, num_res_blocks=(0, 1), num_decoder_res_blocks=1),
    "one_stage": AutoencoderConfig(channels=16, channel_multipliers=(1,), norm_groups=4, patch_size=8),
}


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Blocks start as the identity; move them off it so that every layer shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_have_the_code_grid_and_pictures_come_back_in_their_size(name: str) -> None:
    config = CONFIGS[name]
    check_autoencoder(config, image_size=32)
    side = 32 // config.downsampling
    latents = Encoder(config, 32, latent_dim=5)(torch.rand(2, 3, 32, 32))
    assert latents.shape == (2, 5, side, side)
    assert Decoder(config, 32, latent_dim=5)(latents).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    modules = torch.nn.Sequential(Encoder(CONFIGS[name], 32, latent_dim=5), Decoder(CONFIGS[name], 32, latent_dim=5))
    perturb(modules)(torch.rand(2, 3, 32, 32)).square().sum().backward()
    silent = [key for key, parameter in modules.named_parameters() if not parameter.grad.abs().sum() > 0]  # type: ignore[union-attr]
    # softmax does not see a bias that all keys share
    assert [key for key in silent if not key.endswith(".k.bias")] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_computed_without_gradients_is_the_same(name: str) -> None:
    """In-place sums to the bit; upsampling by transposed convolutions up to rounding."""
    torch.manual_seed(0)
    encoder = perturb(Encoder(CONFIGS[name], 32, latent_dim=5))
    decoder = perturb(Decoder(CONFIGS[name], 32, latent_dim=5))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    copy = images.clone()
    latents = encoder(images)
    pictures = decoder(latents)
    with torch.no_grad():
        assert torch.equal(encoder(images), latents)
        found = decoder(latents)
    assert torch.equal(images, copy)
    if CONFIGS[name].resample == "pixel_shuffle":
        assert torch.equal(found, pictures)
    torch.testing.assert_close(found, pictures, rtol=0, atol=1e-5)  # measured: 1.6e-6


def test_upsampling_without_gradients_has_the_same_borders() -> None:
    torch.manual_seed(0)
    upsample, images = Upsample(3), torch.rand(2, 3, 4, 6)
    expected = upsample(images)
    with torch.no_grad():
        found = upsample(images)
        half = upsample.bfloat16()(images.bfloat16())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # measured: 1.5e-7
    assert half.dtype == torch.bfloat16


def test_autocast_without_gradients_keeps_the_precision_of_sums() -> None:
    torch.manual_seed(0)
    block = perturb(ResBlock(16, 16, CONFIGS["vqgan"]))
    images = torch.rand(1, 16, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block(images)
        with torch.no_grad():
            assert torch.equal(block(images), expected)
    assert expected.dtype == torch.float32


def test_the_defaults_have_the_parameters_of_llamagens_f16() -> None:
    config = AutoencoderConfig(attention_stages=(4,), latent_channels=256)
    with torch.device("meta"):
        halves = Encoder(config, 256, latent_dim=8), Decoder(config, 256, latent_dim=8)
    num_parameters = sum(parameter.numel() for half in halves for parameter in half.parameters())
    assert config.downsampling == 16
    assert round(num_parameters / 1e6) == 72  # arXiv 2406.06525, table 2


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"patch_size": 3}, "image_size 32 is no multiple of 6"),
        ({"channels": 20}, r"autoencoder\.channels"),
        ({"decoder_channels": 20}, r"autoencoder\.decoder_channels"),
        ({"num_res_blocks": (1, 2, 3)}, "num_res_blocks"),
        ({"num_decoder_res_blocks": -1}, "num_decoder_res_blocks"),
        ({"attention_stages": (2,)}, "attention_stages"),
        ({"latent_channels": -1}, "latent_channels"),
        ({"mid_blocks": ("transformer",), "head_dim": 24}, "head_dim"),
        ({"mid_blocks": ("mlp",)}, "mid_blocks"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"head_dim": 0, "mid_blocks": ("transformer",)}, "head_dim is 0"),
        ({"channels": -16}, "channels is -16"),
        ({"norm_eps": -1.0}, "norm_eps is -1"),
        ({"resample": "bilinear"}, "resample"),
        ({"num_res_blocks": (1, 0)}, "num_res_blocks"),
    ],
)
def test_config_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        check_autoencoder(AutoencoderConfig(**{**SMALL, **fields}), image_size=32)
