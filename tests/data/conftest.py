"""Small pictures, shards and tokenizers that the tests of this folder share."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.data.corpora import PrepareConfig, prepare
from mixmodal.data.pretokenize import PretokenizeConfig, Pretokenizer
from mixmodal.data.shards import PictureFile, Sample, read_samples, write_shards
from mixmodal.data.skipping import SampleLimits
from mixmodal.retrieval.encoder import combine, normalise
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer


@pytest.fixture(scope="session")
def build_picture():
    """Noise of 8 x 8 pixels by number, as PNG."""

    def build(seed=0):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
        return PictureFile(stream.getvalue(), "png", f"picture {seed}")

    return build


@pytest.fixture(scope="session")
def shape_shards(tmp_path_factory, write_shape_shards):
    """Eleven pictures of shapes of 16 x 16 pixels with captions, in shards of four."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shape_shards(folder, 11, size=16, shard_size=4)
    return folder


class Prepared(NamedTuple):
    report: dict[str, Any]
    samples: list[Sample]
    path: Path


@pytest.fixture
def prepare_file(tmp_path, build_picture):
    """Prepares a corpus in a file, beside which the pictures a.png and b.png lie; all its samples may be bad."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.png").write_bytes(build_picture(number).data)

    def prepare_file(corpus, **options):
        limits = SampleLimits(max_skipped_share=1.0)
        config = PrepareConfig(corpora=(corpus,), out=tmp_path / "out", limits=limits, **options)
        return Prepared(prepare(config), list(read_samples(config.out / "shards")), corpus.path)

    return prepare_file


@pytest.fixture
def save_image_tokenizer():
    """A function of (folder, image_size): saves a small image tokenizer of 16 codes, untrained, and gives it."""

    def save(folder, image_size):
        torch.manual_seed(0)
        autoencoder = AutoencoderConfig(channels=8, channel_multipliers=(1, 1), norm_groups=4, mid_blocks=())
        quantizer = QuantizerConfig(kind="fsq", levels=(4, 4))
        config = ImageTokenizerConfig(image_size=image_size, autoencoder=autoencoder, quantizer=quantizer)
        tokenizer = ImageTokenizer(config)
        tokenizer.save(folder)
        return tokenizer

    return save


class BrightnessTokenizer:
    """Codes 0 .. 15: the brightness of each quarter of a picture."""

    grid = (2, 2)
    codebook_size = 16

    def __init__(self):
        self.num_encoded = 0

    def encode(self, images):
        self.num_encoded += len(images)
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 4, 4)
        cells = torch.nn.functional.avg_pool2d(images.mean(1), 2)
        return ((cells + 1) * 8).long().clamp(0, 15)


@pytest.fixture
def image_tokenizer():
    return BrightnessTokenizer()


@pytest.fixture(scope="session")
def text_tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text_tokenizer.model"
    train_text_tokenizer([f"caption {number}, flat style" for number in range(20)], path, vocab_size=300)
    return path


@pytest.fixture
def build_shards(tmp_path, build_picture):
    """Writes pairs `caption N` in shards of three."""

    def build(count=7, name="shards", extra=()):
        samples = [Sample(f"{number:04d}", (f"caption {number}", build_picture(number))) for number in range(count)]
        write_shards([*samples, *extra], tmp_path / name, shard_size=3)
        return tmp_path / name

    return build


@pytest.fixture
def write_tokens(tmp_path, text_tokenizer_path, image_tokenizer):
    """Token shards of folders with the small tokenizers; options go to the config."""

    def write(folders, **options):
        options = {
            "out": tmp_path / "tokens",
            "num_sentinels": 4,
            "limits": SampleLimits(max_skipped_share=1.0),
        } | options
        config = PretokenizeConfig(
            shards=tuple(folders), text_tokenizer=text_tokenizer_path, image_tokenizer=tmp_path / "unused", **options
        )
        return Pretokenizer(config, TextTokenizer.load(text_tokenizer_path), image_tokenizer, 4, "0" * 64).write()

    return write


class FakeEncoder:
    """Vectors in 64 dimensions: of a text the sum of its words' random ones, of a picture a random one of its pixels.

    Args:
        none_for: this text has a vector of NaN.
        breaks_after: so many documents are embedded, then none.
    """

    dim = 64

    def __init__(self):
        self.identity = "e" * 64
        self.embedded, self.breaks_after, self.none_for = 0, None, None

    def embed_texts(self, texts):
        rows = [sum(self._draw(word.encode()) for word in text.split()) for text in texts]
        rows = [row * np.nan if text == self.none_for else row for text, row in zip(texts, rows)]
        return self._stack(rows)

    def embed_images(self, images):
        self._count(len(images))
        return self._stack([self._draw(image.tobytes()) for image in images])

    def embed_documents(self, documents):
        self._count(len(documents))
        images = [self._stack([self._draw(image.tobytes()) for image in document.images]) for document in documents]
        return np.stack([combine(self.embed_texts(d.texts), found) for d, found in zip(documents, images)])

    def _count(self, count):
        if self.breaks_after is not None and self.embedded + count > self.breaks_after:
            raise RuntimeError("power cut")
        self.embedded += count

    def _draw(self, data):
        return np.random.default_rng(list(data)).normal(size=self.dim)

    def _stack(self, rows):
        return normalise(np.array(rows).reshape(-1, self.dim)).astype(np.float32)


@pytest.fixture
def fake_encoder(monkeypatch):
    """Stands for the encoder that the jobs load."""
    encoder = FakeEncoder()
    for module in ("indexing", "retrieving"):
        monkeypatch.setattr(f"mixmodal.data.{module}.load_encoder", lambda *_: encoder)
    return encoder
