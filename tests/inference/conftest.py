"""A vocabulary of 40 ids, both sequence formats, and random networks over them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, SequenceFormat, Text, build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID = (2, 3)


class Letters:
    """A text tokenizer of ten letters."""

    num_pieces = 10

    def encode(self, text: str) -> list[int]:
        return ["abcdefghij".index(letter) for letter in text]

    def decode(self, pieces: Sequence[int]) -> str:
        return "".join("abcdefghij"[piece] for piece in pieces)


@pytest.fixture(params=["cm3leon", "chameleon"])
def form(request: pytest.FixtureRequest) -> SequenceFormat:
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=10, num_sentinels=6, num_reserved=2)
    return build_format(request.param, Vocabulary(sizes), {"image": GRID}, Letters())


@pytest.fixture
def build_model(form: SequenceFormat) -> Callable[..., Transformer]:
    def build(**options: object) -> Transformer:
        torch.manual_seed(0)
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 48, "init_std": 0.3}
        return Transformer(TransformerConfig(vocab_size=form.vocabulary.size, **{**sizes, **options})).eval()

    return build


@pytest.fixture
def model(build_model: Callable[..., Transformer]) -> Transformer:
    return build_model()


@pytest.fixture
def image() -> Image:
    return Image(np.arange(6).reshape(GRID))


@pytest.fixture
def prompts(form: SequenceFormat, image: Image) -> list[np.ndarray]:
    """Unequal prompts that are open for an image."""
    documents = [[Text("abc")], [], [Text("j")], [Text("ab"), image, Text("cdefg")]]
    return [form.spell_prompt(Document(parts), "image") for parts in documents]


@pytest.fixture(scope="session", params=["cm3leon", "chameleon"])
def exported(request: pytest.FixtureRequest, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported random model."""
    from mixmodal.interop.export import save_export
    from mixmodal.tokenization.text import TextTokenizer

    pieces = TextTokenizer.load(tokenizers / "text.model").num_pieces
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=pieces, num_sentinels=8)
    form = build_format(request.param, Vocabulary(sizes), {"image": (4, 4)})
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 96, "init_std": 0.3}
    model = Transformer(TransformerConfig(vocab_size=form.vocabulary.size, **shape))
    folder = tmp_path_factory.mktemp(request.param) / "run" / "export"
    card = {"title": "A test", "data": ["coloured shapes"], "attribution": "nobody", "figures": {"loss": 1.5}}
    save_export(folder, model, form, tokenizers / "text.model", tokenizers / "image", card)
    return folder
