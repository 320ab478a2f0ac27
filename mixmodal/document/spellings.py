"""How CM3Leon and Chameleon divide and join parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np

from mixmodal.document.formats import Block, FormatName, Piece, Run, SequenceFormat
from mixmodal.document.parts import SequenceError


class CM3LeonFormat(SequenceFormat):
    """One `<break>` at every change of modality and between two coded parts (CM3Leon, arXiv 2309.02591, figure 9).

    In a chain there is one between two documents as well.
    """

    name: ClassVar[FormatName] = "cm3leon"
    text_after_open: ClassVar[bool] = True

    def _block(self, modality: str, length: int) -> Block:
        return Block(length, open_id=self.vocabulary.break_, close_id=None)

    @property
    def boundary(self) -> int:
        return self.vocabulary.break_

    def _lead(self, last: str | None, following: str) -> list[int]:
        return [] if last is None or (last == "text" and following == "text") else [self.vocabulary.break_]

    def pieces(self, runs: Sequence[Run]) -> list[Piece]:
        pieces: list[Piece] = []
        last = None
        for index, run in enumerate(runs):
            if lead := self._lead(last, run.modality):  # ends the part before it and opens the one behind, if coded
                coded = tuple(place for place in (index - 1, index) if runs[place].modality in self.blocks)
                pieces.append(Piece(np.array(lead, dtype=np.int64), coded))
            pieces.append(Piece(run.ids, (index,)))
            last = run.modality
        return pieces

    def _runs(self, body: np.ndarray) -> list[Run]:
        if not len(body):
            return []
        runs: list[Run] = []
        edges = [-1, *(body == self.vocabulary.break_).nonzero()[0].tolist(), len(body)]
        for before, after in pairwise(edges):
            found = self._modality_runs(body[before + 1 : after])
            if not found:
                raise SequenceError("nothing stands before or behind a <break>")
            modalities = {run.modality for run in found}
            if len(modalities) > 1:
                raise SequenceError(f"no <break> between parts of modality {' and '.join(sorted(modalities))}")
            if runs and runs[-1].modality == found[0].modality == "text":
                raise SequenceError("a <break> stands between two texts")
            runs += found
        return runs


class ChameleonFormat(SequenceFormat):
    """Images between begin-image (`<break>`) and end-image (`<eoss>`) tokens (Chameleon, arXiv 2405.09818).

    Chameleon has no chains. Here `</s>` stands between two documents of one, since its `<break>` begins an image.
    """

    name: ClassVar[FormatName] = "chameleon"
    text_after_open: ClassVar[bool] = False

    def _block(self, modality: str, length: int) -> Block:
        if modality != "image":
            raise ValueError(f"sequence format {self.name}: it has tokens for images only, not for {modality!r}")
        return Block(length, open_id=self.vocabulary.break_, close_id=self.vocabulary.end_of_span)

    @property
    def boundary(self) -> int:
        return self.vocabulary.eos

    def _lead(self, last: str | None, following: str) -> list[int]:
        return [] if following == "text" else [self.blocks[following].open_id]

    def pieces(self, runs: Sequence[Run]) -> list[Piece]:
        pieces: list[Piece] = []
        for index, run in enumerate(runs):
            block, owner = self.blocks.get(run.modality), (index,)
            if block is None:
                pieces.append(Piece(run.ids, owner))
            else:
                ends = np.array([block.open_id, block.close_id], dtype=np.int64)
                pieces += [Piece(ends[:1], owner), Piece(self._inside(run), owner), Piece(ends[1:], owner)]
        return pieces

    def _inside(self, run: Run) -> np.ndarray:
        """What stands between begin-image and end-image."""
        return run.ids

    def _read_inside(self, ids: np.ndarray) -> Run:
        """The inverse of `_inside`."""
        found = self._modality_runs(ids)
        if len(found) != 1 or found[0].modality == "text":
            raise SequenceError("begin-image must be followed by image codes and end-image")
        return found[0]

    def _runs(self, body: np.ndarray) -> list[Run]:
        runs: list[Run] = []
        while len(body):
            opens = (body == self.vocabulary.break_).nonzero()[0]
            text = body[: opens[0]] if len(opens) else body
            found = self._modality_runs(text)
            if any(run.modality != "text" for run in found):
                raise SequenceError("image codes stand outside begin-image and end-image")
            runs += found
            if not len(opens):
                break
            body = body[opens[0] + 1 :]
            closes = (body == self.vocabulary.end_of_span).nonzero()[0]
            if not len(closes):
                raise SequenceError("begin-image must be followed by image codes and end-image")
            runs.append(self._read_inside(body[: closes[0]]))
            body = body[closes[0] + 1 :]
        return runs
