"""Sequence formats: the one place that spells documents as ids and parses them back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from mixmodal.document.parts import PART_TYPES, Coded, Document, EndOfTurn, Mask, Part, SequenceError, Text, TextCodec
from mixmodal.vocabulary import Vocabulary

FormatName = Literal["cm3leon", "chameleon", "lumina"]
Grid = tuple[int, ...]
"""The shape of codes."""


class Run(NamedTuple):
    """One part as ids: a stretch of one modality without its control tokens. `ids` is int64 `(n,)`.

    `grid` is the shape of its codes; None where the format has one grid, and for text.
    """

    modality: str
    ids: np.ndarray
    grid: Grid | None = None


class Piece(NamedTuple):
    """A stretch of a sequence: ids `(n,)`, and the indices of the runs that it belongs to.

    A control token that opens or ends a coded part belongs to that part; to two where it stands between them.
    """

    ids: np.ndarray
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Lines:
    """How codes of several grids `(h, w)` stand in a block: the tokens of their size, and one behind each row.

    Args:
        sizes: the allowed grids, each with the tokens that stand before its codes.
        newline_id: stands behind each row.
    """

    sizes: Mapping[Grid, tuple[int, ...]]
    newline_id: int

    def length(self, grid: Grid) -> int:
        """Codes and newlines of a grid."""
        height, width = grid
        return height * (width + 1)


@dataclass(frozen=True)
class Block:
    """How a coded modality stands in a sequence: `length` codes after `open_id`, ended by `close_id`.

    `close_id` is None where the next control token (`<break>` or `</s>`) ends it. With `lines` the length is that of
    the largest grid.
    """

    length: int
    open_id: int
    close_id: int | None
    lines: Lines | None = None

    def num_tokens(self, grid: Grid | None = None) -> int:
        """Tokens behind `open_id`, `close_id` among them: of a grid, or the most of any."""
        closed = int(self.close_id is not None)
        if self.lines is None:
            return self.length + closed
        grids = self.lines.sizes if grid is None else (grid,)
        return max(len(self.lines.sizes[one]) + self.lines.length(one) for one in grids) + closed


class SequenceFormat(ABC):
    """Spells documents as ids `(T,)` int64 and parses them back: `parse(spell(d)) == d`.

    Args:
        vocabulary: the id space.
        grids: the shape of the codes of each coded modality, as `{"image": (4, 4)}`.
        text_tokenizer: needed to spell or parse text; ids can be split and joined without it.
    """

    name: ClassVar[FormatName]
    text_after_open: ClassVar[bool]
    """Whether text, too, may follow the token that opens a coded block."""
    guides_with_bos: ClassVar[bool] = True
    """Whether a row of guidance that knows nothing of the prompt begins with `<s>`."""

    def __init__(
        self, vocabulary: Vocabulary, grids: Mapping[str, Sequence[int]], text_tokenizer: TextCodec | None = None
    ) -> None:
        if set(grids) != set(vocabulary.config.codebook_sizes):
            raise ValueError(f"sequence format: grids for {sorted(grids)}, codebooks for {vocabulary.modalities[1:]}")
        unknown = [modality for modality in grids if modality not in PART_TYPES]
        if unknown:
            raise ValueError(f"sequence format: no part type for {unknown}; add a subclass of Coded to PART_TYPES")
        self.vocabulary = vocabulary
        self._kinds = self._kind_table()
        self.grids: dict[str, Grid] = {modality: tuple(grid) for modality, grid in grids.items()}
        self.text_tokenizer = text_tokenizer
        self.blocks = {modality: self._block(modality, math.prod(grid)) for modality, grid in self.grids.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What `build_format` makes it of again, as plain data for JSON, but for vocabulary and text tokenizer."""
        return {"name": self.name, "grids": {modality: list(grid) for modality, grid in self.grids.items()}}

    def with_text_tokenizer(self, text_tokenizer: TextCodec | None) -> SequenceFormat:
        """The same format with another text tokenizer."""
        return type(self)(self.vocabulary, self.grids, text_tokenizer)

    @abstractmethod
    def _block(self, modality: str, length: int) -> Block: ...

    def allowed_grids(self, modality: str) -> tuple[Grid, ...]:
        """The grids that codes of a modality may have, the largest first."""
        return (self.grids[modality],)

    def fitting_grid(self, modality: str, height: int, width: int) -> Grid:
        """The grid that codes of a thing of this height and width get, in any unit."""
        return self.grids[modality]

    def size_lead(self, modality: str, grid: Grid) -> list[int]:
        """What the token that opens a block is followed by where its codes are to have a grid; nothing if all have.

        Raises:
            SequenceError: for a grid that is not allowed.
        """
        allowed = self.allowed_grids(modality)
        if tuple(grid) not in allowed:
            shown = " ".join("x".join(map(str, one)) for one in allowed[:4]) + (" ..." if len(allowed) > 4 else "")
            raise SequenceError(f"{modality} codes of shape {tuple(grid)}; allowed are {shown}")
        lines = self.blocks[modality].lines
        return [] if lines is None else list(lines.sizes[tuple(grid)])

    def grid_of(self, sizes: Sequence[int] | np.ndarray) -> Grid | None:
        """The grid that the tokens of a size say; None where they say none, as in formats of one grid."""
        return None

    def lay_out(self, run: Run) -> np.ndarray:
        """The ids of a coded run with what stands between them, `(n,)` int64: as they are where nothing does."""
        return run.ids

    @abstractmethod
    def pieces(self, runs: Sequence[Run]) -> list[Piece]:
        """The runs with the control tokens between them, without `<s>` and `</s>`."""

    def _body(self, runs: Sequence[Run]) -> list[np.ndarray]:
        return [piece.ids for piece in self.pieces(runs)]

    @abstractmethod
    def _runs(self, body: np.ndarray) -> list[Run]:
        """The inverse of `pieces`."""

    @property
    @abstractmethod
    def boundary(self) -> int:
        """The token between two documents of a chain."""

    @abstractmethod
    def _lead(self, last: str | None, following: str) -> list[int]:
        """Control tokens between a part of modality `last` (None: the start) and one of modality `following`."""

    # documents -> ids

    def runs(self, document: Document) -> list[Run]:
        """The parts as runs of ids, in order."""
        return [
            Run(part.modality, self._part_ids(part), part.codes.shape if isinstance(part, Coded) else None)
            for part in document.parts
        ]

    def spell(self, document: Document) -> np.ndarray:
        """A whole document, from `<s>` to `</s>`.

        Raises:
            SequenceError: for codes of another grid or outside the codebook, or an index without a sentinel.
        """
        return self.join(self.runs(document))

    def spell_prompt(self, document: Document, following: str | None, grid: Grid | None = None) -> np.ndarray:
        """The start of a document, open for a part of modality `following`; None leaves the choice to the model.

        Args:
            grid: of the codes that are to follow; None leaves it to the model, too.

        Raises:
            SequenceError: for a grid that is not allowed.
        """
        last = document.parts[-1].modality if document.parts else None
        lead = [] if following is None else self._lead(last, following)
        if following is not None and grid is not None:
            lead = [*lead, *self.size_lead(following, grid)]
        return np.concatenate([[self.vocabulary.bos], *self._body(self.runs(document)), lead]).astype(np.int64)

    def spell_continuation(self, context: Document, continuation: Document) -> tuple[np.ndarray, np.ndarray]:
        """A whole document and which of its tokens score `continuation`, both `(T,)`, int64 and bool.

        Scored are the content tokens of the continuation and, where it ends with text, the `</s>` behind it, without
        which a text would never lose against its own beginning.
        """
        if not continuation.parts:
            raise SequenceError("a continuation needs at least one part")
        following = continuation.parts[0].modality
        start = len(self.spell_prompt(context, following))
        ids = self.join([*self.runs(context), *self.runs(continuation)])
        scored = np.asarray(self.vocabulary.is_content(ids))
        scored[:start] = False
        scored[-1] = continuation.parts[-1].modality == "text"
        return ids, scored

    def join(self, runs: Sequence[Run]) -> np.ndarray:
        """Runs of ids to one sequence from `<s>` to `</s>`, `(T,)` int64."""
        return np.concatenate([[self.vocabulary.bos], *self._body(runs), [self.vocabulary.eos]]).astype(np.int64)

    def prefix(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """What stands before a document that is to be read with whole ones, ids `(T,)` each: retrieved ones, or shots.

        From `<s>` to the token behind the last of them, int64; the document follows without its own `<s>`.
        """
        inner = [part for ids in documents for part in (ids[1:-1], [self.boundary])]
        return np.concatenate([[self.vocabulary.bos], *inner]).astype(np.int64)

    def chain(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Whole documents, ids `(T,)` each, as one sequence from `<s>` to `</s>`, int64.

        It is no document itself, and `split` may refuse it. It has `sum(len(ids) - 1) + 1` tokens.
        """
        return np.concatenate([self.prefix(documents[:-1]), documents[-1][1:]]).astype(np.int64)

    # ids -> documents

    def split(self, ids: np.ndarray) -> list[Run]:
        """The inverse of `join`.

        Raises:
            SequenceError: where the ids are not a whole sequence of this format.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) < 2 or ids[0] != self.vocabulary.bos or ids[-1] != self.vocabulary.eos:
            raise SequenceError("a sequence must begin with <s> and end with </s>")
        if ids.min() < 0 or ids.max() >= self.vocabulary.size:
            raise SequenceError(f"ids must lie in 0 .. {self.vocabulary.size - 1}; is this another vocabulary's data?")
        runs = self._runs(ids[1:-1])
        for run in runs:
            if run.modality in self.blocks:
                wanted = self.blocks[run.modality].length if run.grid is None else math.prod(run.grid)
                if len(run.ids) != wanted:
                    raise SequenceError(f"a part of modality {run.modality} has {len(run.ids)} codes, not {wanted}")
        return runs

    def turn_pair(self, ids: np.ndarray) -> np.ndarray | None:
        """A document of one text, masks among it, and one coded part, with the other one first; None for any other.

        What has turns of a conversation is no such pair: an answer can not stand before its question.

        Raises:
            SequenceError: where the ids are not a whole sequence of this format.
        """
        parts = self.group_texts(self.split(ids))
        if self.vocabulary.end_of_turn in ids or sorted(part[0].modality == "text" for part in parts) != [False, True]:
            return None
        return self.join([run for part in parts[::-1] for run in part])

    def order_pair(self, ids: np.ndarray, *, text_first: bool) -> np.ndarray:
        """A document of one text, masks among it, and one coded part, with the text first or last; any other as it is.

        Raises:
            SequenceError: where the ids are not a whole sequence of this format.
        """
        turned = self.turn_pair(ids)
        return ids if turned is None or (self.split(ids)[0].modality == "text") == text_first else turned

    def parse(self, ids: np.ndarray) -> Document:
        """The inverse of `spell`.

        Raises:
            SequenceError: where the ids are not a whole document of this format.
        """
        return Document(self._part(run) for run in self.split(ids))

    def parse_continuation(self, ids: np.ndarray, start: int) -> Document:
        """What stands behind the first `start` tokens of a whole document `ids`; the model wrote it, mostly.

        A text that `start` divides is given from there on, a coded part whole.

        Raises:
            SequenceError: where the ids are not a whole document of this format.
        """
        before = np.asarray(ids[:start])
        marks = self.vocabulary.contains("sentinel", before) | (before == self.vocabulary.end_of_turn)
        skipped = int((self.vocabulary.is_content(before) | marks).sum())
        parts = []
        for run in self.split(ids):
            divided = skipped < len(run.ids)
            if divided:
                parts.append(self._part(run if run.modality in self.blocks else Run(run.modality, run.ids[skipped:])))
            skipped = 0 if divided else skipped - len(run.ids)
        return Document(parts)

    def group_texts(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Runs with neighbouring texts of one turn, masks among them, taken together."""

        def group(item: tuple[int, Run]) -> int:
            place, run = item
            return -1 if run.modality == "text" and run.ids[0] != self.vocabulary.end_of_turn else place

        return [[run for _, run in part] for _, part in groupby(enumerate(runs), key=group)]

    # parts <-> ids

    def _part_ids(self, part: Part) -> np.ndarray:
        if isinstance(part, Mask):
            if part.index not in range(self.vocabulary.config.num_sentinels):
                raise SequenceError(f"there is no sentinel {part.index}")
            return np.array([self.vocabulary.sentinel(part.index)], dtype=np.int64)
        if isinstance(part, EndOfTurn):
            return np.array([self.vocabulary.end_of_turn], dtype=np.int64)
        if isinstance(part, Text):
            pieces = np.array(self._text().encode(part.text), dtype=np.int64)
            if not len(pieces):
                raise SequenceError(f"the text tokenizer has no pieces for the text {part.text!r}")
            return self.vocabulary.to_ids("text", pieces)
        if part.modality not in self.grids:
            raise SequenceError(f"modality {part.modality!r} has no grid in this format")
        codes, size = np.asarray(part.codes, dtype=np.int64), len(self.vocabulary.ids(part.modality))
        if codes.shape != self.grids[part.modality]:
            self.size_lead(part.modality, codes.shape)
        if codes.min() < 0 or codes.max() >= size:
            raise SequenceError(f"{part.modality} codes must lie in 0 .. {size - 1}")
        return self.vocabulary.to_ids(part.modality, codes.reshape(-1))

    def _part(self, run: Run) -> Part:
        if run.modality in self.grids:
            codes = self.vocabulary.from_ids(run.modality, run.ids)
            return PART_TYPES[run.modality](codes.reshape(run.grid or self.grids[run.modality]))
        if len(run.ids) == 1 and self.vocabulary.contains("sentinel", run.ids)[0]:
            return Mask(int(run.ids[0] - self.vocabulary.sentinel(0)))
        if run.ids[0] == self.vocabulary.end_of_turn:
            return EndOfTurn()
        return Text(self._text().decode(self.vocabulary.from_ids("text", run.ids).tolist()))

    def _text(self) -> TextCodec:
        if self.text_tokenizer is None:
            raise ValueError("sequence format: text can not be spelled or parsed without a text tokenizer")
        return self.text_tokenizer

    def _modality_runs(self, ids: np.ndarray) -> list[Run]:
        """Stretches of equal modality; a sentinel or an end of turn is a text run of its own."""
        if not len(ids):
            return []
        kinds = self._kinds[ids]
        if kinds.min() < 0:
            stray = self.vocabulary.name(int(ids[kinds < 0][0]))
            raise SequenceError(f"{stray} can not stand inside a part")
        modalities = (*self.vocabulary.modalities, "text")
        alone = len(modalities) - 1
        starts = ((kinds[1:] != kinds[:-1]) | (kinds[1:] == alone)).nonzero()[0] + 1
        edges = [0, *starts.tolist(), len(ids)]
        return [Run(modalities[kinds[start]], ids[start:stop]) for start, stop in pairwise(edges)]

    def _kind_table(self) -> np.ndarray:
        """What each id is: the index of its modality, behind those a sentinel or end of turn, or -1 for control.

        One look-up instead of a comparison for each range, since every training document passes here.
        """
        table = np.full(self.vocabulary.size, -1, dtype=np.int16)
        for kind, name in enumerate((*self.vocabulary.modalities, "sentinel")):
            span = self.vocabulary.ids(name)
            table[span.start : span.stop] = kind
        table[self.vocabulary.end_of_turn] = len(self.vocabulary.modalities)
        return table


def count_fitting(lengths: Iterable[int], room: int) -> int:
    """How many whole documents of these lengths, from the first on, fit `room` tokens before another one in a chain."""
    return sum(end <= room for end in accumulate(length - 1 for length in lengths))
