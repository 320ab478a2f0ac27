"""Lumina-mGPT's format: pictures of several sizes, which say their size first and have a newline behind each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mixmodal.document.formats import Block, FormatName, Grid, Lines, Run
from mixmodal.document.parts import SequenceError, TextCodec
from mixmodal.document.spellings import ChameleonFormat
from mixmodal.vocabulary import Vocabulary

UNIT_PIXELS = 32
"""Heights and widths are multiples of it: a unit."""
MOST_RATIO = 4
"""Of the longer side to the shorter."""


def allowed_units(side: int) -> list[tuple[int, int]]:
    """Heights and widths, in units, of at most the area of a square of `side` units, and at most `MOST_RATIO` to 1.

    The largest come first, and of equally large ones the square, and the wide before the tall.
    """
    found = [
        (height, width)
        for height in range(1, MOST_RATIO * side + 1)
        for width in range(1, side * side // height + 1)
        if max(height, width) <= MOST_RATIO * min(height, width)
    ]
    return sorted(found, key=lambda grid: (-grid[0] * grid[1], abs(grid[0] - grid[1]), grid[0]))


def most_units(side: int) -> int:
    """The longest side that `allowed_units` has."""
    return max(max(grid) for grid in allowed_units(side))


def num_reserved(grid: Sequence[int], codes_per_unit: int) -> int:
    """`num_reserved` of a vocabulary whose pictures have at most the area of a square `grid` of codes."""
    return Vocabulary.reserved_for_sizes(most_units(max(1, grid[0] // max(1, codes_per_unit))))


class LuminaFormat(ChameleonFormat):
    """Chameleon's, but with pictures of several sizes (Lumina-mGPT, arXiv 2408.02657, section 2.2, released code).

    Between begin-image and end-image stand the height and the width, in units of 32 pixels, and the rows of codes, each
    with a newline behind it, the last too: `<break> <size:h> <size:w> (codes <newline>) ... <eoss>`.

    Args:
        vocabulary: with enough reserved ids, see `Vocabulary.reserved_for_sizes`.
        grids: `{"image": (side, side)}`, codes of the square whose area no picture exceeds.
        text_tokenizer: see `SequenceFormat`.
        codes_per_unit: codes along a side of 32 pixels: 2 where the tokenizer makes a code of 16 x 16 pixels.

    Raises:
        ValueError: for a grid that is no square of whole units, or too few reserved ids.
    """

    name: ClassVar[FormatName] = "lumina"
    guides_with_bos: ClassVar[bool] = False

    def __init__(
        self,
        vocabulary: Vocabulary,
        grids: Mapping[str, Sequence[int]],
        text_tokenizer: TextCodec | None = None,
        *,
        codes_per_unit: int = 2,
    ) -> None:
        self.codes_per_unit = codes_per_unit
        super().__init__(vocabulary, grids, text_tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "codes_per_unit": self.codes_per_unit}

    def with_text_tokenizer(self, text_tokenizer: TextCodec | None) -> LuminaFormat:
        return LuminaFormat(self.vocabulary, self.grids, text_tokenizer, codes_per_unit=self.codes_per_unit)

    def _block(self, modality: str, length: int) -> Block:
        block, grid, per = super()._block(modality, length), self.grids[modality], self.codes_per_unit
        if per < 1 or len(grid) != 2 or grid[0] != grid[1] or grid[0] < per or grid[0] % per:
            raise ValueError(
                f"sequence format lumina: the grid {grid} with {per} codes per unit is no square of whole units of "
                f"{UNIT_PIXELS} pixels; take an image tokenizer of square codes, one for each place, whose image_size "
                f"is a multiple of {UNIT_PIXELS}"
            )
        token = self.vocabulary.size_token
        sizes = {(h * per, w * per): (token(h), token(w)) for h, w in allowed_units(grid[0] // per)}
        return Block(length, block.open_id, block.close_id, Lines(sizes, self.vocabulary.newline))

    def allowed_grids(self, modality: str) -> tuple[Grid, ...]:
        return tuple(self._lines(modality).sizes)

    def fitting_grid(self, modality: str, height: int, width: int) -> Grid:
        """Of the grids without room for a unit more on both sides, the one in which a crop keeps most of the picture.

        Of equally good ones it is the largest. Smaller grids would give area away for a ratio that is a little nearer.
        """
        side, per = self.grids[modality][0], self.codes_per_unit
        full = [(h, w) for h, w in self._lines(modality).sizes if (h + per) * (w + per) > side * side]

        def kept(grid: tuple[int, int]) -> float:
            sides = grid[0] * width, grid[1] * height
            return min(sides) / max(sides)

        return max(full, key=kept)  # the first of equal ones, and the largest come first

    def lay_out(self, run: Run) -> np.ndarray:
        """The rows of codes, each with its newline."""
        if run.grid is None:
            raise SequenceError(f"a run of {run.modality} codes must have a grid in the format lumina")
        newline = np.full((run.grid[0], 1), self.vocabulary.newline, dtype=np.int64)
        return np.concatenate([run.ids.reshape(run.grid), newline], axis=1).reshape(-1)

    def _inside(self, run: Run) -> np.ndarray:
        rows = self.lay_out(run)
        assert run.grid is not None
        return np.concatenate([self.size_lead(run.modality, run.grid), rows]).astype(np.int64)

    def _read_inside(self, ids: np.ndarray) -> Run:
        grid = self.grid_of(ids[:2])
        if grid is None:
            raise SequenceError("begin-image must be followed by the tokens of a height and a width")
        self.size_lead("image", grid)
        height, width = grid
        if len(ids) != 2 + height * (width + 1):
            raise SequenceError(
                f"{len(ids) - 2} tokens stand between the sizes and end-image; {height} rows of {width} codes and a "
                f"newline have {height * (width + 1)}"
            )
        rows = ids[2:].reshape(height, width + 1)
        if (missing := np.flatnonzero(rows[:, -1] != self.vocabulary.newline)).size:
            raise SequenceError(f"row {missing[0]} of an image does not end with a newline")
        codes = rows[:, :-1].reshape(-1)
        if not self.vocabulary.contains("image", codes).all():
            stray = self.vocabulary.name(int(codes[~self.vocabulary.contains("image", codes)][0]))
            raise SequenceError(f"{stray} can not stand among image codes")
        return Run("image", codes, grid)

    def grid_of(self, sizes: Sequence[int] | np.ndarray) -> Grid | None:
        """The grid of codes that the tokens of a height and a width say, whether or not it is allowed."""
        units = [self.vocabulary.size_units(int(token)) for token in sizes]
        if len(units) != 2 or units[0] is None or units[1] is None:
            return None
        return units[0] * self.codes_per_unit, units[1] * self.codes_per_unit

    def _lines(self, modality: str) -> Lines:
        lines = self.blocks[modality].lines
        assert lines is not None
        return lines
