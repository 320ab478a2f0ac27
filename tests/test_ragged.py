"""Rows and strings come back from disk as they were written, by index, and damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmodal.ragged import RaggedArray, RaggedShard, Strings, encode_strings, map_npy, offsets_of

ODD = ["", "a\nb\r\n", "\0", "\x1b[31m", "caf\u00e9", "\u65e5\u672c", "\U0001f34e", "\ud800", "\udc80x", "#", ""]
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(ODD)


def write(folder: Path, name: str, strings: list[str]) -> RaggedShard:
    paths = folder / f"{name}.npy", folder / f"{name}_offsets.npy"
    for path, array in zip(paths, encode_strings(strings), strict=True):
        np.save(path, array)
    return RaggedShard(paths[0], *map(map_npy, paths))


def strings_of(folder: Path, shards: list[list[str]]) -> Strings:
    return Strings(RaggedArray([write(folder, str(number), shard) for number, shard in enumerate(shards)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strings")


@settings(max_examples=50)
@given(shards=st.lists(st.lists(ANY_TEXT, max_size=5), max_size=3))
def test_any_strings_come_back_as_they_were(folder: Path, shards: list[list[str]]) -> None:
    strings = strings_of(folder, shards)
    wanted = [string for shard in shards for string in shard]
    assert list(strings) == wanted
    assert [strings[index] for index in range(len(strings))] == wanted


def test_strings_are_a_sequence(tmp_path: Path) -> None:
    strings = strings_of(tmp_path, [ODD[:4], [], ODD[4:]])
    assert len(strings) == len(ODD)
    assert list(strings) == ODD
    assert strings[-3] == ODD[-3]
    assert strings[2:7] == ODD[2:7]
    assert strings[::-2] == ODD[::-2]
    assert strings[np.int64(4)] == ODD[4]
    for index in (len(ODD), -len(ODD) - 1):
        with pytest.raises(IndexError):
            strings[index]


def test_rows_and_lengths_are_those_written(tmp_path: Path) -> None:
    rows = [np.arange(length, dtype=np.uint16) for length in (3, 0, 5, 1)]
    shards = []
    for number, part in enumerate((rows[:2], [], rows[2:])):
        path = tmp_path / f"{number}.npy"
        np.save(path, np.concatenate([*part, np.empty(0, np.uint16)]))
        shards.append(RaggedShard(path, map_npy(path), offsets_of(part)))
    ragged = RaggedArray(shards)
    assert [row.tolist() for row in map(ragged.__getitem__, range(len(ragged)))] == [row.tolist() for row in rows]
    assert ragged[0].dtype == np.uint16
    assert ragged.lengths().tolist() == [3, 0, 5, 1]
    assert ragged.lengths().dtype == np.uint32
    assert [ragged.length(row) for row in range(4)] == [3, 0, 5, 1]
    assert ragged.num_values == 9


def test_arrays_of_more_dimensions_come_back_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "some.npy"
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(path, array)
    assert np.array_equal(map_npy(path, num_dims=2, kinds="f"), array)
    for wrong in ({"num_dims": 2}, {"kinds": "f"}):
        with pytest.raises(ValueError, match=r"some\.npy: missing or broken \(shape \(4, 3\) .*; measure again"):
            map_npy(path, **wrong, remedy="measure again")
    np.save(path, np.asfortranarray(array))
    with pytest.raises(ValueError, match=r"some\.npy: missing or broken"):
        map_npy(path, num_dims=2, kinds="f")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_mapped_files_are_not_held_open_nor_writable(tmp_path: Path) -> None:
    np.save(tmp_path / "some.npy", np.arange(10))
    before = len(os.listdir("/proc/self/fd"))
    arrays = [map_npy(tmp_path / "some.npy") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(array.tolist() == list(range(10)) for array in arrays)
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "some.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    broken = {"short": whole[:-1], "header": whole[:20], "empty": b"", "other": b"x" * 200}
    broken["new"] = whole[:6] + b"\3\0" + whole[8:]
    for name, data in broken.items():
        (tmp_path / f"{name}.npy").write_bytes(data)
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int64))
    np.save(tmp_path / "floats.npy", np.zeros(2))
    np.save(tmp_path / "objects.npy", np.array([None]))
    for name in (*broken, "square", "floats", "objects", "absent"):
        with pytest.raises(ValueError, match=rf"{name}\.npy: missing or broken .*write it again"):
            map_npy(tmp_path / f"{name}.npy")


def test_damaged_strings_are_named_when_they_are_read(tmp_path: Path) -> None:
    path, values, offsets, _ = write(tmp_path, "some", ["one", "two", "three"])
    for row, wrong in ((0, -1), (1, 7), (2, 2), (3, 12)):
        changed = offsets.copy()
        changed[row] = wrong
        strings = Strings(RaggedArray([RaggedShard(path, values, changed)]))
        with pytest.raises(ValueError, match=r"some\.npy: row \d at -?\d+ \.\. \d+ of 11 values"):
            list(strings)
    changed = values.copy()
    changed[4] = 0xFF
    strings = Strings(RaggedArray([RaggedShard(path, changed, offsets)]))
    assert strings[2] == "three"
    with pytest.raises(ValueError, match=r"some\.npy: damaged .*byte 0xff.* write it again"):
        strings[1]
