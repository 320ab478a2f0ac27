"""Models have their text tokenizer in one file or the other, and nothing that reads it minds which."""

from pathlib import Path

import pytest
import torch
from synthetic_tokens import write_tokenizer

from mixmodal.document import Document, Text, build_format
from mixmodal.interop.export import load_export, save_export
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.tokenization.json_text import JsonTextTokenizer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.tokenization.text_files import load_text_tokenizer, size_vocabulary
from mixmodal.vocabulary import Vocabulary


def test_the_suffix_tells_the_kind(tmp_path: Path, tokenizers: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    for path, kind in ((tmp_path / "tokenizer.json", JsonTextTokenizer), (tokenizers / "text.model", TextTokenizer)):
        tokenizer = load_text_tokenizer(path)
        assert isinstance(tokenizer, kind)
        assert tokenizer.suffix == path.suffix
        assert len(tokenizer.piece_bytes) == tokenizer.num_pieces
        assert tokenizer.decode(tokenizer.encode("a red apple")) == "a red apple"
    for name in ("absent.json", "absent.model"):
        with pytest.raises(ValueError, match=rf"{name}: no text tokenizer there"):
            load_text_tokenizer(tmp_path / name)


def test_a_json_file_has_as_many_pieces_as_the_model_has_rows_for(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    named = load_text_tokenizer(tmp_path / "tokenizer.json").num_pieces
    assert load_text_tokenizer(tmp_path / "tokenizer.json", named + 5).num_pieces == named + 5


def test_a_file_with_image_codes_says_the_sizes_of_the_vocabulary(tmp_path: Path, tokenizers: Path) -> None:
    ids = write_tokenizer(tmp_path / "t.json", num_codes=40, num_sentinels=8, num_reserved=4)
    tokenizer = load_text_tokenizer(tmp_path / "t.json")
    vocabulary = Vocabulary(size_vocabulary(tokenizer, {"image": 40}, 8))
    assert vocabulary.size == len(ids)
    assert vocabulary.ids("text").start == ids["<reserved08709>"] + 1
    with pytest.raises(ValueError, match=r"codes of modalities: \{'image': 75\} here, .* of \{'image': 40\}"):
        size_vocabulary(tokenizer, {"image": 75}, 8)
    with pytest.raises(ValueError, match=r"num_sentinels: 512 here, .* of 8"):
        size_vocabulary(tokenizer, {"image": 40}, 512)
    own = size_vocabulary(load_text_tokenizer(tokenizers / "text.model"), {"image": 75}, 512)
    assert (own.num_sentinels, own.num_reserved) == (512, 1)


def test_an_exported_folder_keeps_a_json_tokenizer(tmp_path: Path, tokenizers: Path) -> None:
    ids = write_tokenizer(tmp_path / "tokenizer.json", num_codes=75)
    text = load_text_tokenizer(tmp_path / "tokenizer.json")
    vocabulary = Vocabulary(size_vocabulary(text, {"image": 75}, 8))
    format = build_format("chameleon", vocabulary, {"image": (4, 4)}, text)
    shape = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "max_seq_len": 32}
    model = Transformer(TransformerConfig(vocab_size=vocabulary.size, **shape))
    save_export(tmp_path / "export", model, format, tmp_path / "tokenizer.json", tokenizers / "image", {})
    kept = tmp_path / "export" / "text_tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert not (tmp_path / "export" / "text_tokenizer.model").exists()
    found = load_export(tmp_path / "export")
    spelled = found.format.spell(Document([Text("the red pear")]))
    assert ids["the"] in spelled
    assert found.format.parse(spelled) == Document([Text("the red pear")])
    assert torch.equal(found.model.embedding.weight, model.embedding.weight)
