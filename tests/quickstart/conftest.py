"""A demo of few coloured squares and an untrained model, as the stages after training find them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.document import build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.demo import Demo, load_demo
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import train_text_tokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SIZE = 16
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
STYLES = ("flat", "outline")


def encoded(colour: str, style: str, folder: Path) -> PictureFile:
    """A square of the colour, filled or as a frame."""
    picture = Image.new("RGB", (SIZE, SIZE), colour)
    if style == "outline":
        picture.paste("white", (3, 3, SIZE - 3, SIZE - 3))
    path = folder / "square.png"
    picture.save(path)
    return PictureFile(path.read_bytes(), "png", f"{colour}_{style}")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with `data/train` and `data/heldout`: one style of the first two colours is held out."""
    run = tmp_path_factory.mktemp("run")
    heldout = {("red", "flat"), ("green", "outline")}
    samples: dict[bool, list[Sample]] = {False: [], True: []}
    for colour in COLOURS:
        for style in STYLES:
            metadata = {"concept": f"{colour} square", "style": style, "category": "light" if colour > "o" else "dark"}
            parts = (f"{colour} square, {style} style", encoded(colour, style, run))
            samples[(colour, style) in heldout].append(Sample(f"{colour}_{style}", parts, metadata))
    write_shards(samples[False], run / "data" / "train")
    write_shards(samples[True], run / "data" / "heldout")
    return run


@pytest.fixture(scope="session")
def demo(data: Path) -> Demo:
    return load_demo(data / "data" / "train", data / "data" / "heldout", SIZE)


@pytest.fixture(scope="session")
def model(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> MixedModal:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(patch_size=8, channels=8, channel_multipliers=(1,), mid_blocks=(), norm_groups=2)
    quantizer = QuantizerConfig(kind="fsq", levels=(4, 4))
    images = ImageTokenizer(ImageTokenizerConfig(image_size=SIZE, autoencoder=autoencoder, quantizer=quantizer)).eval()
    path = tmp_path_factory.mktemp("text") / "text_tokenizer.model"
    text = train_text_tokenizer((label.caption for label in demo.labels), path, vocab_size=300)
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=text.num_pieces, num_sentinels=2)
    form = build_format("cm3leon", Vocabulary(sizes), {"image": images.grid}, text)
    shape = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "max_seq_len": 96}
    config = TransformerConfig(vocab_size=form.vocabulary.size, init_std=0.3, **shape)
    return MixedModal(Transformer(config).eval(), Codec(text, images, form))
