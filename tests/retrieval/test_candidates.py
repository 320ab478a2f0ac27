"""Candidates are stored whole, found again by sample, and refused where they are another memory's or another's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixmodal.retrieval.candidates import CandidateStore, CandidateWriter, open_candidates

MEMORY: Any = SimpleNamespace(digest="m" * 64, folder=Path("memory"))
TOKENS = "t" * 64
SETTINGS: dict[str, Any] = {
    "memory_digest": MEMORY.digest,
    "tokens_digest": TOKENS,
    "num_documents": 5,
    "num_candidates": 2,
    "selection": {"max_score": 0.9, "kinds": (1, 2)},
    "query_dropout": 0.2,
    "seed": 0,
}
ROWS = np.array(
    [[[4, 2], [7, -1]], [[-1, -1], [-1, -1]], [[1, -1], [-1, -1]], [[-1, -1], [3, 0]], [[9, 8], [0, 6]]], np.int64
)


def write(folder: Path, ends: tuple[int, ...] = (3, 5)) -> None:
    writer = CandidateWriter(folder, SETTINGS)
    for number, (start, stop) in enumerate(zip((0, *ends), ends)):
        writer.write_part(number, ROWS[start:stop], {"queries": 2 * (stop - start)})


def read(folder: Path, memory: Any = MEMORY, tokens: str = TOKENS) -> CandidateStore:
    return open_candidates(folder, memory=memory, tokens_digest=tokens)


@pytest.mark.parametrize("ends", [(3, 5), (5,), (1, 2, 3, 4, 5)])
def test_candidates_come_back_by_sample(tmp_path: Path, ends: tuple[int, ...]) -> None:
    write(tmp_path, ends)
    store = read(tmp_path)
    assert len(store) == 5
    assert [[numbers.tolist() for numbers in store[sample]] for sample in range(5)] == [
        [[4, 2], [7]],
        [[], []],
        [[1], []],
        [[], [3, 0]],
        [[9, 8], [0, 6]],
    ]
    assert store[0].text.dtype == np.int64
    for sample in (-1, 5):
        with pytest.raises(IndexError, match="no sample"):
            store[sample]


def test_a_digest_names_what_is_stored(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "same")
    assert len(read(tmp_path / "one").digest) == 64
    assert read(tmp_path / "one").digest == read(tmp_path / "same").digest
    CandidateWriter(tmp_path / "same", SETTINGS).write_part(1, ROWS[:2], {"queries": 4})
    assert read(tmp_path / "one").digest != read(tmp_path / "same").digest


def test_what_does_not_belong_to_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json: no such file, so .* holds no candidates; retrieve again"):
        read(tmp_path)
    write(tmp_path, (3,))
    with pytest.raises(
        ValueError, match=r"manifest\.json: it has candidates of 3 of 5 documents, so the job broke off"
    ):
        read(tmp_path)
    write(tmp_path)
    other = SimpleNamespace(digest="n" * 64, folder=Path("other"))
    with pytest.raises(ValueError, match=r"json: memory_digest is m{12}\.\.\., not n{12}.* another memory than other"):
        read(tmp_path, memory=other)
    with pytest.raises(ValueError, match=r"json: tokens_digest is t{12}\.\.\., not u{12}.* for other token shards"):
        read(tmp_path, tokens="u" * 64)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for change, message in (
        ({"format_version": 9}, "format_version is 9, this version reads 1; retrieve again"),
        ({"parts": 3}, "not the manifest of candidates"),
        ({"selection": None}, r"not the manifest of candidates \(the key selection is missing\); retrieve again"),
    ):
        found = {key: value for key, value in {**manifest, **change}.items() if value is not None}
        path.write_text(json.dumps(found))
        with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
            read(tmp_path)
    path.write_text("[1")
    with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of candidates"):
        read(tmp_path)


def test_a_missing_or_damaged_part_is_named_and_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = tmp_path / "part_00001.npy"
    path.unlink()
    with pytest.raises(ValueError, match=r"part_00001\.npy: missing, though .*manifest\.json names it"):
        read(tmp_path)
    path.write_bytes(before[path.name][:-8])
    with pytest.raises(ValueError, match=r"part_00001\.npy: changed since it was written"):
        read(tmp_path)
    writer = CandidateWriter(tmp_path, SETTINGS)
    assert [writer.is_whole(number) for number in range(3)] == [True, False, False]
    writer.write_part(1, ROWS[3:], {"queries": 4})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_job_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    write(tmp_path, (3,))
    for key, value in (("seed", 1), ("query_dropout", 0.1), ("memory_digest", "n" * 64), ("new", 1)):
        with pytest.raises(ValueError, match=rf"manifest\.json: {key} is .*, not {value}.* with other settings"):
            CandidateWriter(tmp_path, {**SETTINGS, key: value})
    CandidateWriter(tmp_path, SETTINGS).write_part(1, ROWS[3:], {"queries": 4})
    write(tmp_path / "whole")
    assert read(tmp_path).digest == read(tmp_path / "whole").digest
