"""CIFAR, MNIST and STL-10 as they are distributed: many pictures in one file of raw bytes."""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MAX_BYTES = 1 << 28
"""Of a file that is read whole, unpacked; the largest of these sets' is 31 MB. Others are mapped."""
TAMPERED = (
    *(pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, IndexError, AttributeError, MemoryError),
    *(struct.error, OverflowError, RecursionError),
)


class Pixels(NamedTuple):
    """A picture of a packed file: (H, W) or (H, W, 3), uint8."""

    array: np.ndarray

    def open(self, max_pixels: int) -> Image.Image:
        """To RGB; these pictures are small, and `max_pixels` can not be exceeded."""
        return Image.fromarray(np.ascontiguousarray(self.array)).convert("RGB")


class Packed(NamedTuple):
    """Pictures, uint8 (N, ...), numbers of their classes, int (N,), names, and what makes (H, W[, 3]) of a row."""

    pictures: np.ndarray
    numbers: Sequence[int]
    names: Sequence[str]
    arrange: Callable[[np.ndarray], np.ndarray]

    def pairs(self) -> Iterator[tuple[Pixels, str]]:
        """Each picture with the name of its class."""
        for row, number in zip(self.pictures, self.numbers, strict=True):
            yield Pixels(self.arrange(row)), self.names[number]


class _Type:
    """Stands for numpy's dtype: a pickle runs none of numpy's code."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy's ndarray."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def build(self) -> np.ndarray:
        _, shape, kind, is_fortran, data = self.state
        if not isinstance(kind, _Type) or kind.name not in ("u1", "|u1") or is_fortran:
            raise ValueError("its pictures are not rows of bytes")
        raw = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(raw, np.uint8).reshape(shape)


ADMITTED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which such files do not hold")
        return ADMITTED[module_name, global_name]


def read_bytes(path: Path) -> bytes:
    """The whole of a file, unpacked where its name ends in `.gz`.

    Raises:
        ValueError: naming it, where it is missing, broken or above MAX_BYTES.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: it can not be read ({error})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: it holds more than {MAX_BYTES} bytes")
    return data


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of plain values and byte arrays; nothing that it names is called.

    Raises:
        ValueError: naming the file, where it is broken or asks for anything else.
    """
    data = read_bytes(path)
    try:
        for code, argument, _ in pickletools.genops(data):  # a memo of billions of places fits in a few bytes
            if "PUT" in code.name and isinstance(argument, int) and argument > len(data):
                raise ValueError(f"it writes to place {argument} of its memo")
        found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(found, dict):
            raise ValueError("it holds no dictionary")
        return {key: one.build() if isinstance(one, _Array) else one for key, one in found.items()}
    except TAMPERED as error:
        raise ValueError(f"{path}: this pickle is refused, {error}") from error


def read_names(path: Path) -> list[str]:
    """Lines that are not empty.

    Raises:
        ValueError: naming the file, where it is missing or not UTF-8.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the file is not UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def read_cifar_pickle(data: Path, meta: Path, labels: str, names: str) -> Packed:
    """The python version of CIFAR.

    Raises:
        ValueError: naming the file, where it is not that.
    """
    found, known = read_pickle(data), read_pickle(meta).get(names)
    rows, numbers = found.get("data"), found.get(labels)
    if not isinstance(known, list) or not all(isinstance(one, str) for one in known):
        raise ValueError(f"{meta}: it holds no list {names!r}")
    if not isinstance(rows, np.ndarray) or rows.shape[1:] != (3072,) or not isinstance(numbers, list):
        raise ValueError(f"{data}: it holds no {labels!r}, or no 'data' of rows of 3,072 bytes")
    if not all(type(one) is int for one in numbers):
        raise ValueError(f"{data}: its {labels!r} are not whole numbers")
    return _check(Packed(rows, numbers, known, _arrange_cifar), data)


def read_cifar_binary(data: Path, names: Path, num_labels: int) -> Packed:
    """The binary version of CIFAR: of each picture its labels, the finest last, and 3,072 bytes; the file is mapped.

    Raises:
        ValueError: naming the file, where it is not that.
    """
    rows = _map(data, num_labels + 3072)
    return _check(
        Packed(rows[:, num_labels:], rows[:, num_labels - 1].tolist(), read_names(names), _arrange_cifar), data
    )


def read_stl(data: Path, labels: Path, names: Path) -> Packed:
    """STL-10: (N, 3, 96, 96) with columns before rows, and labels from 1.

    Raises:
        ValueError: naming the file, where it is not that.
    """
    numbers = np.frombuffer(read_bytes(labels), np.uint8).astype(int) - 1
    packed = Packed(_map(data, 27648), numbers.tolist(), read_names(names), lambda row: row.reshape(3, 96, 96).T)
    return _check(packed, data)


def read_idx(data: Path, labels: Path) -> Packed:
    """MNIST and its like: big-endian sizes, then bytes. The files have no names: these are the numbers.

    Raises:
        ValueError: naming the file, where it is not that.
    """
    numbers = _parse_idx(labels, 1).tolist()
    names = [str(number) for number in range(max([9, *numbers]) + 1)]
    return _check(Packed(_parse_idx(data, 3), numbers, names, np.asarray), data)


def _parse_idx(path: Path, num_axes: int) -> np.ndarray:
    raw = read_bytes(path)
    start = 4 + 4 * num_axes
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, num_axes]):
        raise ValueError(f"{path}: it does not begin as an IDX file of bytes with {num_axes} axes")
    sizes = [int.from_bytes(raw[place : place + 4], "big") for place in range(4, start, 4)]
    wanted = 1
    for size in sizes:
        wanted *= size
    if wanted != len(raw) - start or not wanted:
        raise ValueError(f"{path}: it tells of {wanted} bytes and holds {len(raw) - start}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def _map(path: Path, size: int) -> np.ndarray:
    """Rows of `size` bytes."""
    if not path.is_file() or not path.stat().st_size or path.stat().st_size % size:
        raise ValueError(f"{path}: it is missing, empty or cut off; it must hold whole records of {size} bytes")
    return np.memmap(path, np.uint8, "r").reshape(-1, size)


def _arrange_cifar(row: np.ndarray) -> np.ndarray:
    return row.reshape(3, 32, 32).transpose(1, 2, 0)


def _check(packed: Packed, path: Path) -> Packed:
    if len(packed.pictures) != len(packed.numbers):
        raise ValueError(f"{path}: it has {len(packed.pictures)} pictures and {len(packed.numbers)} labels")
    if not all(0 <= number < len(packed.names) for number in packed.numbers):
        raise ValueError(f"{path}: a label is beyond the {len(packed.names)} names of classes")
    return packed
