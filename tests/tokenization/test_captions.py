"""Text tokens of encoders: learned alike from the same captions, with the special tokens that the towers look for."""

import pytest
import torch

from mixmodal.models.two_tower import EncoderKind, TwoTowerConfig
from mixmodal.tokenization.captions import (
    build_caption_tokenizer,
    encode_captions,
    text_ids,
    train_caption_tokenizer,
)

CAPTIONS = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "apple")]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def config(request: pytest.FixtureRequest) -> TwoTowerConfig:
    return TwoTowerConfig(kind=request.param, vocab_size=300, max_text_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(config: TwoTowerConfig):
    return build_caption_tokenizer(train_caption_tokenizer(CAPTIONS, config.kind, config.vocab_size), config.kind, 8)


def test_the_same_captions_give_the_same_tokenizer(config: TwoTowerConfig) -> None:
    found = {train_caption_tokenizer(CAPTIONS * 50, config.kind, 300) for _ in range(3)}
    assert len(found) == 1


def test_texts_stand_between_begin_and_end_and_are_padded_with_the_end(config: TwoTowerConfig, tokenizer) -> None:
    (row,) = encode_captions(tokenizer, ["a red circle"], config).tolist()
    begin, end = text_ids(tokenizer)[1:]
    words = row[1:4] if config.kind == "clip" else row[:3]
    assert row == ([begin, *words] if config.kind == "clip" else words) + [end] * (4 if config.kind == "clip" else 5)
    assert not {begin, end} & set(words)
    assert tokenizer.convert_ids_to_tokens(words) == ["\u0120a", "\u0120red", "\u0120circle"]
    assert end != 2  # transformers takes another token's feature then


def test_a_text_that_is_cut_keeps_its_end(config: TwoTowerConfig, tokenizer) -> None:
    (row,) = encode_captions(tokenizer, ["red " * 30], config).tolist()
    assert len(row) == 8
    assert row.count(tokenizer.eos_token_id) == 1
    assert row[-1] == tokenizer.eos_token_id


def test_case_and_white_space_do_not_matter(config: TwoTowerConfig, tokenizer) -> None:
    texts = ["a red circle", "A Red  Circle", " a\nred circle "]
    first, *others = encode_captions(tokenizer, texts, config)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("text", ["<|endoftext|>", "</s>", "<|startoftext|>", "red</s>"])
def test_text_of_a_user_never_becomes_a_control_token(config: TwoTowerConfig, tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    special = set(text_ids(tokenizer)[1:])
    assert sum(number in special for number in ids) == (2 if config.kind == "clip" else 1)


def test_any_text_can_be_spelled(config: TwoTowerConfig, tokenizer) -> None:
    text = "na\u00efve \u732b \U0001f34e ~{}"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_a_tokenizer_has_at_most_the_tokens_asked_for(config: TwoTowerConfig) -> None:
    for size in (260, 270):
        contents = train_caption_tokenizer(CAPTIONS, config.kind, size)
        assert len(build_caption_tokenizer(contents, config.kind, 8)) == size


@pytest.mark.parametrize("captions", [[], [" "]])
def test_nothing_to_learn_from_is_refused(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="no captions"):
        train_caption_tokenizer(captions, "clip", 300)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_read_up_to_what_ends_them(kind: EncoderKind) -> None:
    captions = ["red apple, flat style", "Green Apple ,  outline style", "a, b, c", ", flat style", "pear"]
    plain, cut = (
        build_caption_tokenizer(train_caption_tokenizer(captions, kind, 400, until), kind, 24) for until in (None, ", ")
    )

    def read(text: str) -> str:
        return cut.decode(cut(text)["input_ids"], skip_special_tokens=True).strip()

    assert read("red apple, flat style") == read("Red  apple,\toutline") == "red apple"
    assert read("a, b, c") == "a"
    assert read(", flat style") == ", flat style"  # nothing would be left
    assert read("pear") == "pear"
    assert read("red apple,flat") == "red apple,flat"
    assert plain.decode(plain("red apple, flat style")["input_ids"], skip_special_tokens=True).strip() != "red apple"
