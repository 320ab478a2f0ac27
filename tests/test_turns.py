"""Conversations as sequences: exactly the documented tokens carry loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.document import (
    Document,
    EndOfTurn,
    FormatName,
    Image,
    Part,
    SequenceError,
    SequenceFormat,
    Text,
    Turn,
    build_format,
    spell_turns,
)
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(
    VocabularyConfig(
        codebook_sizes={"image": 8}, num_text_pieces=256, num_sentinels=3, num_reserved=Vocabulary.reserved_for_sizes(8)
    )
)
PICTURE, OTHER = Image(np.array([[0, 1], [2, 3]])), Image(np.array([[4, 5], [6, 7]]))


class ByteCodec:
    """A piece is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode()


FORMAT: dict[FormatName, SequenceFormat] = {
    "cm3leon": build_format("cm3leon", VOCABULARY, {"image": (2, 2)}, ByteCodec()),
    "chameleon": build_format("chameleon", VOCABULARY, {"image": (2, 2)}, ByteCodec()),
    "lumina": build_format("lumina", VOCABULARY, {"image": (2, 2)}, ByteCodec(), codes_per_unit=1),
}


def ask(*parts: Part, loss: Sequence[bool] | None = None) -> Turn:
    return Turn(parts, tuple(loss or [False] * len(parts)), is_answer=False)


def answer(*parts: Part, loss: Sequence[bool] | None = None) -> Turn:
    return Turn(parts, tuple(loss or [True] * len(parts)), is_answer=True)


def spelled(name: FormatName, turns: Sequence[Turn]) -> str:
    """Tokens as text, each with `+` before it where it carries loss; codes are digits."""
    ids, loss = spell_turns(FORMAT[name], turns)
    assert (ids.dtype, loss.dtype, ids.shape) == (np.int64, np.bool_, loss.shape)
    names = {"<end_of_turn>": "EOT"}

    def shown(token: int) -> str:
        if VOCABULARY.contains("text", np.array([token]))[0]:
            return chr(int(VOCABULARY.from_ids("text", np.array([token]))[0]))
        if VOCABULARY.contains("image", np.array([token]))[0]:
            return str(int(VOCABULARY.from_ids("image", np.array([token]))[0]))
        return names.get(VOCABULARY.name(token), VOCABULARY.name(token))

    return " ".join(("+" if flag else "") + shown(int(token)) for token, flag in zip(ids, loss))


Q, A = Text("q"), Text("ab")
NO = [False]


@pytest.mark.parametrize(
    ("turns", "chameleon", "cm3leon"),
    [
        pytest.param([ask(Q), answer(A)], *["<s> q EOT +a +b +EOT +</s>"] * 2, id="text"),
        pytest.param(
            [ask(Q), answer(PICTURE)],
            "<s> q EOT +<break> +0 +1 +2 +3 +<eoss> +EOT +</s>",
            "<s> q EOT +<break> +0 +1 +2 +3 +<break> +EOT +</s>",
            id="text to image",
        ),
        pytest.param(
            [ask(PICTURE, Q), answer(A)],
            "<s> <break> 0 1 2 3 <eoss> q EOT +a +b +EOT +</s>",
            "<s> 0 1 2 3 <break> q EOT +a +b +EOT +</s>",
            id="question",
        ),
        pytest.param(
            [ask(Q, PICTURE), answer(A)],
            "<s> q <break> 0 1 2 3 <eoss> EOT +a +b +EOT +</s>",
            "<s> q <break> 0 1 2 3 <break> EOT +a +b +EOT +</s>",
            id="caption",
        ),
        pytest.param(
            [ask(PICTURE, Q), answer(OTHER)],
            "<s> <break> 0 1 2 3 <eoss> q EOT +<break> +4 +5 +6 +7 +<eoss> +EOT +</s>",
            "<s> 0 1 2 3 <break> q EOT +<break> +4 +5 +6 +7 +<break> +EOT +</s>",
            id="edit",
        ),
        pytest.param(
            [ask(Q), answer(A, PICTURE, A)],
            "<s> q EOT +a +b +<break> +0 +1 +2 +3 +<eoss> +a +b +EOT +</s>",
            "<s> q EOT +a +b +<break> +0 +1 +2 +3 +<break> +a +b +EOT +</s>",
            id="interleaved answer",
        ),
        pytest.param(
            [ask(PICTURE, OTHER, Q), answer(A)],
            "<s> <break> 0 1 2 3 <eoss> <break> 4 5 6 7 <eoss> q EOT +a +b +EOT +</s>",
            "<s> 0 1 2 3 <break> 4 5 6 7 <break> q EOT +a +b +EOT +</s>",
            id="which of two",
        ),
        pytest.param(
            [ask(Text("s"), Q), answer(A), ask(Q), answer(Text("c"))],
            *["<s> s q EOT +a +b +EOT q EOT +c +EOT +</s>"] * 2,
            id="system and two rounds",
        ),
        pytest.param(
            [ask(Q), answer(A, loss=NO), ask(Q), answer(Text("c"))],
            *["<s> q EOT a b EOT q EOT +c +EOT +</s>"] * 2,
            id="first answer without loss",
        ),
        pytest.param(
            [ask(Q), answer(A), ask(Q), answer(Text("c"), loss=NO)],
            *["<s> q EOT +a +b +EOT q EOT c EOT </s>"] * 2,
            id="last answer without loss",
        ),
        pytest.param(
            [ask(Q), answer(Text("c"), A, loss=[False, True])],
            *["<s> q EOT c +a +b +EOT +</s>"] * 2,
            id="given start of an answer",
        ),
        pytest.param(
            [ask(Q), answer(PICTURE, A, loss=[False, True])],
            "<s> q EOT <break> 0 1 2 3 <eoss> +a +b +EOT +</s>",
            "<s> q EOT <break> 0 1 2 3 <break> +a +b +EOT +</s>",
            id="text behind a given picture",
        ),
        pytest.param(
            [ask(Q), answer(A, PICTURE, loss=[True, False])],
            "<s> q EOT +a +b <break> 0 1 2 3 <eoss> +EOT +</s>",
            "<s> q EOT +a +b <break> 0 1 2 3 <break> +EOT +</s>",
            id="given picture behind text",
        ),
        pytest.param(
            [ask(Q), answer(PICTURE, OTHER, loss=[True, False])],
            "<s> q EOT +<break> +0 +1 +2 +3 +<eoss> <break> 4 5 6 7 <eoss> +EOT +</s>",
            "<s> q EOT +<break> +0 +1 +2 +3 +<break> 4 5 6 7 <break> +EOT +</s>",
            id="one break ends a picture with loss and opens one without",
        ),
        pytest.param(
            [ask(Q, PICTURE, loss=[True, False]), answer(A, loss=NO)],
            "<s> +q <break> 0 1 2 3 <eoss> EOT a b EOT </s>",
            "<s> +q <break> 0 1 2 3 <break> EOT a b EOT </s>",
            id="question with loss has no end of turn with it",
        ),
    ],
)
def test_exactly_the_documented_tokens_carry_loss(turns: list[Turn], chameleon: str, cm3leon: str) -> None:
    assert spelled("chameleon", turns) == chameleon
    assert spelled("cm3leon", turns) == cm3leon


def test_size_and_newlines_of_an_answered_picture_carry_loss_in_lumina() -> None:
    wide = Image(np.array([[4, 5, 6]]))
    shown = spelled("lumina", [ask(PICTURE, Q), answer(wide)])
    size = [VOCABULARY.name(VOCABULARY.size_token(units)) for units in (1, 2, 3)]
    newline = VOCABULARY.name(VOCABULARY.newline)
    before = f"<s> <break> {size[1]} {size[1]} 0 1 {newline} 2 3 {newline} <eoss> q EOT"
    assert shown == f"{before} +<break> +{size[0]} +{size[2]} +4 +5 +6 +{newline} +<eoss> +EOT +</s>"


parts = st.sampled_from([PICTURE, OTHER, Text("x"), Text("yz")])
flagged = st.lists(st.tuples(parts, st.booleans()), min_size=1, max_size=4)


@given(said=st.lists(flagged, min_size=1, max_size=4), name=st.sampled_from(sorted(FORMAT)))
def test_turns_are_a_document_and_content_has_the_flag_of_its_part(
    said: list[list[tuple[Part, bool]]], name: FormatName
) -> None:
    turns = [
        Turn(tuple(part for part, _ in one), tuple(flag for _, flag in one), is_answer=bool(place % 2))
        for place, one in enumerate(said)
    ]
    ids, loss = spell_turns(FORMAT[name], turns)
    document = Document(part for turn in turns for part in (*turn.parts, EndOfTurn()))
    assert FORMAT[name].parse(ids) == document
    assert np.array_equal(ids, FORMAT[name].spell(document))  # a byte is a piece here, so nothing is lost between texts
    content = np.asarray(VOCABULARY.is_content(ids))
    lengths = {PICTURE: 4, OTHER: 4, Text("x"): 1, Text("yz"): 2}
    assert loss[content].tolist() == [flag for one in said for part, flag in one for _ in range(lengths[part])]
    ends = loss[ids == VOCABULARY.end_of_turn].tolist()
    assert ends == [turn.is_answer and any(turn.loss) for turn in turns]
    assert (loss[0], loss[-1]) == (False, ends[-1])


def test_a_turn_has_a_flag_for_each_part() -> None:
    with pytest.raises(SequenceError, match="2 parts and 1 loss flags"):
        Turn((Q, A), (True,), is_answer=True)
    with pytest.raises(SequenceError, match="0 parts"):
        Turn((), (), is_answer=True)
