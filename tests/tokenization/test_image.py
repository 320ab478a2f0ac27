"""The image tokenizer: codes that do not depend on the caller, and a folder that gives the same tokenizer back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmodal.document import CM3LeonFormat, Document, Image
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

AUTOENCODER = AutoencoderConfig(
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    num_decoder_res_blocks=1,
    patch_size=2,
    resample="pixel_shuffle",
    mid_blocks=("res", "transformer"),
    norm_groups=8,
    head_dim=16,
)
QUANTIZERS = {
    "fsq": QuantizerConfig(kind="fsq", levels=(8, 5, 5)),
    "vq": QuantizerConfig(kind="vq_cosine", codebook_size=64, codebook_dim=4),
    "lfq": QuantizerConfig(kind="lfq", codebook_dim=6),
    "simvq": QuantizerConfig(kind="simvq", codebook_size=64, codebook_dim=4),
    "residual_vq": QuantizerConfig(kind="residual_vq", num_levels=2, codebook_size=64, codebook_dim=4),
}


@pytest.fixture(params=QUANTIZERS, ids=list(QUANTIZERS))
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    torch.manual_seed(0)
    config = ImageTokenizerConfig(image_size=16, autoencoder=AUTOENCODER, quantizer=QUANTIZERS[request.param])
    built = ImageTokenizer(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return built.eval()


def draw_images(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode_and_decode_keep_their_shapes_and_ranges(tokenizer: ImageTokenizer) -> None:
    codes = tokenizer.encode(draw_images())
    assert tokenizer.grid == (4, 4 * tokenizer.quantizer.codes_per_place)
    assert codes.shape == (4, *tokenizer.grid)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codebook_size
    images = tokenizer.decode(codes)
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


def test_decode_of_encode_is_the_reconstruction_of_forward(tokenizer: ImageTokenizer) -> None:
    reconstruction, quantized = tokenizer(draw_images())
    codes = tokenizer.encode(draw_images())
    assert torch.equal(codes, quantized.codes)
    torch.testing.assert_close(tokenizer.decode(codes), reconstruction.detach().clamp(-1, 1), rtol=0, atol=0)


def test_codes_of_a_picture_do_not_depend_on_its_batch(tokenizer: ImageTokenizer) -> None:
    images = draw_images(64)
    together = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_codes_follow_the_name_of_the_preprocessing(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    other = ImageTokenizer(replace(tokenizer.config, preprocess="transformers")).eval()
    other.load_state_dict(tokenizer.state_dict())
    images = draw_images(16)
    expected = tokenizer.encode((images + 1) * 127.5 * 0.0078 - 1)
    assert torch.equal(other.encode(images), expected)
    assert torch.equal(other(images)[1].codes, expected)
    assert not torch.equal(expected, tokenizer.encode(images))
    assert torch.equal(other.decode(expected), tokenizer.decode(expected))
    other.save(tmp_path)
    assert ImageTokenizer.load(tmp_path).config.preprocess == "transformers"


def test_folders_that_do_not_name_the_preprocessing_have_metas(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["image_tokenizer"].pop("preprocess") == "meta"
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert ImageTokenizer.load(tmp_path).config == tokenizer.config
    data["image_tokenizer"]["preprocess"] = "imagenet"
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="preprocess is 'imagenet'; choose meta or transformers"):
        ImageTokenizer.load(tmp_path)


def test_codes_do_not_depend_on_autocast_or_mode(tokenizer: ImageTokenizer) -> None:
    expected = tokenizer.encode(draw_images(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(draw_images(64)), expected)
        assert tokenizer.decode(expected).dtype == torch.float32
    assert torch.equal(tokenizer.train().encode(draw_images(64)), expected)
    assert torch.equal(tokenizer.eval().encode(draw_images(64)), expected)


def test_save_and_load_give_the_same_tokenizer_to_the_bit(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.train()(draw_images())  # buffers of the quantizer count, too
    tokenizer.eval().save(tmp_path / "a")
    loaded = ImageTokenizer.load(tmp_path / "a")
    assert loaded.config == tokenizer.config
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tokenizer.state_dict().items())
    codes = tokenizer.encode(draw_images())
    assert torch.equal(loaded.encode(draw_images()), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_saved_before_a_quantizer_option_was_added_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ImageTokenizerConfig(image_size=16, autoencoder=AUTOENCODER, quantizer=QUANTIZERS["vq"])
    tokenizer = ImageTokenizer(config).eval()
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_levels", "gradient", "entropy_weight", "diversity_weight", "entropy_temperature"):
        del data["image_tokenizer"]["quantizer"][name]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert torch.equal(ImageTokenizer.load(tmp_path).encode(draw_images()), tokenizer.encode(draw_images()))


def test_the_digest_follows_content(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    ImageTokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert ImageTokenizer.sha256(tmp_path / "a") == ImageTokenizer.sha256(tmp_path / "b")
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1e-3)
    tokenizer.save(tmp_path / "b")
    assert ImageTokenizer.sha256(tmp_path / "a") != ImageTokenizer.sha256(tmp_path / "b")


def test_inputs_of_another_shape_are_named(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(4, 3, 8, 8\) instead of \(B, 3, 16, 16\)"):
        tokenizer.encode(draw_images()[..., :8, :8])
    with pytest.raises(ValueError, match="codes of shape"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"0 .. {tokenizer.codebook_size - 1}"):
        tokenizer.decode(torch.full((1, *tokenizer.grid), tokenizer.codebook_size))


def test_the_codes_of_several_levels_stand_in_a_sequence_and_come_back() -> None:
    torch.manual_seed(0)
    config = ImageTokenizerConfig(image_size=16, autoencoder=AUTOENCODER, quantizer=QUANTIZERS["residual_vq"])
    tokenizer = ImageTokenizer(config).eval()
    assert tokenizer.grid == (4, 4 * config.quantizer.codes_per_place) == (4, 8)
    vocabulary = Vocabulary(
        VocabularyConfig(codebook_sizes={"image": tokenizer.codebook_size}, num_text_pieces=4, num_sentinels=2)
    )
    form = CM3LeonFormat(vocabulary, {"image": tokenizer.grid})
    codes = tokenizer.encode(draw_images(1))
    ids = form.spell(Document([Image(codes[0].numpy())]))
    (found,) = form.parse(ids).parts
    assert isinstance(found, Image)
    assert torch.equal(tokenizer.decode(torch.from_numpy(found.codes)[None]), tokenizer.decode(codes))
    with pytest.raises(ValueError, match=r"codes of shape \(1, 4, 4\) instead of \(B, \*\(4, 8\)\)"):
        tokenizer.decode(codes[:, :, ::2])  # the first level alone


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.config\.json does not exist.*train-image-tokenizer"):
        ImageTokenizer.load(tmp_path / "nowhere")


def test_weights_of_another_architecture_are_one_clear_message(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:8].clone()
    del state["decoder.conv_in.bias"]
    save_file(state, tmp_path / "model.safetensors")
    message = (
        r"model\.safetensors holds weights of another architecture.*2 tensors differ.*decoder\.conv_in\.bias, missing"
    )
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.load(tmp_path)


def test_broken_files_are_named(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for broken in ({"model": {}}, {**config, "format_version": 99}, {**config, "image_tokenizer": {"image_size": 16}}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"config\.json is not the config of an image tokenizer"):
            ImageTokenizer.load(tmp_path)
    config["image_tokenizer"]["autoencoder"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="AutoencoderConfig has no key depth"):
        ImageTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        ImageTokenizer.load(tmp_path)
    state = tokenizer.state_dict()
    save_file(
        {**state, "decoder.conv_in.bias": state["decoder.conv_in.bias"] * torch.nan}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor decoder\.conv_in\.bias holds NaN"):
        ImageTokenizer.load(tmp_path)
