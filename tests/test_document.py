"""Sequences: spelling, parsing, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmodal import document as module
from mixmodal.document import (
    Coded,
    Document,
    EndOfTurn,
    Image,
    Mask,
    Run,
    SequenceError,
    SequenceFormat,
    Text,
    build_format,
    count_fitting,
)
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID = (2, 3)
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=256, num_sentinels=3))


class ByteCodec:
    """A piece is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode()


def build(name: str) -> SequenceFormat:
    return build_format(name, VOCABULARY, {"image": GRID}, ByteCodec())  # type: ignore[arg-type]


SQUARE = ("cm3leon", "chameleon")  # formats of one grid
FORMAT = {name: build(name) for name in SQUARE}
every_format = pytest.mark.parametrize("name", SQUARE)

images = st.lists(st.integers(0, 7), min_size=6, max_size=6).map(lambda codes: Image(np.reshape(codes, GRID)))
control_lookalikes = st.sampled_from(["<s>", "</s>", "<break>", "<mask:0>", "<eoss>", "<pad>"])
texts = (st.text(min_size=1, max_size=8) | control_lookalikes).map(Text)
masks = st.integers(0, 2).map(Mask)
turns = st.just(EndOfTurn())
documents = st.lists(images | texts | masks | turns, max_size=6).map(Document)


@every_format
@given(document=documents)
def test_parsing_is_the_inverse_of_spelling(name: str, document: Document) -> None:
    ids = FORMAT[name].spell(document)
    assert ids.dtype == np.int64
    assert FORMAT[name].parse(ids) == document


@every_format
@given(document=documents)
def test_joining_is_the_inverse_of_splitting(name: str, document: Document) -> None:
    ids = FORMAT[name].spell(document)
    without_text = build_format(name, VOCABULARY, {"image": GRID})  # type: ignore[arg-type]
    assert np.array_equal(without_text.join(without_text.split(ids)), ids)


@every_format
@given(parts=st.lists(images | masks | texts | turns, min_size=1, max_size=5), cut=st.integers(0, 4))
def test_a_prompt_is_the_start_of_the_whole_document(name: str, parts: list, cut: int) -> None:
    whole = Document(parts)
    cut = min(cut, len(whole.parts) - 1)
    head, rest = Document(whole.parts[:cut]), Document(whole.parts[cut:])
    ids, prompt = FORMAT[name].spell(whole), FORMAT[name].spell_prompt(head, rest.parts[0].modality)
    assert np.array_equal(ids[: len(prompt)], prompt)
    assert VOCABULARY.is_content(ids[len(prompt) :])[0] or isinstance(rest.parts[0], Mask | EndOfTurn)
    closed = FORMAT[name].spell_prompt(head, None)
    assert np.array_equal(ids[: len(closed)], closed)


@every_format
@given(context=documents, continuation=st.lists(images | texts, min_size=1, max_size=3).map(Document))
def test_a_continuation_is_scored_on_its_own_content(name: str, context: Document, continuation: Document) -> None:
    ids, scored = FORMAT[name].spell_continuation(context, continuation)
    assert np.array_equal(ids, FORMAT[name].spell(Document([*context.parts, *continuation.parts])))
    content = np.concatenate([run.ids for run in FORMAT[name].runs(continuation)])
    if continuation.parts[-1].modality == "text":
        content = np.append(content, VOCABULARY.eos)
    assert np.array_equal(ids[scored], content)


@every_format
@given(text=st.text(min_size=1) | control_lookalikes)
def test_text_of_a_user_never_becomes_a_control_token(name: str, text: str) -> None:
    ids = FORMAT[name].spell(Document([Text(text)]))
    assert VOCABULARY.contains("text", ids[1:-1]).all()


def test_the_two_formats_spell_as_their_papers_do() -> None:
    picture = Document([Text("a"), Image(np.zeros(GRID, int)), Text("b"), Image(np.ones(GRID, int))])
    a, b = VOCABULARY.to_ids("text", ord("a")), VOCABULARY.to_ids("text", ord("b"))
    zero, one = [4] * 6, [5] * 6
    br, end = VOCABULARY.break_, VOCABULARY.end_of_span
    assert FORMAT["cm3leon"].spell(picture).tolist() == [0, a, br, *zero, br, b, br, *one, 2]
    assert FORMAT["chameleon"].spell(picture).tolist() == [0, a, br, *zero, end, b, br, *one, end, 2]


def test_pictures_side_by_side_stay_two() -> None:
    twice = Document([Image(np.zeros(GRID, int)), Image(np.ones(GRID, int))])
    for sequence_format in FORMAT.values():
        assert sequence_format.parse(sequence_format.spell(twice)) == twice


T, C = VOCABULARY.ids("text").start, 4  # one text piece, one code
BR, END, MASK = VOCABULARY.break_, VOCABULARY.end_of_span, VOCABULARY.sentinel(0)
PICTURE = [C] * 6
MALFORMED = {
    "nothing": ([], "both"),
    "no <s>": ([T, 2], "both"),
    "no </s>": ([0, T], "both"),
    "only <s>": ([0], "both"),
    "<s> in the middle": ([0, T, 0, T, 2], "both"),
    "</s> in the middle": ([0, T, 2, T, 2], "both"),
    "<pad>": ([0, T, 1, 2], "both"),
    "<unk>": ([0, T, 3, 2], "both"),
    "id below the vocabulary": ([0, T, -1, 2], "both"),
    "id above the vocabulary": ([0, T, VOCABULARY.size, 2], "both"),
    "nothing before <break>": ([0, BR, *PICTURE, 2], "cm3leon"),
    "nothing behind <break>": ([0, T, BR, 2], "both"),
    "two <break>": ([0, T, BR, BR, *PICTURE, 2], "both"),
    "no <break> before a picture": ([0, T, *PICTURE, 2], "both"),
    "no <break> behind a picture": ([0, *PICTURE, T, 2], "both"),
    "<break> between texts": ([0, T, BR, T, 2], "both"),
    "<break> between text and mask": ([0, T, BR, MASK, 2], "both"),
    "mask in a picture": ([0, BR, C, C, C, MASK, C, C, END, 2], "both"),
    "short picture": ([0, T, BR, *PICTURE[1:], 2], "both"),
    "long picture": ([0, T, BR, *PICTURE, C, 2], "both"),
    "<eoss> in text": ([0, T, END, T, 2], "both"),
    "end-image in a cm3leon sequence": ([0, T, BR, *PICTURE, END, 2], "cm3leon"),
    "short picture, closed": ([0, T, BR, *PICTURE[1:], END, 2], "both"),
    "long picture, closed": ([0, T, BR, *PICTURE, C, END, 2], "both"),
    "picture without end": ([0, T, BR, *PICTURE, 2], "chameleon"),
    "picture without begin": ([0, T, *PICTURE, END, 2], "both"),
    "text in a picture": ([0, BR, C, C, T, C, C, C, END, 2], "both"),
    "text as a picture": ([0, BR, *[T] * 6, END, 2], "both"),
    "empty picture": ([0, BR, END, 2], "both"),
}


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        pytest.param(name, ids, id=f"{name}: {case}")
        for case, (ids, names) in MALFORMED.items()
        for name in SQUARE
        if names in ("both", name)
    ],
)
def test_malformed_sequences_are_refused(name: str, ids: list[int]) -> None:
    with pytest.raises(SequenceError):
        FORMAT[name].parse(np.array(ids))


@every_format
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(Image(np.zeros((3, 2), int)), id="other grid"),
        pytest.param(Image(np.zeros(6, int)), id="flat"),
        pytest.param(Image(np.full(GRID, 8)), id="code above the codebook"),
        pytest.param(Image(np.full(GRID, -1)), id="negative code"),
        pytest.param(Mask(3), id="no such sentinel"),
        pytest.param(Mask(-1), id="negative sentinel"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, part: module.Part) -> None:
    with pytest.raises(SequenceError):
        FORMAT[name].spell(Document([part]))


def test_empty_text_is_refused() -> None:
    with pytest.raises(SequenceError, match="empty"):
        Text("")


def test_a_tokenizer_without_pieces_for_a_text_is_refused() -> None:
    class Deaf(ByteCodec):
        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(SequenceError, match="no pieces"):
        build_format("cm3leon", VOCABULARY, {"image": GRID}, Deaf()).spell(Document([Text("a")]))


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(SequenceError, match="at least one part"):
        FORMAT["cm3leon"].spell_continuation(Document([Text("a")]), Document([]))


def test_text_without_a_tokenizer_says_so() -> None:
    with pytest.raises(ValueError, match="text tokenizer"):
        build_format("cm3leon", VOCABULARY, {"image": GRID}).spell(Document([Text("a")]))


def test_unknown_formats_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="cm3leon, chameleon or lumina"):
        build_format("html", VOCABULARY, {"image": GRID})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grids"):
        build_format("cm3leon", VOCABULARY, {})


def test_another_coded_modality_needs_a_range_and_a_part_type_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Audio(Coded):
        modality: ClassVar[str] = "audio"

    vocabulary = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8, "audio": 5}, num_text_pieces=256))
    grids = {"image": GRID, "audio": (4,)}
    with pytest.raises(ValueError, match="PART_TYPES"):
        build_format("cm3leon", vocabulary, grids)
    monkeypatch.setitem(module.PART_TYPES, "audio", Audio)
    sequence_format = build_format("cm3leon", vocabulary, grids, ByteCodec())
    sound, picture = Audio(np.array([4, 0, 1, 2])), Image(np.zeros(GRID, int))
    for parts in ([sound], [Text("a"), sound, picture], [picture, sound, sound, Text("b")]):
        assert sequence_format.parse(sequence_format.spell(Document(parts))) == Document(parts)
    assert sequence_format.blocks["audio"].length == 4


def test_runs_are_views_of_one_modality() -> None:
    ids = FORMAT["cm3leon"].spell(Document([Text("ab"), Mask(1), Image(np.zeros(GRID, int))]))
    kinds = [(run.modality, len(run.ids)) for run in FORMAT["cm3leon"].split(ids)]
    assert kinds == [("text", 2), ("text", 1), ("image", 6)]
    assert isinstance(FORMAT["cm3leon"].split(ids)[0], Run)


@every_format
@given(chained=st.lists(documents, min_size=1, max_size=4))
def test_a_chain_has_every_document_in_order_and_one_boundary_between_two(name: str, chained: list[Document]) -> None:
    spelled = [FORMAT[name].spell(document) for document in chained]
    chain = FORMAT[name].chain(spelled)
    inner = [ids[1:-1].tolist() for ids in spelled]
    assert chain[0] == VOCABULARY.bos
    assert chain[-1] == VOCABULARY.eos
    assert len(chain) == sum(len(ids) - 1 for ids in spelled) + 1
    place = 1
    for number, ids in enumerate(inner, start=1):
        assert chain[place : place + len(ids)].tolist() == ids
        place += len(ids)
        assert chain[place] == (VOCABULARY.eos if number == len(inner) else FORMAT[name].boundary)
        place += 1
    assert np.array_equal(chain, np.concatenate([FORMAT[name].prefix(spelled[:-1]), spelled[-1][1:]]))


def test_a_chain_is_spelled_as_cm3leon_spells_it() -> None:
    pair = FORMAT["cm3leon"].spell(Document([Text("a"), Image(np.zeros(GRID, np.int64))]))
    break_ = VOCABULARY.break_
    inner = [*pair[1:-1].tolist()]
    assert inner.count(break_) == 1
    assert FORMAT["cm3leon"].chain([pair, pair]).tolist() == [VOCABULARY.bos, *inner, break_, *inner, VOCABULARY.eos]
    assert FORMAT["cm3leon"].prefix([]).tolist() == [VOCABULARY.bos]


@every_format
@given(parts=st.lists(images | texts | masks, max_size=3))
def test_only_a_pair_is_turned_round(name: str, parts: list) -> None:
    ids = FORMAT[name].spell(Document(parts))
    joined = Document(parts).parts
    kinds = [
        part.modality for place, part in enumerate(joined) if not place or part.modality != joined[place - 1].modality
    ]
    turned = FORMAT[name].turn_pair(ids)
    if sorted(kinds) != ["image", "text"] or sum(part.modality == "image" for part in joined) != 1:
        assert turned is None
        return
    split = next(place for place in range(1, len(joined)) if joined[place].modality != joined[0].modality)
    assert turned is not None
    assert np.array_equal(turned, FORMAT[name].spell(Document([*joined[split:], *joined[:split]])))


@every_format
@pytest.mark.parametrize("place", range(3))
def test_a_pair_with_turns_stays_as_it_is(name: str, place: int) -> None:
    parts = [Text("a"), Image(np.zeros(GRID, np.int64))]
    parts.insert(place, EndOfTurn())
    ids = FORMAT[name].spell(Document(parts))
    assert FORMAT[name].turn_pair(ids) is None
    assert np.array_equal(FORMAT[name].order_pair(ids, text_first=False), ids)


def test_turns_are_spelled_as_chameleon_spells_them() -> None:
    parts = [Text("a"), Image(np.zeros(GRID, int)), EndOfTurn(), Text("b"), EndOfTurn()]
    a, b, turn = T + ord("a"), T + ord("b"), VOCABULARY.end_of_turn
    assert FORMAT["chameleon"].spell(Document(parts)).tolist() == [0, a, BR, *PICTURE, END, turn, b, turn, 2]
    assert FORMAT["cm3leon"].spell(Document(parts)).tolist() == [0, a, BR, *PICTURE, BR, turn, b, turn, 2]


@every_format
def test_texts_are_grouped_within_a_turn(name: str) -> None:
    ids = FORMAT[name].spell(Document([Text("a"), Mask(0), EndOfTurn(), Text("b"), Image(np.zeros(GRID, int))]))
    groups = FORMAT[name].group_texts(FORMAT[name].split(ids))
    assert [[len(run.ids) for run in group] for group in groups] == [[1, 1], [1], [1], [6]]


@every_format
def test_a_continuation_behind_turns_is_what_stands_behind_them(name: str) -> None:
    context, answer = [Text("a"), EndOfTurn()], [Text("b"), EndOfTurn()]
    prompt = FORMAT[name].spell_prompt(Document(context), None)
    ids = FORMAT[name].spell(Document([*context, *answer]))
    assert FORMAT[name].parse_continuation(ids, len(prompt)) == Document(answer)


@every_format
def test_a_pair_is_put_in_the_order_that_is_asked_for(name: str) -> None:
    image, text, spell = Image(np.zeros(GRID, np.int64)), Text("a"), FORMAT[name].spell
    for parts, first, wanted in (
        ([text, image], False, [image, text]),
        ([image, text], True, [text, image]),
        ([text, image], True, [text, image]),
        ([image, text], False, [image, text]),
        ([image, Mask(0), text], True, [Mask(0), text, image]),
        ([text, image, text], False, [text, image, text]),
        ([image, image], True, [image, image]),
        ([text], False, [text]),
        ([], True, []),
    ):
        ordered = FORMAT[name].order_pair(spell(Document(parts)), text_first=first)
        assert np.array_equal(ordered, spell(Document(wanted)))


@every_format
@given(parts=st.lists(documents, min_size=1, max_size=5), room=st.integers(0, 60))
def test_as_many_documents_fit_as_a_chain_has_room_for(name: str, parts: list[Document], room: int) -> None:
    first, *others = map(FORMAT[name].spell, parts)
    count = count_fitting(map(len, others), room)
    lengths = [len(FORMAT[name].chain([*others[:number], first])) for number in range(len(others) + 1)]
    assert lengths[count] <= len(first) + room
    assert count == len(others) or lengths[count + 1] > len(first) + room
