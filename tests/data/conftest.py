"""Small pictures, shards and tokenizers that the tests of this folder share."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.tokenization.text import train_text_tokenizer


@pytest.fixture(scope="session")
def build_picture():
    """Noise of 8 x 8 pixels by number, as PNG."""

    def build(seed=0):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
        return PictureFile(stream.getvalue(), "png", f"picture {seed}")

    return build


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
