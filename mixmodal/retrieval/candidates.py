"""The candidates of every document of token shards, found once and stored: training draws among them.

manifest.json
part_00000.npy (int64, samples x 2 x num_candidates, best first, then -1; of the text query, then of the image query)

Each part is written whole or not at all, one after the other, and the manifest after each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixmodal.files import replacing, sha256_of
from mixmodal.manifests import MANIFEST_NAME, check_file, read_manifest, reading
from mixmodal.ragged import map_npy
from mixmodal.retrieval.memory import Memory
from mixmodal.retrieval.parts import PartsWriter
from mixmodal.retrieval.selection import Candidates

FORMAT_VERSION = 1
REMEDY = "retrieve again"
WHAT = "candidates"
KEYS = (
    "memory_digest",
    "tokens_digest",
    "num_documents",
    "num_candidates",
    "selection",
    "query_dropout",
    "seed",
    "parts",
)
"""What the manifest holds beside its version."""


class CandidateStore:
    """The candidates of each sample of token shards; see `open_candidates`.

    Attributes:
        manifest: what they were found with.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        paths = [_path(folder, part) for part in manifest["parts"]]
        self._parts = [map_npy(path, num_dims=3, kinds="i", remedy=REMEDY) for path in paths]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        for path, part, entry in zip(paths, self._parts, manifest["parts"], strict=True):
            wanted = (entry["documents"], 2, manifest["num_candidates"])
            if part.shape != wanted or part.dtype != np.int64:
                raise ValueError(f"{path}: {part.dtype} of shape {part.shape} instead of int64 {wanted}; {REMEDY}")

    def __len__(self) -> int:
        """Samples: documents of the token shards without their further variants."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, sample: int, /) -> Candidates:
        """The candidates of a sample: of the document whose number, divided by the number of variants, it is.

        Raises:
            IndexError: where there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.folder}: no sample {sample}, there are {len(self)}")
        number = int(self._ends.searchsorted(sample, side="right"))
        part = self._parts[number]
        text, image = part[sample - int(self._ends[number]) + len(part)]
        return Candidates(text[text >= 0], image[image >= 0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of the parts: names what the candidates are."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


def open_candidates(folder: Path | str, *, memory: Memory, tokens_digest: str) -> CandidateStore:
    """The candidates in a folder, for the documents of these token shards.

    Args:
        memory: that they are numbers of.
        tokens_digest: `TokenShards.digest` of the documents that they were found for.

    Raises:
        ValueError: naming the manifest, where they were found in another memory or for other token shards, or are
            unfinished; naming a part that is missing or damaged.
    """
    folder = Path(folder)
    manifest = read_candidates_manifest(folder)
    path = folder / MANIFEST_NAME
    for key, own, what in (
        ("memory_digest", memory.digest, f"in another memory than {memory.folder}, or before documents were added"),
        ("tokens_digest", tokens_digest, "for other token shards"),
    ):
        if manifest[key] != own:
            raise ValueError(
                f"{path}: {key} is {manifest[key][:12]}..., not {own[:12]}...: the candidates were found {what}; "
                f"{REMEDY}"
            )
    with reading(path, WHAT, REMEDY):
        found = sum(part["documents"] for part in manifest["parts"])
        if found != manifest["num_documents"]:
            raise ValueError(
                f"{path}: it has candidates of {found} of {manifest['num_documents']} documents, so the job broke off; "
                f"{REMEDY}, which goes on there"
            )
        for part in manifest["parts"]:
            check_part(folder, part)
        return CandidateStore(folder, manifest)


class CandidateWriter(PartsWriter):
    """Writes candidates part by part. Goes on with what a folder holds.

    Args:
        folder: made with the first part.
        settings: what they are found with, plain data: KEYS but for the parts, and more.

    Raises:
        ValueError: where the folder holds candidates that were found with other settings.
    """

    def __init__(self, folder: Path | str, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        wanted = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self.manifest: dict[str, Any] = (
            read_candidates_manifest(self.folder) if path.exists() else {**wanted, "parts": []}
        )
        for key, value in wanted.items():
            if self.manifest.get(key) != value:
                raise ValueError(
                    f"{path}: {key} is {self.manifest.get(key)}, not {value}: the folder holds candidates that were "
                    "found with other settings; remove it or choose another one"
                )

    def _check_part(self, part: Mapping[str, Any]) -> None:
        check_part(self.folder, part)

    def write_part(self, number: int, numbers: np.ndarray, counts: Mapping[str, Any]) -> None:
        """Writes the next part, or one that is there again.

        Args:
            number: of the part, at most the count of those that are there.
            numbers: int64 `(samples, 2, num_candidates)`, padded with -1.
            counts: what is told of the part in the end, plain data.
        """
        assert number <= len(self.parts)
        assert numbers.dtype == np.int64
        assert numbers.shape[1:] == (2, self.manifest["num_candidates"])
        entry: dict[str, Any] = {"name": f"part_{number:05d}", "documents": len(numbers), "counts": dict(counts)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _path(self.folder, entry)
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, np.ascontiguousarray(numbers), allow_pickle=False)
        self._put(number, {**entry, "sha256": sha256_of(path)})


def read_candidates_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of candidates.

    Raises:
        ValueError: naming it, where it is missing or something else.
    """
    return read_manifest(folder, WHAT, version=FORMAT_VERSION, keys=KEYS, remedy=REMEDY)


def check_part(folder: Path, part: Mapping[str, Any]) -> None:
    """Whether the file of a part is there as it was written.

    Raises:
        ValueError: naming the file.
    """
    check_file(_path(folder, part), part["sha256"], REMEDY)


def _path(folder: Path, part: Mapping[str, Any]) -> Path:
    return folder / f"{part['name']}.npy"
