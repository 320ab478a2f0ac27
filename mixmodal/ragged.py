"""Ragged arrays: rows of any length by index, stored as flat values and offsets in memory-mapped .npy files."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

UTF8 = ("utf-8", "surrogatepass")
"""Names of files that are no UTF-8 come as lone surrogates, which must come back as they are."""
INTEGERS = "iu"


def offsets_of(rows: Sequence[Sized]) -> np.ndarray:
    """Where each row begins in the flat values, and where the last one ends: int64 `(rows + 1,)`."""
    return np.fromiter(chain([0], map(len, rows)), np.int64, len(rows) + 1).cumsum()


def encode_strings(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all strings, uint8, and the offsets; `Strings` gives them back."""
    encoded = [string.encode(*UTF8) for string in strings]
    return np.frombuffer(b"".join(encoded), np.uint8), offsets_of(encoded)


def map_npy(path: Path, *, num_dims: int = 1, kinds: str = INTEGERS, remedy: str = "write it again") -> np.ndarray:
    """The array in a file, memory-mapped and not writable; nothing but its header is read.

    `np.load` would keep the file open as long as it is mapped, and thousands of shards are more than a process may
    hold open. The mapping is private: a shared one of torch's asks for the right to write.

    Args:
        num_dims: how many dimensions it must have.
        kinds: of its type, as numpy abbreviates them: `iu` are integers, `f` floats.
        remedy: what the message of an error tells the user to do.

    Raises:
        ValueError: naming the file, where it is missing or holds something else.
    """
    import torch

    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the .npy format")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        if len(shape) != num_dims or dtype.kind not in kinds or fortran_order:
            raise ValueError(f"shape {shape} and type {dtype} instead of {num_dims} dimensions of kind {kinds}")
        size = start + math.prod(shape) * dtype.itemsize
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: missing or broken ({error}); {remedy}") from error
    data.flags.writeable = False
    return data[start:].view(dtype).reshape(shape)


class RaggedShard(NamedTuple):
    """Some of the rows of a `RaggedArray`.

    Args:
        path: of the values, for messages.
        values: of all its rows, one behind the other.
        offsets: see `offsets_of`.
        remedy: what the message of an error tells the user to do.
    """

    path: Path
    values: np.ndarray
    offsets: np.ndarray
    remedy: str = "write it again"


class RaggedArray:
    """Rows by index, over all shards; a row is read from disk when it is asked for."""

    def __init__(self, shards: Sequence[RaggedShard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> np.ndarray:
        """The values of a row, as they are mapped; `index` in 0 .. rows - 1.

        Raises:
            ValueError: naming the file, where the offsets do not lie in the values.
        """
        shard, row = self.place(index)
        path, values, offsets, remedy = self._shards[shard]
        start, stop = offsets[row : row + 2].tolist()
        if not 0 <= start <= stop <= len(values):
            raise ValueError(f"{path}: row {row} at {start} .. {stop} of {len(values)} values; {remedy}")
        return values[start:stop]

    def place(self, index: int) -> tuple[int, int]:
        """The number of a row's shard, and of the row in it."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def shard(self, index: int) -> RaggedShard:
        """The shard that a row is in."""
        return self._shards[self.place(index)[0]]

    def length(self, index: int) -> int:
        """Values of one row, by its offsets alone."""
        shard, row = self.place(index)
        start, stop = self._shards[shard].offsets[row : row + 2].tolist()
        return stop - start

    @property
    def num_values(self) -> int:
        """Of all rows."""
        return sum(len(shard.values) for shard in self._shards)

    def lengths(self) -> np.ndarray:
        """Values of each row, uint32 `(rows,)`, in memory."""
        lengths = np.empty(len(self), np.uint32)
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            part = lengths[start : start + len(shard.offsets) - 1]
            np.subtract(shard.offsets[1:], shard.offsets[:-1], out=part, casting="unsafe")
        return lengths


class Strings(Sequence[str]):
    """The rows of a ragged array of bytes as strings; see `encode_strings`."""

    def __init__(self, rows: RaggedArray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int, /) -> str: ...

    @overload
    def __getitem__(self, index: slice, /) -> list[str]: ...

    def __getitem__(self, index: int | slice, /) -> str | list[str]:
        """The string, or the list of them.

        Raises:
            ValueError: naming the file, where the bytes are no UTF-8.
        """
        found = range(len(self._rows))[index]
        return self._decode(found) if isinstance(found, int) else [self._decode(row) for row in found]

    def _decode(self, index: int) -> str:
        data = self._rows[index].tobytes()
        try:
            return data.decode(*UTF8)
        except UnicodeDecodeError as error:
            shard = self._rows.shard(index)
            raise ValueError(f"{shard.path}: damaged ({error}); {shard.remedy}") from error
