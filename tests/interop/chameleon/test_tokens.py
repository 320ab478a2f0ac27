"""transformers reads the exported tokenizer and processor, and gives our ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_tokens import KINDS, code_name, text_pieces, tokenizer_json, write_tokenizer
from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

from mixmodal.interop.chameleon.tokens import find_merges, vocabulary_map, write_processor
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor
from mixmodal.tokenization.text import train_text_tokenizer
from mixmodal.tokenization.text_files import PieceTokenizer, load_text_tokenizer, size_vocabulary
from mixmodal.vocabulary import Vocabulary

TRAINING = [
    "a red apple, flat style",
    "two  spaces\n\tand 1234 more",
    "\u4e2d\u6587 caf\u00e9",
    "aaa ababab   x </s>",
] * 5
TEXTS = [
    *("a red apple", " in front", "  two  and   three    spaces", "behind ", "\n\n a\r\n\tb", "0123 4567890", ""),
    *("\u4e2d\u6587\u65e5\u672c", "\U0001f34e\u200d\U0001f468\ufe0f", "e\u0301 \u00e9 \ufb01", "\u2581 \u2581a\u2581"),
    *("\u2047 \u2585 \ufffd", "\x00\x01\x7f", "IMGIMGAZ", "<0x41>", "< s>", "<|image|>", "<text:0>", "aaaaaaa ababab"),
]
TYPED = ["<s>", "</s>", "<pad>", "<unk>", "<image>", "<eoss>", "<racm3:break>", "<sentinel:0>", "<reserved08706>"]
SIZE, NUM_CODES = 16, 4


class Exported:
    """A folder, and what it was written from."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.own: PieceTokenizer = load_text_tokenizer(path)
        self.vocabulary = Vocabulary(size_vocabulary(self.own, {"image": 40}, 8))
        write_processor(folder, self.vocabulary, path, SIZE, NUM_CODES)
        self.theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return [self.vocabulary.to_ids("text", piece) for piece in self.own.encode(text)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_text_tokenizer(TRAINING, folder / "text.model", vocab_size=340)
    return Exported(folder / "out", folder / "text.model")


@pytest.fixture(scope="module", params=["sentencepiece", *KINDS, "llama"])
def exported(
    request: pytest.FixtureRequest, sentencepiece_model: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Of our own model, of files with Chameleon's names, and of one without."""
    if request.param == "sentencepiece":
        return sentencepiece_model
    folder = tmp_path_factory.mktemp("json")
    if request.param == "llama":
        pieces, merges = text_pieces("metaspace")
        special = ["<unk>", "<s>", "</s>"]
        ids = {name: index for index, name in enumerate([*special, *pieces])}
        (folder / "t.json").write_text(json.dumps(tokenizer_json("metaspace", ids, merges, special)))
    else:
        write_tokenizer(folder / "t.json", kind=request.param)
    return Exported(folder / "out", folder / "t.json")


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_gives_our_ids_and_our_text(exported: Exported, text: str) -> None:
    ids = exported.theirs(text, add_special_tokens=False).input_ids
    assert ids == exported.ids(text)
    assert exported.theirs.decode(ids) == exported.own.decode(exported.own.encode(text))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.text(st.sampled_from("ab \u2581\n"))
    | st.text(st.sampled_from("red apple, \u00e9\u4e2d12<>/s"))
)
def test_merges_of_a_sentencepiece_model_make_its_pieces(sentencepiece_model: Exported, text: str) -> None:
    """Control names that come about by chance apart."""
    if any(name in text for name in TYPED):
        return
    ids = sentencepiece_model.theirs(text, add_special_tokens=False).input_ids
    assert ids == sentencepiece_model.ids(text)
    assert sentencepiece_model.theirs.decode(ids) == text


@pytest.mark.parametrize("seed", range(4))
def test_merges_of_confusable_pieces(tmp_path: Path, seed: int) -> None:
    """Pieces of two or three letters, many of which can be made of several pairs."""
    letters, rng = np.array(list(("ab ", "aab b", "abc ", "aaa  ")[seed])), np.random.default_rng(seed)
    texts = ["".join(rng.choice(letters, rng.integers(1, 60))) for _ in range(150)]
    train_text_tokenizer(texts[:80], tmp_path / "text.model", vocab_size=400)
    exported = Exported(tmp_path / "out", tmp_path / "text.model")
    found = exported.theirs(texts, add_special_tokens=False).input_ids
    assert found == [exported.ids(text) for text in texts]


@pytest.mark.parametrize("name", TYPED)
def test_names_of_control_tokens_are_the_texts_that_differ(exported: Exported, name: str) -> None:
    """transformers reads them as the tokens; ours spells them with pieces."""
    ids = exported.theirs(name, add_special_tokens=False).input_ids
    assert ids == [vocabulary_map(exported.vocabulary)[name] if name != "<image>" else exported.theirs.image_token_id]
    assert len(exported.own.encode(name)) > 1


def test_control_tokens_have_the_ids_of_the_vocabulary(exported: Exported) -> None:
    vocabulary, theirs = exported.vocabulary, exported.theirs
    assert (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert (theirs.sep_token, theirs.sep_token_id) == ("<reserved08706>", vocabulary.end_of_turn)
    assert theirs.convert_tokens_to_ids("<eoss>") == vocabulary.end_of_span
    assert theirs.convert_tokens_to_ids("<racm3:break>") == vocabulary.break_
    assert theirs.convert_tokens_to_ids("<sentinel:3>") == vocabulary.sentinel(3)
    assert theirs.convert_tokens_to_ids(code_name(37)) == vocabulary.to_ids("image", 37)
    assert len(theirs) == vocabulary.size
    assert theirs("a red").input_ids == [0, *exported.ids("a red")]


def test_control_tokens_are_special_and_left_out_of_texts(exported: Exported) -> None:
    vocabulary, ids = exported.vocabulary, exported.ids("a red apple")
    control = [0, 1, 2, 3, vocabulary.break_, vocabulary.end_of_span, vocabulary.sentinel(0), vocabulary.end_of_turn]
    for one in control:
        text = exported.theirs.decode([one, *ids], skip_special_tokens=True)
        assert text == exported.theirs.decode(ids), vocabulary.name(one)


def test_the_placeholder_is_the_second_reserved_token_or_else_the_last_sentinel(exported: Exported) -> None:
    vocabulary = exported.vocabulary
    second = vocabulary.end_of_turn + 1 if vocabulary.config.num_reserved >= 2 else vocabulary.sentinel(7)
    assert exported.theirs.convert_tokens_to_ids("<image>") == second
    names = vocabulary_map(vocabulary)
    assert names["<image>"] == second
    assert sorted(names.values()) == list(range(vocabulary.ids("text").start))


def test_transformers_maps_codes_to_our_ids(exported: Exported) -> None:
    """The model's own table, which it makes of the names."""
    mapping = ChameleonImageVocabularyMapping(vocabulary_map(exported.vocabulary))
    codes = torch.arange(40).view(1, 8, 5)
    assert torch.equal(mapping.convert_img2bpe(codes), exported.vocabulary.to_ids("image", codes))
    assert mapping.image_token_id == exported.theirs.image_token_id


def test_the_processor_puts_a_picture_in_its_place(exported: Exported) -> None:
    processor: Any = transformers.AutoProcessor.from_pretrained(exported.folder)
    assert type(processor).__name__ == "ChameleonProcessor"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    given = processor(images=Image.fromarray(pixels), text="<image>a red", return_tensors="pt")
    vocabulary, placeholder = exported.vocabulary, exported.theirs.image_token_id
    picture = [vocabulary.break_, *[placeholder] * NUM_CODES, vocabulary.end_of_span]
    assert given.input_ids[0].tolist() == [0, *picture, *exported.ids("a red"), vocabulary.end_of_turn]
    own = to_tensor(resize_and_crop(Image.fromarray(pixels), SIZE, "transformers"))
    expected = (own + 1) * 127.5 * 0.0078 - 1
    assert given.pixel_values.shape == (1, 3, SIZE, SIZE)
    assert (given.pixel_values[0] - expected).abs().max() < 1e-5  # measured: 1.2e-7


def test_what_is_exported_comes_back(sentencepiece_model: Exported) -> None:
    """Read by ourselves, the file has the pieces and the vocabulary that it was written from."""
    own = sentencepiece_model.own
    again = load_text_tokenizer(sentencepiece_model.folder / "tokenizer.json")
    assert size_vocabulary(again, {"image": 40}, 8) == sentencepiece_model.vocabulary.config
    assert again.piece_bytes == own.piece_bytes
    for text in [*TEXTS, *TYPED]:
        assert again.encode(text) == own.encode(text)
        assert again.decode(again.encode(text)) == text


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, exported: Exported) -> None:
    train_text_tokenizer(TRAINING, tmp_path / "other.model", vocab_size=300)
    with pytest.raises(ValueError, match=r"other\.model has 300 text pieces, the vocabulary"):
        write_processor(tmp_path / "out", exported.vocabulary, tmp_path / "other.model", SIZE, NUM_CODES)
    write_tokenizer(tmp_path / "t.json", num_codes=39)
    text = Vocabulary(size_vocabulary(load_text_tokenizer(tmp_path / "t.json"), {"image": 39}, 8))
    write_tokenizer(tmp_path / "t.json", num_codes=40)
    with pytest.raises(ValueError, match=r"t\.json: its control tokens are not those of the vocabulary"):
        write_processor(tmp_path / "out", text, tmp_path / "t.json", SIZE, NUM_CODES)
    assert not (tmp_path / "out").exists()


def test_a_piece_with_a_character_that_is_none_is_named() -> None:
    assert list(find_merges({"a": -3, "b": -4, "ab": -1, "aba": -2})) == [["a", "b"], ["ab", "a"]]
    with pytest.raises(ValueError, match="the text piece 'ac' has the character 'c', which is no piece"):
        list(find_merges({"a": -3, "ac": -1}))
