"""Lumina's sequences: pictures of several sizes spelled and parsed, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.document import (
    Document,
    EndOfTurn,
    Image,
    LuminaFormat,
    Mask,
    Run,
    SequenceError,
    Text,
    build_format,
)
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SIDE, PER = 6, 2  # codes along a side of the square, and along a unit
NUM_RESERVED = Vocabulary.reserved_for_sizes(4)


class ByteCodec:
    """A piece is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode()


def build_vocabulary(num_reserved: int = NUM_RESERVED) -> Vocabulary:
    sizes = {"codebook_sizes": {"image": 8}, "num_text_pieces": 256, "num_sentinels": 3, "num_reserved": num_reserved}
    return Vocabulary(VocabularyConfig(**sizes))  # type: ignore[arg-type]


VOCABULARY = build_vocabulary()
FORMAT = LuminaFormat(VOCABULARY, {"image": (SIDE, SIDE)}, ByteCodec(), codes_per_unit=PER)
GRIDS = FORMAT.allowed_grids("image")
BR, END, LINE = VOCABULARY.break_, VOCABULARY.end_of_span, VOCABULARY.newline
TWO, FOUR = VOCABULARY.size_token(1), VOCABULARY.size_token(2)  # a unit has two codes


@st.composite
def draw_image(draw: st.DrawFn) -> Image:
    height, width = draw(st.sampled_from(GRIDS))
    codes = draw(st.lists(st.integers(0, 7), min_size=height * width, max_size=height * width))
    return Image(np.reshape(codes, (height, width)))


texts = st.text(min_size=1, max_size=5).map(Text)
documents = st.lists(draw_image() | texts | st.integers(0, 2).map(Mask) | st.just(EndOfTurn()), max_size=5)


@given(parts=documents)
def test_parsing_and_splitting_are_the_inverses_of_spelling_and_joining(parts: list) -> None:
    ids = FORMAT.spell(Document(parts))
    assert FORMAT.parse(ids) == Document(parts)
    assert np.array_equal(FORMAT.with_text_tokenizer(None).join(FORMAT.split(ids)), ids)


@given(parts=documents, cut=st.integers(0, 4))
def test_a_prompt_is_the_start_of_the_whole_document_with_a_size_too(parts: list, cut: int) -> None:
    whole = Document(parts).parts
    head, rest = whole[:cut], whole[cut:]
    if not rest:
        return
    ids = FORMAT.spell(Document(whole))
    prompts = [FORMAT.spell_prompt(Document(head), rest[0].modality)]
    if isinstance(rest[0], Image):
        prompts.append(FORMAT.spell_prompt(Document(head), "image", rest[0].codes.shape))
        assert len(prompts[1]) == len(prompts[0]) + 2
        assert VOCABULARY.contains("image", ids[len(prompts[1])])
    for prompt in prompts:
        assert np.array_equal(ids[: len(prompt)], prompt)
        assert FORMAT.parse_continuation(ids, len(prompt)) == Document(rest)


def test_a_picture_is_spelled_as_lumina_spells_it() -> None:
    a, turn = VOCABULARY.ids("text").start + ord("a"), VOCABULARY.end_of_turn
    tall = np.arange(8).reshape(4, 2)
    rows = [token for row in (tall + 4).tolist() for token in (*row, LINE)]
    parts = [Text("a"), EndOfTurn(), Image(tall), EndOfTurn()]
    assert FORMAT.spell(Document(parts)).tolist() == [0, a, turn, BR, FOUR, TWO, *rows, END, turn, 2]


def test_lumina_counts_tokens_and_names_ids_as_released() -> None:
    sizes = {"codebook_sizes": {"image": 8192}, "num_text_pieces": 56000, "num_reserved": 300}
    vocabulary = Vocabulary(VocabularyConfig(**sizes))  # type: ignore[arg-type]
    assert (vocabulary.newline, *map(vocabulary.size_token, (16, 24, 32))) == (8803, 8820, 8828, 8836)
    for pixels, tokens in ((512, 1060), (768, 2356), (1024, 4164)):
        form = LuminaFormat(vocabulary, {"image": (pixels // 16, pixels // 16)})
        run = Run("image", np.full((pixels // 16) ** 2, 4), (pixels // 16, pixels // 16))
        assert len(form.join([run])) == 2 + tokens
        assert form.blocks["image"].num_tokens((pixels // 16, pixels // 16)) == tokens - 1


def test_the_allowed_grids_are_those_of_at_most_the_area_and_ratio() -> None:
    units = [(h // PER, w // PER) for h, w in GRIDS]
    wanted = {(h, w) for h in range(1, 20) for w in range(1, 20) if h * w <= 9 and max(h, w) <= 4 * min(h, w)}
    assert set(units) == wanted
    assert len(units) == len(wanted)
    assert units[0] == (3, 3)
    longest = max(FORMAT.blocks["image"].num_tokens(grid) for grid in GRIDS)
    assert FORMAT.blocks["image"].num_tokens() == longest


def codes(height: int, width: int, code: int = 4) -> list[int]:
    return [*[code] * width, LINE] * height


MALFORMED = {
    "no sizes": ([BR, *codes(2, 2), END], "a height and a width"),
    "one size": ([BR, TWO, *codes(2, 2), END], "a height and a width"),
    "nothing": ([BR, END], "a height and a width"),
    "a row short": ([BR, FOUR, TWO, *codes(3, 2), END], "9 tokens stand between"),
    "a row more": ([BR, TWO, TWO, *codes(3, 2), END], "2 rows of 2 codes and a newline have 6"),
    "turned": ([BR, TWO, FOUR, *codes(4, 2), END], "12 tokens stand between the sizes and end-image; 2 rows of 4"),
    "newline missing": ([BR, TWO, TWO, 4, 4, LINE, 4, 4, 4, END], "row 1 of an image does not end with a newline"),
    "last newline missing": ([BR, TWO, TWO, 4, 4, LINE, 4, 4, END], "5 tokens stand between"),
    "newline among codes": ([BR, TWO, TWO, LINE, 4, LINE, 4, 4, LINE, END], "<newline> can not stand among"),
    "grid not allowed": (
        [BR, VOCABULARY.size_token(4), VOCABULARY.size_token(3), *codes(8, 6), END],
        re.escape("shape (8, 6); allowed"),
    ),
    "text in a picture": ([BR, TWO, TWO, 4, 200, LINE, 4, 4, LINE, END], "can not stand among image codes"),
    "a third size": ([BR, TWO, TWO, TWO, 4, LINE, 4, 4, LINE, END], "<size:1> can not stand among"),
    "newline in text": ([200, LINE, 200], "<newline> can not stand inside a part"),
    "size in text": ([TWO], "<size:1> can not stand inside a part"),
    "codes outside": ([4, 4], "outside begin-image"),
    "no end": ([BR, TWO, TWO, *codes(2, 2)], "begin-image must be followed"),
}


@pytest.mark.parametrize(("ids", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_sequences_are_named(ids: list[int], message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        FORMAT.parse(np.array([0, *ids, 2]))


def test_grids_that_are_not_allowed_are_named() -> None:
    for shape in ((3, 2), (8, 8), (2, 10), (12, 2)):
        with pytest.raises(SequenceError, match=re.escape(f"image codes of shape {shape}; allowed are 6x6")):
            FORMAT.spell(Document([Image(np.zeros(shape, int))]))
        with pytest.raises(SequenceError, match="allowed are 6x6"):
            FORMAT.spell_prompt(Document([]), "image", shape)
    with pytest.raises(SequenceError, match="must have a grid"):
        FORMAT.join([Run("image", np.full(36, 4))])


@pytest.mark.parametrize("grid", [(6, 4), (5, 5), (0, 0), (6,), (7, 7)])
def test_a_square_of_whole_units_is_needed(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no square of whole units of 32 pixels"):
        LuminaFormat(VOCABULARY, {"image": grid}, codes_per_unit=PER)


def test_a_vocabulary_without_the_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=f"no size of 4 units: num_reserved is {NUM_RESERVED - 1}"):
        LuminaFormat(build_vocabulary(NUM_RESERVED - 1), {"image": (6, 6)})
    with pytest.raises(ValueError, match="at least 94"):
        _ = build_vocabulary(93).newline
    with pytest.raises(ValueError, match="the smallest is 1"):
        VOCABULARY.size_token(0)


def test_sizes_are_units_and_back() -> None:
    assert [VOCABULARY.size_units(VOCABULARY.size_token(units)) for units in range(1, 5)] == [*range(1, 5)]
    others = {*range(VOCABULARY.size)} - {VOCABULARY.size_token(units) for units in range(1, 5)}
    assert {VOCABULARY.size_units(token) for token in others} == {None}
    assert (VOCABULARY.name(LINE), VOCABULARY.name(FOUR)) == ("<newline>", "<size:2>")


def test_settings_build_the_same_format_again() -> None:
    settings = json.loads(json.dumps(FORMAT.settings))
    assert settings == {"name": "lumina", "grids": {"image": [6, 6]}, "codes_per_unit": 2}
    again = build_format(vocabulary=VOCABULARY, **settings)
    assert isinstance(again, LuminaFormat)
    assert again.blocks == FORMAT.blocks
    with pytest.raises(ValueError, match="codes_per_unit is None; lumina has it"):
        build_format("lumina", VOCABULARY, {"image": (6, 6)})
    with pytest.raises(ValueError, match="chameleon: codes_per_unit is 2; lumina has it"):
        build_format("chameleon", VOCABULARY, {"image": (6, 6)}, codes_per_unit=2)


def test_a_pair_is_turned_round_with_its_size() -> None:
    ids = FORMAT.spell(Document([Text("a"), Image(np.zeros((2, 4), int))]))
    assert FORMAT.parse(FORMAT.order_pair(ids, text_first=False)) == Document([*FORMAT.parse(ids).parts[::-1]])


def test_only_codes_of_a_continuation_are_scored() -> None:
    ids, scored = FORMAT.spell_continuation(Document([Text("a")]), Document([Image(np.arange(8).reshape(2, 4))]))
    assert ids[scored].tolist() == [*range(4, 12)]
