"""The memory that documents are retrieved from: their vectors, keys and tokens, and an index over the vectors.

manifest.json
part_00000.vectors.npy (float32, documents x dim)  part_00000.modalities.npy (uint8: 1 has text, 2 has image, 3 both)
part_00000.keys.npy (uint8, UTF-8 of all keys)  part_00000.key_offsets.npy (int64, documents + 1)
part_00000.tokens.npy (uint16 or uint32)  part_00000.token_offsets.npy (int64, documents x variants + 1)
index_00001.faiss (over the first 1 part; the manifest names it)

The index has a new name each time, and the manifest, which is written last, says which one counts: a reader finds the
old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.manifests import MANIFEST_NAME, check_file, read_manifest, reading
from mixmodal.ragged import RaggedArray, RaggedShard, Strings, map_npy
from mixmodal.retrieval.index import check_fits, read_index, search_index

FORMAT_VERSION = 2
KEYS = ("encoder", "encoder_identity", "dim", "tokens", "parts", "index")
"""What the manifest holds beside its version."""
FILE_KINDS = ("vectors", "modalities", "keys", "key_offsets", "tokens", "token_offsets")
READ_KINDS = ("keys", "key_offsets", "tokens", "token_offsets")
"""What is needed where documents are read by number and nothing is searched for, as in training."""
TOKEN_KEYS = (
    "vocabulary_digest",
    "sequence_format",
    "text_tokenizer_sha256",
    "image_tokenizer_sha256",
    "num_variants",
)
"""What the section `tokens` of the manifest holds, as in the manifest of token shards."""
HAS_TEXT, HAS_IMAGE = 1, 2
REMEDY = "index again"
WHAT = "a memory"
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

    Keys, tokens and their lengths stay on disk, in pages that processes share, so that ranks that only read documents
    hold nothing for each of them.

    Attributes:
        num_variants: spellings of a document; the first has its pictures as they are.
        encoder: where the encoder of its vectors is found: a hub id, or the folder that it was loaded from; where that
            is gone, the one that lies to the memory as it did, so that both may be moved together.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], index: Any | None) -> None:
        self.folder, self.manifest = folder, manifest
        self.dim: int = manifest["dim"]
        self.num_variants: int = manifest["tokens"]["num_variants"]
        moved = folder / manifest.get("encoder_relative", "")
        gone = "encoder_relative" in manifest and not Path(manifest["encoder"]).is_dir()
        self.encoder: str = str(moved) if gone and moved.is_dir() else manifest["encoder"]
        self._names = [part["name"] for part in manifest["parts"]]
        self._starts = np.cumsum([0, *(part["documents"] for part in manifest["parts"])])
        self._tokens = RaggedArray([_map_rows(folder, name, "tokens", "token_offsets") for name in self._names])
        self._index = index

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is retrieved: the documents with their vectors and tokens; the index is left out."""
        content = {key: self.manifest[key] for key in ("encoder_identity", "tokens", "parts")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def keys(self) -> Strings:
        """The key of each document."""
        return Strings(RaggedArray([_map_rows(self.folder, name, "keys", "key_offsets") for name in self._names]))

    @cached_property
    def modalities(self) -> np.ndarray:
        """Bits HAS_TEXT and HAS_IMAGE of each document, uint8 `(documents,)`, in memory."""
        return np.concatenate([map_part(self.folder, name, "modalities") for name in self._names])

    @cached_property
    def _vectors(self) -> list[np.ndarray]:
        return [map_part(self.folder, name, "vectors", num_dims=2, kinds="f") for name in self._names]

    @property
    def num_tokens(self) -> int:
        """Of all documents in all variants."""
        return self._tokens.num_values

    def length(self, number: int, variant: int = 0) -> int:
        """Tokens of a document in one of its variants.

        Raises:
            IndexError: where there is no such document or variant.
        """
        return self._tokens.length(self._row(number, variant))

    def ids(self, number: int, variant: int = 0) -> np.ndarray:
        """The tokens of a document in one of its variants, int64 `(T,)`.

        Raises:
            IndexError: where there is no such document or variant.
        """
        return self._tokens[self._row(number, variant)].astype(np.int64)

    def _row(self, number: int, variant: int) -> int:
        if not (0 <= number < len(self) and 0 <= variant < self.num_variants):
            raise IndexError(
                f"{self.folder}: no document {number}, variant {variant}; there are {len(self)} of {self.num_variants}"
            )
        return number * self.num_variants + variant

    def check_like(self, manifest: Mapping[str, Any]) -> None:
        """Whether the documents are spelled as token shards are, by the same tokenizers.

        Args:
            manifest: of the token shards.

        Raises:
            ValueError: naming the manifest of the memory and the key that differs.
        """
        wanted = {key: manifest[key] for key in TOKEN_KEYS if key != "num_variants"}
        check_section(self.folder / MANIFEST_NAME, self.manifest["tokens"], wanted)

    def check_tokens(
        self,
        *,
        vocabulary_digest: str,
        sequence_format: Mapping[str, Any],
        text_tokenizer_sha256: str | None = None,
        image_tokenizer_sha256: str | None = None,
    ) -> None:
        """Whether the documents are spelled in this vocabulary and format, by these tokenizers where they are given.

        Args:
            sequence_format: `SequenceFormat.settings`, as in the manifest of token shards.

        Raises:
            ValueError: naming the manifest and the key that differs.
        """
        grids = {modality: list(grid) for modality, grid in sequence_format["grids"].items()}
        wanted = {
            "vocabulary_digest": vocabulary_digest,
            "sequence_format": {**sequence_format, "grids": grids},
            "text_tokenizer_sha256": text_tokenizer_sha256,
            "image_tokenizer_sha256": image_tokenizer_sha256,
        }
        check_section(self.folder / MANIFEST_NAME, self.manifest["tokens"], wanted)

    def vectors(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of documents, float32 `(n, dim)`.

        Raises:
            IndexError: where there is no document of such a number.
        """
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.folder}: no document {wanted.max()}, there are {len(self)}")
        if len(self._vectors) == 1:
            return self._vectors[0][wanted]
        rows = np.empty((len(wanted), self.dim), np.float32)
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        order = parts.argsort(kind="stable")
        asked, firsts = np.unique(parts[order], return_index=True)
        for part, here in zip(asked.tolist(), np.split(order, firsts[1:])):
            rows[here] = self._vectors[part][wanted[here] - self._starts[part]]
        return rows

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The `k` nearest documents to each query, exact scores; fewer documents leave the last places empty.

        Args:
            queries: vectors of length 1, float32 `(queries, dim)`.

        Raises:
            ValueError: for queries of another shape, or that are not finite or not of length 1; where the memory was
                opened for reading alone.
        """
        if self._index is None:
            raise ValueError(f"{self.folder}: the memory was opened for reading alone; open it with searched=True")
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
    folder: Path | str,
    *,
    encoder_identity: str | None,
    verify: bool = True,
    mapped: bool = True,
    searched: bool = True,
) -> Memory:
    """The memory in a folder.

    Args:
        encoder_identity: of the encoder that queries come from; None is not compared, for reading alone.
        verify: read every file and compare its SHA-256 with the manifest's.
        searched: open the index as well. Otherwise documents are read by number alone, for which neither faiss nor
            index, vectors and modalities have to be there.
        mapped: leave the index on disk, in pages that processes share; else it is read into memory, which must hold it.

    Raises:
        ValueError: naming the file: no memory, an empty or unfinished one, one of another encoder, a part that is
            missing or changed, or an index that does not fit the memory of the machine.
    """
    folder = Path(folder)
    manifest = read_memory_manifest(folder)
    with reading(folder / MANIFEST_NAME, WHAT, REMEDY):
        return _open(folder, manifest, encoder_identity, verify, mapped, searched)


def _open(
    folder: Path, manifest: dict[str, Any], encoder_identity: str | None, verify: bool, mapped: bool, searched: bool
) -> Memory:
    path = folder / MANIFEST_NAME
    if encoder_identity is not None:
        check_encoder(path, manifest, encoder_identity)
    total = sum(part["documents"] for part in manifest["parts"])
    if not total:
        raise ValueError(f"{path}: the memory is empty; {REMEDY}")
    entry = manifest["index"]
    if not searched:
        for part in manifest["parts"]:
            check_part(folder, part, verify, READ_KINDS)
        return Memory(folder, manifest, None)
    if entry is None or entry["documents"] != total:
        covered = entry["documents"] if entry else 0
        raise ValueError(f"{path}: the index covers {covered} of {total} documents, so the job broke off; {REMEDY}")
    for part in manifest["parts"]:
        check_part(folder, part, verify)
    check_file(folder / entry["file"], entry["sha256"] if verify else None, REMEDY)
    if not mapped:
        size = (folder / entry["file"]).stat().st_size
        check_fits(size, f"{folder / entry['file']}", "open it with mapped=True")
    return Memory(folder, manifest, read_index(folder / entry["file"], mapped))


def read_memory_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a memory.

    Raises:
        ValueError: naming it, where it is missing or something else.
    """
    manifest = read_manifest(folder, WHAT, version=FORMAT_VERSION, keys=KEYS, remedy=REMEDY)
    with reading(folder / MANIFEST_NAME, WHAT, REMEDY):
        missing = sorted(set(TOKEN_KEYS) - set(manifest["tokens"]))
    if missing:
        raise ValueError(f"{folder / MANIFEST_NAME}: the key tokens.{missing[0]} is missing; {REMEDY}")
    return manifest


def check_section(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whether a memory's section `tokens` is as wanted; what is None is not compared.

    Raises:
        ValueError: naming the manifest, the key and both values.
    """
    for key, value in wanted.items():
        if value is not None and found[key] != value:
            name = "number of variants" if key == "num_variants" else key.rsplit("_", 1)[0].replace("_", " ")
            name = "sequence format" if key == "sequence_format" else name
            raise ValueError(
                f"{path}: tokens.{key} is {_short(found[key])}, not {_short(value)}: the memory was built with another "
                f"{name}; give token shards like those that it was built of, or {REMEDY} into another folder"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)


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


def check_part(folder: Path, part: Mapping[str, Any], verify: bool = True, kinds: Sequence[str] = FILE_KINDS) -> None:
    """Whether the files of a part are there, and with `verify` are those that were written.

    Raises:
        ValueError: naming the file.
    """
    for kind in kinds:
        check_file(part_path(folder, part["name"], kind), part["sha256"][kind] if verify else None, REMEDY)


def part_path(folder: Path, name: str, kind: str) -> Path:
    """The file of a part that holds what `kind` names, one of FILE_KINDS."""
    return folder / f"{name}.{kind}.npy"


def map_part(folder: Path, name: str, kind: str, **wanted: Any) -> np.ndarray:
    """The array in a file of a part, memory-mapped."""
    return map_npy(part_path(folder, name, kind), **wanted, remedy=REMEDY)


def _map_rows(folder: Path, name: str, values: str, offsets: str) -> RaggedShard:
    """The rows of a part."""
    mapped, ends = map_part(folder, name, values), map_part(folder, name, offsets)
    return RaggedShard(part_path(folder, name, values), mapped, ends, REMEDY)
