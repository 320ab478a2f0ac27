"""Whatever feeds an image tokenizer resizes pictures as its config says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.data.pictures import PictureDataConfig, PictureLoader, decode_first
from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize
from mixmodal.data.shards import PictureFile, Sample, read_samples, write_shards
from mixmodal.data.skipping import SampleLimits
from mixmodal.document import Image as Coded
from mixmodal.evaluation import reconstruction
from mixmodal.evaluation.reconstruction import ImageTokenizerEvaluationConfig, evaluate_image_tokenizer
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import Preprocess, resize_and_crop, to_tensor
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer

NAMES = pytest.mark.parametrize("preprocess", get_args(Preprocess))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 62, 3), dtype=np.uint8))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """One picture that is not square, with a caption."""
    data = io.BytesIO()
    NOISE.save(data, "png")
    write_shards([Sample("0", ("caption 0", PictureFile(data.getvalue(), "png", "0.png")))], tmp_path / "shards", 10)
    return tmp_path / "shards"


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> Callable[[Preprocess], ImageTokenizer]:
    def save(preprocess: Preprocess) -> ImageTokenizer:
        torch.manual_seed(0)
        autoencoder = AutoencoderConfig(channels=8, channel_multipliers=(1, 1), norm_groups=4, mid_blocks=())
        quantizer = QuantizerConfig(kind="fsq", levels=(8, 8))
        config = ImageTokenizerConfig(
            image_size=16, preprocess=preprocess, autoencoder=autoencoder, quantizer=quantizer
        )
        ImageTokenizer(config).save(tmp_path / "tokenizer")
        return ImageTokenizer.load(tmp_path / "tokenizer")

    return save


def test_the_two_names_give_other_codes(save_tokenizer: Callable[[Preprocess], ImageTokenizer]) -> None:
    codes = []
    for preprocess in get_args(Preprocess):
        codes.append(save_tokenizer(preprocess).encode(to_tensor(resize_and_crop(NOISE, 16, preprocess))[None]))
    assert not torch.equal(*codes)


@NAMES
def test_pictures_to_train_and_evaluate_on(
    preprocess: Preprocess,
    shards: Path,
    save_tokenizer: Callable[[Preprocess], ImageTokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = torch.from_numpy(np.asarray(resize_and_crop(NOISE, 16, preprocess)).copy()).permute(2, 0, 1)
    _, pixels = decode_first([shards], 16, SampleLimits(), 10, preprocess)
    assert torch.equal(pixels[0], expected)
    for cached in (10, 0):
        config = PictureDataConfig(train=(shards,), max_cached_pictures=cached)
        batch = next(PictureLoader(config, 16, preprocess=preprocess, micro_batch_size=1))
        assert torch.equal(batch.pixels[0], expected)
    save_tokenizer(preprocess)
    seen: list[torch.Tensor] = []
    score = reconstruction.score_reconstructions

    def spy(tokenizer, batches, further):
        batches = list(batches)
        seen.extend(batches)
        return score(tokenizer, batches, further)

    monkeypatch.setattr(reconstruction, "score_reconstructions", spy)
    evaluate_image_tokenizer(
        ImageTokenizerEvaluationConfig(
            image_tokenizer=tmp_path / "tokenizer", data=(shards,), features="none", perceptual=None
        )
    )
    assert torch.equal(seen[0][0], to_tensor(resize_and_crop(NOISE, 16, preprocess)))


@NAMES
def test_pictures_in_documents(
    preprocess: Preprocess,
    shards: Path,
    save_tokenizer: Callable[[Preprocess], ImageTokenizer],
    text_tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    tokenizer = save_tokenizer(preprocess)
    picture = next(read_samples(shards)).pictures[0].open(10_000)
    expected = tokenizer.encode(to_tensor(resize_and_crop(picture, 16, preprocess))[None])[0].numpy()
    tokens = pretokenize(
        PretokenizeConfig(
            shards=(shards,), out=tmp_path / "tokens", text_tokenizer=text_tokenizer_path,
            image_tokenizer=tmp_path / "tokenizer",
        )
    )  # fmt: skip
    text_tokenizer = TextTokenizer.load(text_tokenizer_path)
    spelling = tokens.build_format(text_tokenizer)
    assert spelling.parse(tokens[0]).parts[1] == Coded(expected)
    assert Codec(text_tokenizer, tokenizer, spelling).encode_pictures([NOISE]) == [Coded(expected)]
