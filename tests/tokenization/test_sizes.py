"""Pictures of several sizes: which they get, and codes and pictures that do not depend on what passes with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from mixmodal.document import CM3LeonFormat, LuminaFormat
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig


def noise(width: int, height: int, seed: int = 0) -> PIL.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.fromarray(pixels)


@pytest.fixture(scope="module")
def tokenizer(lumina_tokenizers: Path) -> ImageTokenizer:
    return ImageTokenizer.load(lumina_tokenizers / "image")


@pytest.fixture(scope="module")
def codec(lumina_tokenizers: Path, tokenizer: ImageTokenizer) -> Codec:
    text = TextTokenizer.load(lumina_tokenizers / "text.model")
    reserved = Vocabulary.reserved_for_sizes(4)
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=text.num_pieces, num_reserved=reserved)
    return Codec(text, tokenizer, LuminaFormat(Vocabulary(sizes), {"image": (2, 2)}, codes_per_unit=1))


def test_a_pair_of_sides_is_covered_and_cut_to() -> None:
    picture = noise(61, 37)
    scale = 32 / 37
    resized = picture.resize((round(61 * scale), 32), PIL.Resampling.LANCZOS)
    left = (resized.width - 48) // 2
    assert resize_and_crop(picture, (48, 32)).tobytes() == resized.crop((left, 0, left + 48, 32)).tobytes()
    resized = picture.resize((64, round(37 * (64 / 61))), PIL.Resampling.LANCZOS)
    top = (resized.height - 32) // 2
    assert resize_and_crop(picture, (64, 32)).tobytes() == resized.crop((0, top, 64, top + 32)).tobytes()


@pytest.mark.parametrize("preprocess", ["meta", "transformers"])
@pytest.mark.parametrize("target", [(16, 16), (64, 16), (16, 64), (48, 32)])
def test_every_shape_becomes_every_size(preprocess: str, target: tuple[int, int]) -> None:
    for size in ((8, 4), (4, 8), (33, 17), (5, 5), (1, 300), (300, 1), (7, 640), (64, 16)):
        assert resize_and_crop(PIL.new("RGB", size), target, preprocess).size == target  # type: ignore[arg-type]
    square = noise(61, 37)
    found = resize_and_crop(square, (16, 16), preprocess)  # type: ignore[arg-type]
    assert found.tobytes() == resize_and_crop(square, 16, preprocess).tobytes()  # type: ignore[arg-type]


def test_a_convolutional_tokenizer_takes_every_multiple_of_its_codes(tokenizer: ImageTokenizer) -> None:
    for height, width in ((64, 64), (32, 128), (128, 32), (32, 32), (96, 160)):
        images = torch.stack([to_tensor(noise(width, height, seed)) for seed in range(3)])
        codes = tokenizer.encode(images)
        assert codes.shape == (3, height // 32, width // 32)
        decoded, (reconstruction, quantized) = tokenizer.decode(codes), tokenizer(images)
        assert decoded.shape == images.shape
        assert torch.equal(codes, quantized.codes)
        # measured: 0; forward keeps gradients, which takes other kernels
        torch.testing.assert_close(decoded, reconstruction.detach().clamp(-1, 1), rtol=0, atol=1e-5)


def test_sides_that_are_no_multiple_are_named(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 48\) instead of \(B, 3, H, W\) with H and W multiples of 32"):
        tokenizer.encode(torch.zeros(1, 3, 64, 48))
    with pytest.raises(ValueError, match="multiples of 32"):
        tokenizer.encode(torch.zeros(1, 3, 0, 32))
    with pytest.raises(ValueError, match=r"codes of shape \(1, 0, 2\)"):
        tokenizer.decode(torch.zeros(1, 0, 2, dtype=torch.int64))


def build_tokenizer(**options: object) -> ImageTokenizer:
    shape = AutoencoderConfig(channels=8, channel_multipliers=(1, 1), patch_size=8, norm_groups=4, mid_blocks=())
    quantizer = options.pop("quantizer", QuantizerConfig(levels=(4, 4)))
    config = ImageTokenizerConfig(image_size=48, autoencoder=replace(shape, **options), quantizer=quantizer)  # type: ignore[arg-type]
    return ImageTokenizer(config)


def test_tokenizers_that_can_not_take_several_sizes_say_why() -> None:
    assert build_tokenizer().codes_along(32) == 2
    assert not build_tokenizer(mid_blocks=("transformer",), head_dim=8).takes_other_sizes
    with pytest.raises(ValueError, match="transformer blocks have learned positions"):
        build_tokenizer(mid_blocks=("transformer",), head_dim=8).codes_along(32)
    with pytest.raises(ValueError, match="whole codes in 32 pixels; it has 1, each of 12 pixels"):
        build_tokenizer(patch_size=6).codes_along(32)
    levels = QuantizerConfig(kind="residual_vq", num_levels=2, codebook_size=8, codebook_dim=4)
    with pytest.raises(ValueError, match="it has 2, each of 16 pixels"):
        build_tokenizer(quantizer=levels).codes_along(32)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (2, 2)),
        ((14, 10), (2, 2)),  # 1.4 is nearer to 1 than to 2
        ((15, 10), (1, 2)),
        ((25, 10), (1, 3)),
        ((10, 39), (4, 1)),
        ((9, 1), (1, 4)),
    ],
)
def test_a_picture_gets_the_full_grid_that_keeps_most_of_it(
    codec: Codec, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    (image,) = codec.encode_pictures([noise(*size)])
    assert image.codes.shape == grid
    assert codec.fit(noise(*size)).size == (32 * grid[1], 32 * grid[0])


def test_only_grids_without_room_for_more_are_given(codec: Codec) -> None:
    big = LuminaFormat(
        Vocabulary(VocabularyConfig(codebook_sizes={"image": 4}, num_text_pieces=2, num_reserved=200)),
        {"image": (32, 32)},
    )
    # 1600 x 1000 could be exact at 16 x 10 units, 62 % of the area
    sizes = {(1600, 1000): (38, 24), (1000, 1600): (24, 38), (1024, 1024): (32, 32), (1920, 1080): (42, 24)}
    for (width, height), (w, h) in sizes.items():
        assert big.fitting_grid("image", height, width) == (h, w)
    assert big.fitting_grid("image", 5, 5) == (32, 32)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_pictures_of_all_sizes_pass_in_any_batch_and_keep_their_order(codec: Codec, batch_size: int) -> None:
    small = Codec(codec.text_tokenizer, codec.image_tokenizer, codec.format, batch_size)  # type: ignore[arg-type]
    pictures = [noise(*size, seed) for seed, size in enumerate([(9, 9), (40, 10), (10, 40), (80, 80), (50, 10)])]
    images = small.encode_pictures(pictures)
    assert [image.codes.shape for image in images] == [(2, 2), (1, 4), (4, 1), (2, 2), (1, 4)]
    for picture, image in zip(pictures, images):
        codes = codec.image_tokenizer.encode(to_tensor(codec.fit(picture))[None])[0]
        assert np.array_equal(image.codes, codes.numpy())
    decoded = small.decode_images(images)
    assert [one.size for one in decoded] == [(64, 64), (128, 32), (32, 128), (64, 64), (128, 32)]
    for image, picture in zip(images, decoded):
        (alone,) = codec.decode_images([image])
        worst = np.abs(np.asarray(alone).astype(int) - np.asarray(picture)).max()
        assert worst <= 1  # measured: 0


def test_documents_of_several_sizes_come_back(codec: Codec) -> None:
    document = codec.to_document([noise(40, 10), "a red apple", noise(9, 9)])
    assert codec.format.parse(codec.format.spell(document)) == document
    wide, text, square = codec.from_document(document)
    assert isinstance(wide, PIL.Image)
    assert isinstance(square, PIL.Image)
    assert (wide.size, text, square.size) == ((128, 32), "a red apple", (64, 64))


def test_squares_are_what_is_asked_for_by_name(codec: Codec) -> None:
    assert codec.to_images([noise(40, 10)]).shape == (1, 3, 64, 64)


def test_a_tokenizer_of_other_units_is_refused(codec: Codec, tokenizer: ImageTokenizer) -> None:
    vocabulary = codec.format.vocabulary
    with pytest.raises(ValueError, match="codes of 32 pixels 1, the vocabulary and the format hold 2"):
        Codec(codec.text_tokenizer, tokenizer, LuminaFormat(vocabulary, {"image": (2, 2)}, codes_per_unit=2))
    Codec(codec.text_tokenizer, tokenizer, CM3LeonFormat(vocabulary, {"image": (2, 2)}))
