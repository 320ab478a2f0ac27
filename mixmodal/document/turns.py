"""Conversations as sequences, and which of their tokens carry loss: the one place that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mixmodal.document.formats import Run, SequenceFormat
from mixmodal.document.parts import Document, EndOfTurn, Part, SequenceError


@dataclass(frozen=True)
class Turn:
    """What one speaker says, up to the end of the turn.

    Args:
        parts: in order, without `EndOfTurn`; a system's text stands at the start of the first turn.
        loss: one flag for each part.
        is_answer: whether the assistant speaks.
    """

    parts: tuple[Part, ...]
    loss: tuple[bool, ...]
    is_answer: bool

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.loss):
            raise SequenceError(f"a turn has {len(self.parts)} parts and {len(self.loss)} loss flags")


def spell_turns(spelling: SequenceFormat, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """A conversation from `<s>` to `</s>`, and which tokens carry loss: both `(T,)`, int64 and bool.

    An end of turn stands behind every turn, and there are no role strings: who speaks follows from the number of turns
    before (Chameleon and Lumina-mGPT, arXiv 2405.09818 and 2408.02657, released code). Loss on answers alone is
    Chameleon's (arXiv 2405.09818, section 3.2).

    These tokens carry loss, and no others:

    - text and codes of the parts whose flag is set;
    - of such a picture, all that its format spells it with: the tokens that begin and end it, in `lumina` also those
      of its size and its newlines. In `cm3leon` a `<break>` ends the picture before it and begins the one behind it,
      and carries loss where either does;
    - the end of turn behind an answer with a flag that is set, and `</s>` where that answer is the last turn.

    Neighbouring texts of one turn are spelled as one text where their flags are the same, as in a `Document`, and one
    by one where they differ.

    Raises:
        SequenceError: for what `SequenceFormat.spell` refuses.
    """
    runs: list[Run] = []
    marks: list[bool] = []
    closing = False
    for turn in turns:
        for flag, group in groupby(zip(turn.parts, turn.loss, strict=True), key=lambda pair: pair[1]):
            found = spelling.runs(Document(part for part, _ in group))
            runs += found
            marks += [flag] * len(found)
        closing = turn.is_answer and any(turn.loss)
        runs += spelling.runs(Document([EndOfTurn()]))
        marks.append(closing)
    pieces = spelling.pieces(runs)
    found = [np.full(len(piece.ids), any(marks[owner] for owner in piece.owners)) for piece in pieces]
    return spelling.join(runs), np.concatenate([[False], *found, [closing]]).astype(bool)
