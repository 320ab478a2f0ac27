"""Synthetic pictures as pixels and as shards, for the tests of several rooms."""

import importlib.util
import io
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from string import ascii_lowercase
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.synthetic import synthetic_pairs

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


@pytest.fixture(scope="session")
def draw_shapes() -> Draw:
    """A function of (count, size, seed): pixels, uint8 `(count, 3, size, size)`."""

    def draw(count: int, size: int, seed: int = 0) -> torch.Tensor:
        pictures = [np.asarray(pair.picture) for pair in synthetic_pairs(count, size, seed)]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    return draw


@pytest.fixture(scope="session")
def write_shape_shards() -> WriteShards:
    """A function of (folder, count, size, seed, shard_size): writes the same pictures as shards."""

    def samples(count: int, size: int, seed: int) -> Iterator[Sample]:
        for pair in synthetic_pairs(count, size, seed):
            data = io.BytesIO()
            pair.picture.save(data, "png")
            yield Sample(pair.key, (pair.caption, PictureFile(data.getvalue(), "png", f"{pair.key}.png")))

    def write(folder: Path, count: int, size: int, seed: int = 0, shard_size: int = 1000) -> None:
        write_shards(samples(count, size, seed), folder, shard_size)

    return write


class Letters:
    """A text tokenizer of the first letters of the alphabet, a piece each."""

    def __init__(self, num_pieces: int) -> None:
        self.num_pieces, self.letters = num_pieces, ascii_lowercase[:num_pieces]

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, pieces: Sequence[int]) -> str:
        return "".join(self.letters[piece] for piece in pieces)


@pytest.fixture(scope="session")
def letters() -> Callable[[int], Any]:
    """A function of a number: a text tokenizer of so many letters."""
    return Letters


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text tokenizer and an untrained image tokenizer of 16 px and 4 x 4 codes."""
    from mixmodal.tokenization.autoencoder import AutoencoderConfig
    from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
    from mixmodal.tokenization.quantizer_base import QuantizerConfig
    from mixmodal.tokenization.text import train_text_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    train_text_tokenizer(["a red apple", "a green apple", "a blue pear, flat style"] * 5, folder / "text.model", 300)
    autoencoder = AutoencoderConfig(channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    config = ImageTokenizerConfig(image_size=16, autoencoder=autoencoder, quantizer=QuantizerConfig(levels=(5, 5, 3)))
    torch.manual_seed(0)
    ImageTokenizer(config).save(folder / "image")
    return folder


@pytest.fixture(scope="session")
def lumina_tokenizers(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tokenizers`, but with pictures of 64 px and 2 x 2 codes, or as many of another shape: a code is a unit."""
    from mixmodal.tokenization.autoencoder import AutoencoderConfig
    from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
    from mixmodal.tokenization.quantizer_base import QuantizerConfig

    folder = tmp_path_factory.mktemp("lumina")
    (folder / "text.model").write_bytes((tokenizers / "text.model").read_bytes())
    shape = {"channels": 8, "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "patch_size": 8, "norm_groups": 4}
    autoencoder = AutoencoderConfig(**shape, mid_blocks=("res", "attention"))  # type: ignore[arg-type]
    config = ImageTokenizerConfig(image_size=64, autoencoder=autoencoder, quantizer=QuantizerConfig(levels=(5, 5, 3)))
    torch.manual_seed(0)
    ImageTokenizer(config).save(folder / "image")
    return folder


@pytest.fixture(scope="session")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """A function of a name: that script of `benchmarks/`, which is no package, or another by its path from there.

    Scripts find their neighbours, as where they are called by path.
    """
    folder = Path(__file__).parents[1] / "benchmarks"

    def load_script(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load_script


def _save_tiny_encoder(kind: str, folder: Path, positions: int = 12) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
        SiglipProcessor,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vocab = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        **{letter: 3 + place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")},
    }
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    text = {**sizes, "vocab_size": len(vocab), "max_position_embeddings": positions, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        pictures: Any = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
        CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    else:
        pictures = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tiny_encoder() -> Callable[..., Path]:
    """A function of (kind, folder, positions): saves a random CLIP or SigLIP with a tokenizer of letters there."""
    return _save_tiny_encoder


@pytest.fixture(scope="session")
def no_file_above() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which the system refuses to let files grow further: its error is as real as that of a full disk."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
