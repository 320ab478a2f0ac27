"""The memory that documents are retrieved from: vectors and keys of all documents, and an index over the vectors.

manifest.json
part_00000.vectors.npy (float32, documents x dim)  part_00000.modalities.npy (uint8: 1 has text, 2 has image, 3 both)
part_00000.keys.npy (uint8, UTF-8 of all keys)  part_00000.key_offsets.npy (int64, documents + 1)
index_00001.faiss (over the first 1 part; the manifest names it)

The index has a new name each time, and the manifest, which is written last, says which one counts: a reader finds the
old state or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.files import sha256_of
from mixmodal.ragged import RaggedArray, RaggedShard, Strings, map_npy
from mixmodal.retrieval.index import check_fits, read_index, search_index

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
FILE_KINDS = ("vectors", "modalities", "keys", "key_offsets")
HAS_TEXT, HAS_IMAGE = 1, 2
REMEDY = "index again"
UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a vector may be; those of float32 are within 1e-6, those of float16 within 1e-3."""


class Found(NamedTuple):
    """What a search finds, best first.

    Args:
        scores: inner products with the documents' vectors, float32 `(queries, k)`; -inf where there is no document.
        numbers: of the documents, int64 `(queries, k)`; -1 where there is none.
    """

    scores: np.ndarray
    numbers: np.ndarray


class Memory:
    """Documents by number, and the nearest ones to a query; see `open_memory`.

    Attributes:
        keys: key of each document, read from disk when it is asked for.
        modalities: uint8 `(documents,)`: bits HAS_TEXT and HAS_IMAGE.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], index: Any) -> None:
        self.folder, self.manifest = folder, manifest
        self.dim: int = manifest["dim"]
        names = [part["name"] for part in manifest["parts"]]
        self._vectors = [map_part(folder, name, "vectors", num_dims=2, kinds="f") for name in names]
        self._starts = np.cumsum([0, *map(len, self._vectors)])
        self.keys = Strings(RaggedArray([map_keys(folder, name) for name in names]))
        self.modalities = np.concatenate([map_part(folder, name, "modalities") for name in names])
        self._index = index

    def __len__(self) -> int:
        return int(self._starts[-1])

    def vectors(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of documents, float32 `(n, dim)`.

        Raises:
            IndexError: where there is no document of such a number.
        """
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.folder}: no document {wanted.max()}, there are {len(self)}")
        rows = np.empty((len(wanted), self.dim), np.float32)
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        for part in np.unique(parts):
            here = parts == part
            rows[here] = self._vectors[part][wanted[here] - self._starts[part]]
        return rows

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The `k` nearest documents to each query, exact scores; fewer documents leave the last places empty.

        Args:
            queries: vectors of length 1, float32 `(queries, dim)`.

        Raises:
            ValueError: for queries of another shape, or that are not finite or not of length 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries of shape {queries.shape}; {self.folder} has vectors of {self.dim} dimensions")
        wrong = find_wrong(queries)
        if wrong is not None:
            raise ValueError(f"query {wrong[0]}: {wrong[1]}")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        settings = self.manifest["index"]["search"]
        queries = np.ascontiguousarray(queries, np.float32)
        rerank = settings.get("rerank")
        found = Found(*search_index(self._index, queries, max(k, rerank or 0), settings))
        found = self._rerank(queries, found) if rerank else found
        return Found(np.where(found.numbers < 0, -np.inf, found.scores)[:, :k], found.numbers[:, :k])

    def _rerank(self, queries: np.ndarray, found: Found) -> Found:
        """The same documents by their exact scores; those of codes are approximate."""
        scores = np.full(found.numbers.shape, -np.inf, np.float32)
        for row, query in enumerate(queries):
            there = found.numbers[row] >= 0
            scores[row, there] = self.vectors(found.numbers[row, there]) @ query
        order = np.argsort(-scores, axis=1, kind="stable")
        return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(found.numbers, order, 1))


def find_wrong(vectors: np.ndarray) -> tuple[int, str] | None:
    """The first row that is no unit vector, and what is wrong with it; None where all are."""
    lengths = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
    if not len(wrong):
        return None
    row = int(wrong[0])
    if not np.isfinite(vectors[row]).all():
        return row, "the vector holds NaN or infinity"
    return row, f"the vector has length {lengths[row]:.4g} instead of 1"


def open_memory(
    folder: Path | str, *, encoder_identity: str | None, verify: bool = True, mapped: bool = True
) -> Memory:
    """The memory in a folder, ready to be searched.

    Args:
        encoder_identity: of the encoder that queries come from; None is not compared, for reading alone.
        verify: read every file and compare its SHA-256 with the manifest's.
        mapped: leave the index on disk, in pages that processes share; else it is read into memory, which must hold it.

    Raises:
        ValueError: naming the file: no memory, an empty or unfinished one, one of another encoder, a part that is
            missing or changed, or an index that does not fit the memory of the machine.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / MANIFEST_NAME
    if encoder_identity is not None:
        check_encoder(path, manifest, encoder_identity)
    total = sum(part["documents"] for part in manifest["parts"])
    if not total:
        raise ValueError(f"{path}: the memory is empty; {REMEDY}")
    entry = manifest["index"]
    if entry is None or entry["documents"] != total:
        covered = entry["documents"] if entry else 0
        raise ValueError(f"{path}: the index covers {covered} of {total} documents, so the job broke off; {REMEDY}")
    for part in manifest["parts"]:
        check_part(folder, part, verify)
    check_file(folder / entry["file"], entry["sha256"] if verify else None)
    if not mapped:
        size = (folder / entry["file"]).stat().st_size
        check_fits(size, f"{folder / entry['file']}", "open it with mapped=True")
    return Memory(folder, manifest, read_index(folder / entry["file"], mapped))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a memory.

    Raises:
        ValueError: naming it, where it is missing or something else.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, so {folder} holds no memory; {REMEDY}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the manifest of a memory ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, this version reads {FORMAT_VERSION}; {REMEDY}")
    missing = sorted({"encoder_identity", "dim", "parts", "index"} - set(manifest))
    if missing:
        raise ValueError(f"{path}: the key {missing[0]} is missing; {REMEDY}")
    return manifest


def check_encoder(path: Path, manifest: Mapping[str, Any], encoder_identity: str) -> None:
    """Whether a memory is of this encoder.

    Raises:
        ValueError: naming the manifest and both.
    """
    found = manifest["encoder_identity"]
    if found != encoder_identity:
        raise ValueError(
            f"{path}: encoder_identity is {found[:12]}..., not {encoder_identity[:12]}...: the memory was built with "
            f"another encoder; give that one, or {REMEDY} into another folder"
        )


def check_part(folder: Path, part: Mapping[str, Any], verify: bool = True) -> None:
    """Whether the files of a part are there, and with `verify` are those that were written.

    Raises:
        ValueError: naming the file.
    """
    for kind in FILE_KINDS:
        check_file(part_path(folder, part["name"], kind), part["sha256"][kind] if verify else None)


def check_file(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {path.parent / MANIFEST_NAME} names it; bring it back or {REMEDY}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise ValueError(
            f"{path}: changed since it was written (SHA-256 {found[:12]}..., not {sha256[:12]}... as in "
            f"{path.parent / MANIFEST_NAME}); bring it back or {REMEDY}"
        )


def part_path(folder: Path, name: str, kind: str) -> Path:
    """The file of a part that holds what `kind` names, one of FILE_KINDS."""
    return folder / f"{name}.{kind}.npy"


def map_part(folder: Path, name: str, kind: str, **wanted: Any) -> np.ndarray:
    """The array in a file of a part, memory-mapped."""
    return map_npy(part_path(folder, name, kind), **wanted, remedy=REMEDY)


def map_keys(folder: Path, name: str) -> RaggedShard:
    """The keys of a part, for `Strings`."""
    values, offsets = (map_part(folder, name, kind) for kind in ("keys", "key_offsets"))
    return RaggedShard(part_path(folder, name, "keys"), values, offsets, REMEDY)
