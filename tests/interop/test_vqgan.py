"""Foreign image tokenizers code and draw here as they do at home, and what is none of them is named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmodal.cli import main
from mixmodal.interop.vqgan import build_vqgan, load_vqgan
from mixmodal.tokenization.image import ImageTokenizer

PROJECTS = pytest.mark.parametrize("project", ["taming", "llamagen"])
CHAMELEON = {
    "embed_dim": 8,
    "num_embeddings": 40,
    "latent_channels": 16,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [4],
}
VQ_MODEL = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 12,
    "num_vq_embeddings": 40,
    "norm_num_groups": 8,
    "vq_embed_dim": 6,
    "sample_size": 16,
}


def draw_images(size: int = 16) -> Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def perturb(model: nn.Module) -> nn.Module:
    """Random norms and biases too, and a codebook wide enough that many codes are met."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise) if "embedding" in name else parameter.add_(0.1 * noise)
    return model.eval()


@PROJECTS
@torch.no_grad()
def test_codes_and_pictures_are_those_of_the_project(project: str) -> None:
    state, images = foreign.draw_state(project), draw_images()
    found = build_vqgan(state, foreign.SIZE)
    latents, codes = foreign.encode(project, state, images)
    own = found.tokenizer
    assert found.layout == project
    assert found.num_tensors == len(state)
    assert len(codes.unique()) > 10
    torch.testing.assert_close(own.encoder(images), latents, rtol=0, atol=2e-5)  # measured: 3.4e-6
    assert torch.equal(own.encode(images), codes)
    drawn = foreign.decode(project, state, codes)
    torch.testing.assert_close(own.decode(codes), drawn.clamp(-1, 1), rtol=0, atol=2e-5)  # measured: 5.6e-6


def test_the_config_is_read_from_names_and_shapes() -> None:
    config = build_vqgan(foreign.draw_state("llamagen"), 32).tokenizer.config
    autoencoder = config.autoencoder
    assert (autoencoder.channels, autoencoder.channel_multipliers) == (32, (1, 1, 2))
    assert (autoencoder.num_res_blocks, autoencoder.num_decoder_res_blocks) == (2, 3)
    assert (autoencoder.attention_stages, autoencoder.mid_blocks) == ((2,), ("res", "attention", "res"))
    assert (autoencoder.latent_channels, autoencoder.decoder_channels) == (16, 0)
    assert (config.quantizer.kind, config.quantizer.codebook_size, config.quantizer.codebook_dim) == (
        "vq_cosine",
        40,
        8,
    )
    assert config.image_size == 32


@torch.no_grad()
def test_the_encoder_is_that_of_transformers_chameleon() -> None:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    theirs: Any = perturb(ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON)))
    images = draw_images()
    found = build_vqgan(theirs.state_dict(), 16, encoder_only=True)
    output = theirs.encode(images)
    latents = theirs.quant_conv(output.last_hidden_state)
    assert found.tokenizer.config.autoencoder.attention_stages == (2,)
    torch.testing.assert_close(found.tokenizer.encoder(images), latents, rtol=0, atol=2e-5)  # measured: 2.8e-6
    assert len(output.image_tokens.unique()) > 10
    assert torch.equal(found.tokenizer.encode(images).flatten(), output.image_tokens.flatten())


def test_a_tokenizer_without_decoder_reads_pictures_and_draws_none(tmp_path: Path) -> None:
    state = foreign.draw_state("taming", with_decoder=False)
    build_vqgan(state, foreign.SIZE, encoder_only=True).tokenizer.save(tmp_path)
    tokenizer = ImageTokenizer.load(tmp_path)
    codes = tokenizer.encode(draw_images())
    assert codes.shape[1:] == tokenizer.grid
    with pytest.raises(ValueError, match=r"no decoder, .* --image_tokenizer vqgan\.ckpt"):
        tokenizer.decode(codes)


@torch.no_grad()
def test_codes_and_pictures_are_those_of_diffusers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import VQModel

    theirs: Any = perturb(VQModel(**VQ_MODEL))
    theirs.save_pretrained(tmp_path)
    images = draw_images()
    found = load_vqgan(tmp_path, 16)
    latents = theirs.encode(images).latents
    quantized, _, (_, _, codes) = theirs.quantize(latents)
    assert found.tokenizer.config.autoencoder.norm_groups == 8
    assert len(codes.unique()) > 10
    assert torch.equal(found.tokenizer.encode(images).flatten(), codes.flatten())
    drawn = theirs.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(found.tokenizer.decoder(quantized), drawn, rtol=0, atol=2e-5)  # measured: 3.9e-6
    reconstructions = theirs(images).sample.clamp(-1, 1)
    own = found.tokenizer.decode(codes.view(4, 8, 8))
    torch.testing.assert_close(own, reconstructions, rtol=0, atol=2e-5)  # measured: 4.1e-6


def test_attention_under_diffusers_older_names_is_read_alike(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import VQModel

    state = perturb(VQModel(**VQ_MODEL)).state_dict()
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel", "norm_num_groups": 8}')
    older = {}
    for name, tensor in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        older[name] = tensor
    assert older.keys() != state.keys()
    tokenizers = [
        build_vqgan(weights, 16, diffusers_config=tmp_path / "config.json").tokenizer for weights in (state, older)
    ]
    assert torch.equal(tokenizers[0].encode(draw_images()), tokenizers[1].encode(draw_images()))


def test_stages_of_different_depth_are_held() -> None:
    """A stage with one ResBlock less, in both halves."""
    state = foreign.draw_state("taming")
    for name in list(state):
        if name.startswith(("encoder.down.1.block.1.", "decoder.up.1.block.2.")):
            del state[name]
    config = build_vqgan(state, 16).tokenizer.config.autoencoder
    assert config.num_res_blocks == (2, 1, 2)
    assert config.num_decoder_res_blocks == (3, 2, 3)


@PROJECTS
def test_known_extras_are_skipped_and_counted(project: str) -> None:
    state, images = foreign.draw_state(project), draw_images()
    codes = build_vqgan(state, 16).tokenizer.encode(images)
    extras = {
        "taming": {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.ones(1)},
        "llamagen": {"quantize.codebook_used": torch.zeros(65536)},
    }[project]
    whole = {f"model.vqmodel.{name}": tensor for name, tensor in {**state, **extras}.items()}
    found = build_vqgan({"lm_head.weight": torch.ones(1), **whole}, 16)
    counts = {"taming": {"loss.*": 2}, "llamagen": {"quantize.codebook_used*": 1}}[project]
    assert found.skipped == {**counts, "all outside model.vqmodel.*": 1}
    assert torch.equal(found.tokenizer.encode(images), codes)


def test_half_precision_becomes_float32() -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in foreign.draw_state("taming").items()}
    own = build_vqgan(state, 16).tokenizer
    assert {tensor.dtype for tensor in own.state_dict().values()} == {torch.float32}
    assert torch.equal(own.encoder.conv_in.weight, state["encoder.conv_in.weight"].float())


@PROJECTS
def test_the_command_writes_a_tokenizer_that_loads(
    project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, images = foreign.draw_state(project), draw_images()
    torch.save(
        {"state_dict": {**state, "loss.x": torch.ones(1)} if project == "taming" else state}, tmp_path / "a.ckpt"
    )
    main(["import", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "out"), "--image_size", "16"])
    own = ImageTokenizer.load(tmp_path / "out")
    assert torch.equal(own.encode(images), foreign.encode(project, state, images)[1])
    printed = capsys.readouterr().out
    assert f"layout  {project}" in printed
    assert "40 of 8 dimensions" in printed
    assert ("1 of loss.*" in printed) == (project == "taming")


def test_the_command_takes_the_preprocessing_by_name(tmp_path: Path) -> None:
    save_file(foreign.draw_state("taming"), tmp_path / "a.safetensors")
    arguments = ["import", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out"), "--image_size", "16"]
    main([*arguments, "--preprocess", "transformers"])
    assert ImageTokenizer.load(tmp_path / "out").config.preprocess == "transformers"


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(foreign.draw_state("taming"), tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "a.safetensors"), "--out", str(tmp_path), "--image_size", "16"])
    assert "not empty" in capsys.readouterr().err


def test_a_checkpoint_without_decoder_is_refused_by_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"picture decoder is missing.*vqgan\.ckpt"):
        build_vqgan(foreign.draw_state("taming", with_decoder=False), 16)


def test_another_architecture_is_named_by_missing_and_unexpected_weights() -> None:
    state = foreign.draw_state("taming")
    for name in [name for name in state if name.startswith("decoder.up.0.block")]:
        state["other." + name] = state.pop(name)
    state["decoder.conv_out.weight"] = torch.zeros(4, 32, 3, 3)
    with pytest.raises(ValueError, match="another architecture") as caught:
        build_vqgan(state, 16)
    message = str(caught.value)
    assert "8 missing (decoder.up.0.block.0.norm1.weight, " in message
    assert "24 unexpected (other.decoder.up.0.block.0.conv1.bias, " in message
    assert "and 14 more" in message
    assert "1 of another shape (decoder.conv_out.weight (4, 32, 3, 3) instead of (3, 32, 3, 3))" in message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("encoder.conv_in.weight", r"1 missing \(encoder.conv_in.weight\)"),
        ("decoder.mid.block_1.conv1.bias", r"1 missing \(decoder.mid.block_1.conv1.bias\)"),
        ("encoder.down.0.block.0.conv1.weight", r"encoder.down.0.block.0.conv1.weight"),
        ("quantize.embedding.weight", r"0 codebooks.*1 missing \(quantize.embedding.weight\)"),
        ("post_quant_conv.bias", r"1 missing \(post_quant_conv.bias\)"),
    ],
)
def test_a_missing_weight_is_named(gone: str, words: str) -> None:
    state = foreign.draw_state("taming")
    del state[gone]
    with pytest.raises(ValueError, match=words):
        build_vqgan(state, 16)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("quant_conv.bias", torch.full((8,), torch.nan), "quant_conv.bias holds values that are no finite"),
        ("quant_conv.bias", torch.ones(8, dtype=torch.int8), "quant_conv.bias holds values that are no finite"),
        ("encoder.conv_in.weight", torch.ones(()), "no such shape"),
        ("quantize.embedding.weight", torch.ones(40), "no such shape"),
        ("encoder.conv_in.weight", torch.ones(0, 3, 3, 3), "no such shape"),
        ("encoder.conv_in.weight", torch.ones(32, 4, 3, 3), "1 of another shape"),
        ("quantize.embed.weight", torch.ones(40, 8), "1 unexpected"),
    ],
)
def test_a_wrong_weight_is_named(name: str, value: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_vqgan({**foreign.draw_state("taming"), name: value}, 16)


def test_an_image_size_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="image_size 18 is no multiple of 4"):
        build_vqgan(foreign.draw_state("taming"), 18)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "config.json must stand beside"),
        ("[1]", "not a config of diffusers"),
        ('{"act_fn": "relu"}', "act_fn is 'relu'"),
        ('{"_class_name": "AutoencoderKL"}', "AutoencoderKL"),
        ('{"norm_num_groups": "8"}', "norm_num_groups"),
    ],
)
def test_diffusers_weights_need_a_config_that_fits(config: str | None, words: str, tmp_path: Path) -> None:
    weights = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(8, 8, 3, 3),
        "decoder.conv_in.weight": torch.ones(8, 8, 3, 3),
        "quantize.embedding.weight": torch.ones(4, 4),
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        load_vqgan(tmp_path, 16)
