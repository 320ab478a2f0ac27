"""The text tokenizer keeps every string, and no string becomes a control token."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmodal.document import Document, Image, Text, build_format
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

OBJECTS = [f"{a} {b}" for a in ("red", "big", "old") for b in ("apple", "car", "fish")]
CAPTIONS = [f"{name}, {style} style" for name in OBJECTS for style in ("flat", "outline")]
CONTROL_LOOKALIKES = ["<break>", "<s>", "</s>", "<mask:0>", "<unk>", "<pad>", "<eoss>", "<0x41>", "<image:3>", "\x00"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_text_tokenizer(CAPTIONS, tmp_path_factory.mktemp("text") / "text_tokenizer.model", vocab_size=320)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_string_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(" \u2581\u2585\u2047\ufffd\x00\n\tab,\u00e9\U0001f468\u200d")))
def test_every_string_of_awkward_characters_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("red apple, \u2581\u00e9\t")))
def test_the_bytes_of_its_pieces_add_up_to_those_of_a_text(tokenizer, text):
    assert sum(tokenizer.piece_bytes[piece] for piece in tokenizer.encode(text)) == len(text.encode())


def test_unknown_piece_is_never_produced(tokenizer):
    pieces = tokenizer.encode("".join(chr(point) for point in range(0x3000)) + "<unk>")
    assert 0 not in pieces


@pytest.mark.parametrize("name", ["cm3leon", "chameleon"])
@pytest.mark.parametrize("text", CONTROL_LOOKALIKES)
def test_text_of_a_user_never_becomes_a_control_token(tokenizer, name, text):
    vocabulary = Vocabulary(
        VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=tokenizer.num_pieces, num_sentinels=2)
    )
    spelling = build_format(name, vocabulary, {"image": (1, 2)}, tokenizer)
    document = Document([Text(f"a {text} b"), Image(np.array([[1, 2]]))])
    ids = spelling.spell(document)
    content = np.asarray(vocabulary.is_content(ids))
    expected = {"cm3leon": 3, "chameleon": 4}[name]  # <s> </s> and <break>, or <break> and <eoss>, around the codes
    assert (~content).sum() == expected
    assert spelling.parse(ids) == document


def test_pieces_are_those_of_sentencepiece(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "copy.model"))
    for text in [*CAPTIONS, "  two  spaces ", "unseen words, 42!", "\u00e9\u4e2d"]:
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))
    assert tokenizer.num_pieces == oracle.get_piece_size()


def test_frequent_words_become_single_pieces(tokenizer):
    assert len(tokenizer.encode(" style")) == 1
    assert len(tokenizer.encode("red apple, flat style")) <= 6


def test_saved_and_loaded_are_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder" / "text_tokenizer.model")
    loaded = TextTokenizer.load(tmp_path / "folder" / "text_tokenizer.model")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode("old fish") == tokenizer.encode("old fish")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["text_tokenizer.model"]


def test_training_twice_gives_the_same_model(tmp_path):
    first = train_text_tokenizer(CAPTIONS, tmp_path / "a.model", vocab_size=300)
    second = train_text_tokenizer(iter(CAPTIONS), tmp_path / "b.model", vocab_size=300)
    assert first.sha256 == second.sha256


def test_space_survives_a_tokenizer_trained_without_one(tmp_path):
    tokenizer = train_text_tokenizer(["\u4e2d\u6587"], tmp_path / "t.model", vocab_size=300)
    assert tokenizer.decode(tokenizer.encode(" a  b ")) == " a  b "


def test_vocab_size_is_an_upper_limit(tmp_path):
    assert train_text_tokenizer(["ab"], tmp_path / "small.model", vocab_size=5000).num_pieces < 270
    assert train_text_tokenizer(CAPTIONS, tmp_path / "large.model", vocab_size=300).num_pieces == 300


def test_training_on_control_lookalikes_keeps_them_text(tmp_path):
    texts = ["<unk> <s> </s> <0x41>"] * 9 + ["\u2585\u2581"]
    tokenizer = train_text_tokenizer(texts, tmp_path / "t.model", vocab_size=400)
    for text in CONTROL_LOOKALIKES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 not in tokenizer.encode(text)


def test_long_training_texts_are_not_dropped(tmp_path):
    tokenizer = train_text_tokenizer(["zebra crossing " * 20_000], tmp_path / "t.model", vocab_size=400)
    assert len(tokenizer.encode(" crossing")) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text to train"),
        (["", "\u2581"], 300, "no text to train"),
        (["abc"], 257, "must exceed 257"),
        (["abcdefgh"], 260, "vocab_size 260"),
        (["fine", "a\ud800"], 300, "^training text 1 has a lone surrogate"),
    ],
)
def test_training_that_can_not_work_says_why(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_text_tokenizer(texts, tmp_path / "t.model", vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_pieces_outside_the_model_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"must lie in 0 \.\."):
        tokenizer.decode([tokenizer.num_pieces])


def test_missing_and_foreign_model_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.model: no text tokenizer"):
        TextTokenizer.load(tmp_path / "absent.model")
    (tmp_path / "noise.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"noise\.model: not a sentencepiece model"):
        TextTokenizer.load(tmp_path / "noise.model")


def test_models_that_change_text_are_refused(tmp_path):
    """A model with sentencepiece's own defaults has control tokens, no byte fallback and a dummy prefix."""
    no_control = {"bos_id": -1, "eos_id": -1}
    for number, options in enumerate(({}, {"byte_fallback": True}, {"byte_fallback": True, **no_control})):
        prefix = tmp_path / f"m{number}"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_prefix=str(prefix), vocab_size=300, hard_vocab_limit=False,
            model_type="bpe", minloglevel=2, **options,
        )  # fmt: skip
        with pytest.raises(ValueError, match="train one with"):
            TextTokenizer.load(f"{prefix}.model")
