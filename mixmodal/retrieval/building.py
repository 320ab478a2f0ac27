"""Building a memory: parts in a stream, each whole or absent, and the index over them; documents may be added later."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.files import replacing, sha256_of
from mixmodal.manifests import MANIFEST_NAME, write_manifest
from mixmodal.ragged import encode_strings
from mixmodal.retrieval.index import (
    IndexConfig,
    add_vectors,
    build_settings,
    check_fits,
    index_bytes,
    new_index,
    read_index,
    search_settings,
    write_index,
)
from mixmodal.retrieval.memory import (
    FILE_KINDS,
    FORMAT_VERSION,
    HAS_IMAGE,
    HAS_TEXT,
    TOKEN_KEYS,
    check_encoder,
    check_part,
    check_section,
    find_wrong,
    map_part,
    part_path,
    read_memory_manifest,
)
from mixmodal.retrieval.parts import PartsWriter
from mixmodal.retrieval.token_rows import TokenRows, Variants

Embed = Callable[[Sequence[Any]], np.ndarray]
"""Contents of documents to vectors of length 1, float32 `(n, dim)`."""


class MemoryDocument(NamedTuple):
    """A document on its way into a memory.

    Args:
        key: its name; shards of several folders may have the same ones.
        modalities: HAS_TEXT, HAS_IMAGE or both.
        content: what `embed` takes; asked for only where the document is not there yet, if it is given as a function.
        variants: its tokens, or a function that reads them, which is called more than once.
    """

    key: str
    modalities: int
    content: Any
    variants: Variants


class MemoryWriter(PartsWriter):
    """Writes the parts of a memory, and the index when they are there. Goes on with what a folder holds.

    Args:
        folder: of the memory; made with the first part.
        encoder_identity: of the encoder that the vectors come from.
        dim: of the vectors.
        tokens: what the documents are spelled with, the section `tokens` of the manifest: TOKEN_KEYS as they stand in
            the manifest of token shards.
        encoder: where the encoder was loaded from, a folder or a hub id.

    Raises:
        ValueError: where the folder holds a memory of another encoder or of other tokens, or is no memory.
    """

    def __init__(
        self, folder: Path | str, *, encoder_identity: str, dim: int, tokens: Mapping[str, Any], encoder: str
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        # as JSON gives it back, so that tuples are compared as lists
        section = json.loads(json.dumps({key: tokens[key] for key in TOKEN_KEYS}))
        new = {"format_version": FORMAT_VERSION, "encoder": encoder, "encoder_identity": encoder_identity, "dim": dim}
        new |= {"tokens": section, "index": None, "parts": []}
        self.manifest: dict[str, Any] = read_memory_manifest(self.folder) if path.exists() else new
        check_encoder(path, self.manifest, encoder_identity)
        check_section(path, self.manifest["tokens"], section)
        if self.manifest["dim"] != dim:
            raise ValueError(f"{path}: the memory has vectors of {self.manifest['dim']} dimensions, not {dim}")
        self.manifest["encoder"] = encoder  # the same one, by its identity, may stand elsewhere by now
        self.manifest.pop("encoder_relative", None)
        if Path(encoder).is_dir():
            self.manifest["encoder_relative"] = os.path.relpath(encoder, self.folder)

    @property
    def num_variants(self) -> int:
        """Rows of tokens that a document has."""
        return self.manifest["tokens"]["num_variants"]

    def _check_part(self, part: Mapping[str, Any]) -> None:
        check_part(self.folder, part)

    def check_documents(self, number: int, keys: Sequence[str], variants: Sequence[Variants]) -> None:
        """Whether a part that is there is of these documents.

        Raises:
            ValueError: naming the part, where it is not.
        """
        self._check_digests(number, _key_arrays(keys), ("keys", "key_offsets"))
        self._check_rows(number, TokenRows(keys, variants, self.num_variants))

    def write_part(
        self,
        number: int,
        keys: Sequence[str],
        vectors: np.ndarray,
        modalities: Sequence[int],
        variants: Sequence[Variants],
    ) -> None:
        """Writes the next part, or one that is there again.

        Args:
            number: of the part, at most the count of those that are there.
            keys: one a document.
            vectors: float32 `(documents, dim)` of length 1.
            modalities: HAS_TEXT, HAS_IMAGE or both, one a document.
            variants: tokens, one entry a document.

        Raises:
            ValueError: naming the document that is wrong, or a part of other documents; nothing is written then.
        """
        assert number <= len(self.parts)
        self._check(keys, vectors, modalities)
        rows = TokenRows(keys, variants, self.num_variants)
        name, there = f"part_{number:05d}", number < len(self.parts)
        arrays = {
            "vectors": np.ascontiguousarray(vectors, np.float32),
            "modalities": np.asarray(modalities, np.uint8),
            **_key_arrays(keys),
            "token_offsets": rows.offsets,
        }
        if there:
            self._check_digests(number, arrays, ("keys", "key_offsets"))
            self._check_rows(number, rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, array in arrays.items():
            with replacing(part_path(self.folder, name, kind)) as part, part.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        rows.save(part_path(self.folder, name, "tokens"))
        sha256 = {kind: sha256_of(part_path(self.folder, name, kind)) for kind in FILE_KINDS}
        if there and self.parts[number]["sha256"] != sha256:
            self.manifest["index"] = None  # it was built from other vectors
        self._put(number, {"name": name, "documents": len(keys), "sha256": sha256})

    def finish(self, config: IndexConfig) -> None:
        """Brings the index up to the parts: documents that it covers stay in it, and only new ones are added.

        It is built anew where the config asks for another kind or other settings, or where its file is damaged.

        Raises:
            ValueError: without documents, for settings that do not fit them, or where the index would not fit the
                memory of the machine.
        """
        total = sum(part["documents"] for part in self.parts)
        if not total:
            raise ValueError(f"{self.folder}: there are no documents, so there is no memory to build")
        dim, before = self.manifest["dim"], self.manifest["index"]
        build = build_settings(config, dim, total, before and before["build"])
        search = search_settings(config, build["kind"])
        covered = before["parts"] if before and before["build"] == build and self._index_is_whole(before) else 0
        if before and covered == len(self.parts):
            self.manifest["index"] = {**before, "search": search}
            write_manifest(self.folder, self.manifest)
            return
        check_fits(
            index_bytes(build, dim, total),
            f"{self.folder}: an index {build['kind']} of {total:,} documents",
            "choose index.kind ivf_pq, fewer documents, or a larger machine",
        )
        version = before["version"] + 1 if before else 1
        index = (
            read_index(self.folder / before["file"], mapped=False)
            if covered
            else new_index(build, dim, self._sample(config.seed, total), config.max_train_vectors)
        )
        for part in self.parts[covered:]:
            add_vectors(index, self._vectors(part), build, config.num_threads)
        path = self.folder / f"index_{version:05d}.faiss"
        write_index(index, path)
        self.manifest["index"] = {
            "file": path.name,
            "version": version,
            "parts": len(self.parts),
            "documents": total,
            "sha256": sha256_of(path),
            "build": build,
            "search": search,
        }
        write_manifest(self.folder, self.manifest)
        for old in self.folder.glob("index_*.faiss"):
            if old != path:
                old.unlink()

    def _check(self, keys: Sequence[str], vectors: np.ndarray, modalities: Sequence[int]) -> None:
        if vectors.shape != (len(keys), self.manifest["dim"]) or len(modalities) != len(keys):
            raise ValueError(
                f"{self.folder}: {len(keys)} documents with vectors of shape {vectors.shape} and {len(modalities)} "
                f"modalities; the memory takes {self.manifest['dim']} dimensions"
            )
        if not len(keys):
            raise ValueError(f"{self.folder}: a part without documents")
        wrong = find_wrong(vectors)
        if wrong is not None:
            raise ValueError(f"{self.folder}: document {keys[wrong[0]]!r}: {wrong[1]}; its part was not written")
        for key, kinds in zip(keys, modalities):
            if not HAS_TEXT <= kinds <= HAS_TEXT | HAS_IMAGE:
                raise ValueError(f"{self.folder}: document {key!r} has neither text nor image (modalities {kinds})")

    def _check_digests(self, number: int, arrays: Mapping[str, np.ndarray], kinds: Sequence[str]) -> None:
        part = self.parts[number]
        if any(part["sha256"][kind] != _digest(_npy(arrays[kind])) for kind in kinds):
            raise ValueError(
                f"{self.folder}: {part['name']} holds other documents than those given; give all documents that are "
                "there, in their order, before new ones, or choose another folder"
            )

    def _check_rows(self, number: int, rows: TokenRows) -> None:
        part = self.parts[number]
        if part["sha256"]["tokens"] != rows.sha256() or part["sha256"]["token_offsets"] != _digest(_npy(rows.offsets)):
            raise ValueError(
                f"{self.folder}: {part['name']} holds other tokens of its documents than those given; give the token "
                "shards that it was made of, or choose another folder"
            )

    def _index_is_whole(self, entry: dict[str, Any]) -> bool:
        path = self.folder / entry["file"]
        return path.is_file() and sha256_of(path) == entry["sha256"]

    def _vectors(self, part: dict[str, Any]) -> np.ndarray:
        return map_part(self.folder, part["name"], "vectors", num_dims=2, kinds="f")

    def _sample(self, seed: int, total: int) -> Callable[[int], np.ndarray]:
        def sample(most: int) -> np.ndarray:
            numbers = np.sort(np.random.default_rng(seed).choice(total, min(most, total), replace=False))
            ends = np.cumsum([part["documents"] for part in self.parts])
            pieces = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
            starts = ends - [part["documents"] for part in self.parts]
            return np.concatenate(
                [self._vectors(part)[piece - start] for part, piece, start in zip(self.parts, pieces, starts)]
            )

        return sample


def write_memory(
    folder: Path | str,
    documents: Iterable[MemoryDocument],
    embed: Embed,
    *,
    encoder_identity: str,
    dim: int,
    tokens: Mapping[str, Any],
    encoder: str,
    index: IndexConfig | None = None,
    part_documents: int = 16384,
    batch_size: int = 256,
) -> None:
    """Builds a memory from a stream of documents, or goes on with one.

    Parts that are there are passed by without embedding anything, so that a job that broke off is started again as it
    was, and documents are added by giving them behind the earlier ones. No more than a part's vectors are in memory
    at a time, and a batch of contents where those are given as functions.

    Args:
        documents: all of them, those that are there first, in the same order.
        embed: contents to vectors of length 1.
        encoder_identity, dim, tokens, encoder: see `MemoryWriter`.
        part_documents: documents of a new part.
        batch_size: contents that `embed` takes at a time.

    Raises:
        ValueError: see `MemoryWriter`; also where there are fewer documents than the memory holds.
    """
    if part_documents < 1 or batch_size < 1:
        raise ValueError(f"part_documents is {part_documents} and batch_size {batch_size}; both must be at least 1")
    writer = MemoryWriter(folder, encoder_identity=encoder_identity, dim=dim, tokens=tokens, encoder=encoder)
    stream = iter(documents)
    for number in count():
        there = number < len(writer.parts)
        entries = islice(stream, writer.parts[number]["documents"] if there else part_documents)
        keys, modalities, variants, rows = [], [], [], []
        embeds = not writer.is_whole(number)
        for batch in _batches(entries, batch_size):
            keys += [entry.key for entry in batch]
            modalities += [entry.modalities for entry in batch]
            variants += [entry.variants for entry in batch]
            if embeds:
                rows.append(embed([entry.content() if callable(entry.content) else entry.content for entry in batch]))
        if not embeds or (there and not keys):
            writer.check_documents(number, keys, variants)
        elif keys:
            writer.write_part(number, keys, np.concatenate(rows), modalities, variants)
        else:
            break
    writer.finish(index or IndexConfig())


def _batches(documents: Iterator[MemoryDocument], size: int) -> Iterator[list[MemoryDocument]]:
    while batch := list(islice(documents, size)):
        yield batch


def _key_arrays(keys: Sequence[str]) -> dict[str, np.ndarray]:
    values, offsets = encode_strings(keys)
    return {"keys": values, "key_offsets": offsets}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
