"""Token shards: spelled documents as flat arrays on disk, memory-mapped, with a manifest of what they were made with.

manifest.json  shard_00000.tokens.npy (n tokens)  shard_00000.offsets.npy (int64, documents + 1)  shard_00000.keys.json
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mixmodal.data.shards import write_atomically
from mixmodal.document import SequenceFormat, TextCodec, build_format
from mixmodal.vocabulary import Vocabulary

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
NUM_UINT16 = 1 << 16
DIGITS = 8
BLOCK_BYTES = 1 << 22


def write_token_shard(
    folder: Path, name: str, documents: Sequence[np.ndarray], keys: Sequence[str], vocab_size: int
) -> dict[str, Any]:
    """Writes the three files of one shard, each whole or not at all.

    Args:
        documents: ids `(T,)` of each document.
        keys: one name a document.
        vocab_size: decides between 16 and 32 bits a token.

    Returns:
        The shard's entry of the manifest.
    """
    dtype = np.uint16 if vocab_size <= NUM_UINT16 else np.uint32
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.concatenate([*documents, np.empty(0, dtype=np.int64)]).astype(dtype)
    data = _npy(tokens)
    write_atomically(folder / f"{name}.keys.json", json.dumps(list(keys)).encode())
    write_atomically(folder / f"{name}.offsets.npy", _npy(offsets))
    write_atomically(folder / f"{name}.tokens.npy", data)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"name": name, "documents": len(keys), "tokens": len(tokens), "sha256": sha256}


def is_token_shard(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the files of a manifest's entry are there, and the tokens are those it was written with."""
    tokens, *others = (folder / f"{entry['name']}.{kind}" for kind in ("tokens.npy", "offsets.npy", "keys.json"))
    if not all(path.is_file() for path in (tokens, *others)):
        return False
    return hashlib.sha256(tokens.read_bytes()).hexdigest() == entry["sha256"]


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def build_manifest(
    spelling: SequenceFormat,
    shards: Sequence[Mapping[str, Any]],
    *,
    text_tokenizer_sha256: str,
    image_tokenizer_sha256: str,
    counts: Mapping[str, Any],
    num_variants: int = 1,
) -> dict[str, Any]:
    """The manifest as plain data, for `write_manifest`.

    Args:
        spelling: how the documents are spelled.
        shards: what `write_token_shard` returned, in order.
        counts: documents, tokens, text_tokens, image_tokens and `skipped` by reason.
        num_variants: documents a sample gives; document i is variant i % num_variants of its sample.
    """
    return {
        "format_version": FORMAT_VERSION,
        "vocabulary": spelling.vocabulary.to_dict(),
        "vocabulary_digest": spelling.vocabulary.digest,
        "sequence_format": {
            "name": spelling.name,
            "grids": {modality: list(grid) for modality, grid in spelling.grids.items()},
        },
        "text_tokenizer_sha256": text_tokenizer_sha256,
        "image_tokenizer_sha256": image_tokenizer_sha256,
        "num_variants": num_variants,
        "counts": dict(counts),
        "shards": [dict(shard) for shard in shards],
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, which comes last: without it a folder is no token shards."""
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


class TokenShards:
    """Spelled documents by index, over all shards of a folder.

    Args:
        folder: what `pretokenize` wrote.

    Raises:
        ValueError: where the manifest is missing or does not fit its shards or its vocabulary.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest_path = self.folder / MANIFEST_NAME
        self.manifest = self._read_manifest()
        self.vocabulary = Vocabulary.from_dict(self.manifest["vocabulary"])
        self.num_variants: int = self.manifest.get("num_variants", 1)
        self.check(vocabulary_digest=self.vocabulary.digest)
        self._shards = [self._open_shard(entry) for entry in self.manifest["shards"]]
        self._starts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._shards)])

    @classmethod
    def open(cls, folder: Path | str) -> TokenShards:
        """The token shards of a folder."""
        return cls(folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Ids of one document, int64 `(T,)`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: no document {index}, there are {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        tokens, offsets = self._shards[shard]
        start, stop = offsets[index - self._starts[shard] :][:2]
        return tokens[start:stop].astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, uint32 `(documents,)`."""
        return np.concatenate([np.empty(0, np.uint32), *(np.diff(offsets) for _, offsets in self._shards)]).astype(
            np.uint32
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds that of every shard's tokens: names what the documents are."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def shard_digests(self) -> str:
        """The first 8 hexadecimal digits of each shard's SHA-256, one behind the other; see `changed_since`."""
        return "".join(entry["sha256"][:DIGITS] for entry in self.manifest["shards"])

    def changed_since(self, shard_digests: str) -> list[str]:
        """Names of the shards that differ from what `shard_digests` was, those that came or went included."""
        before = [shard_digests[at : at + DIGITS] for at in range(0, len(shard_digests), DIGITS)]
        names = [entry["name"] for entry in self.manifest["shards"]]
        names += [f"shard number {number}, which is gone" for number in range(len(names), len(before))]
        now = [entry["sha256"][:DIGITS] for entry in self.manifest["shards"]]
        return [name for name, one, other in zip_longest(names, before, now) if one != other]

    def verify(self, part: int = 0, of: int = 1) -> None:
        """Reads every `of`-th shard from `part` on and compares it with the manifest.

        Raises:
            ValueError: naming a file whose tokens are not those that it was written with.
        """
        for entry in self.manifest["shards"][part::of]:
            path = self.folder / f"{entry['name']}.tokens.npy"
            sha256 = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    sha256.update(block)
            if sha256.hexdigest() != entry["sha256"]:
                raise ValueError(
                    f"{path}: changed since it was written (SHA-256 {sha256.hexdigest()[:12]}..., not "
                    f"{entry['sha256'][:12]}... as in {self.manifest_path}); bring it back or pretokenize again"
                )

    @property
    def keys(self) -> list[str]:
        """Key of each document: `KEY#variant`; read once."""
        return self._keys

    @cached_property
    def _keys(self) -> list[str]:
        keys: list[str] = []
        for entry in self.manifest["shards"]:
            path = self.folder / f"{entry['name']}.keys.json"
            found = json.loads(path.read_bytes())
            if len(found) != entry["documents"]:
                raise ValueError(f"{path}: {len(found)} keys for {entry['documents']} documents; pretokenize again")
            keys += found
        return keys

    def build_format(self, text_tokenizer: TextCodec | None = None) -> SequenceFormat:
        """The sequence format that the documents are spelled in."""
        section = self.manifest["sequence_format"]
        return build_format(section["name"], self.vocabulary, section["grids"], text_tokenizer)

    def check(
        self,
        text_tokenizer_sha256: str | None = None,
        image_tokenizer_sha256: str | None = None,
        vocabulary_digest: str | None = None,
    ) -> None:
        """Whether the shards were made with these tokenizers and this vocabulary; None is not compared.

        Raises:
            ValueError: naming the manifest and the key that differs.
        """
        wanted = {
            "text_tokenizer_sha256": text_tokenizer_sha256,
            "image_tokenizer_sha256": image_tokenizer_sha256,
            "vocabulary_digest": vocabulary_digest,
        }
        for key, value in wanted.items():
            if value is not None and self.manifest[key] != value:
                raise ValueError(
                    f"{self.manifest_path}: {key} is {self.manifest[key][:12]}..., not {value[:12]}...: the token "
                    f"shards were made with another {key.rsplit('_', 1)[0].replace('_', ' ')}; pretokenize again"
                )

    def check_like(self, other: TokenShards) -> None:
        """Whether both were made with the same tokenizers, vocabulary and sequence format: trained on together.

        Raises:
            ValueError: naming this manifest and the key that differs.
        """
        same = {key: other.manifest[key] for key in ("text_tokenizer_sha256", "image_tokenizer_sha256")}
        self.check(**same, vocabulary_digest=other.vocabulary.digest)
        found, wanted = self.manifest["sequence_format"], other.manifest["sequence_format"]
        if found != wanted:
            raise ValueError(
                f"{self.manifest_path}: sequence_format is {found}, not {wanted} as in {other.manifest_path}; "
                "pretokenize one of them again"
            )

    def _read_manifest(self) -> dict[str, Any]:
        path = self.manifest_path
        if not path.is_file():
            raise ValueError(f"{path}: no such file, so {self.folder} holds no (finished) token shards; pretokenize it")
        try:
            manifest = json.loads(path.read_bytes())
            version = manifest["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest of token shards ({error!r})") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version}, this version reads {FORMAT_VERSION}; pretokenize again"
            )
        needed = {
            "vocabulary",
            "vocabulary_digest",
            "sequence_format",
            "text_tokenizer_sha256",
            "image_tokenizer_sha256",
        }
        missing = sorted((needed | {"counts", "shards"}) - set(manifest))
        if missing:
            raise ValueError(f"{path}: the key {missing[0]} is missing; pretokenize again")
        return manifest

    def _open_shard(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (memory-mapped) and offsets of one shard."""
        tokens, offsets = self._load(f"{entry['name']}.tokens.npy"), self._load(f"{entry['name']}.offsets.npy")
        rows = (len(tokens), len(offsets) - 1, int(offsets[0]), int(offsets[-1]))
        if rows != (entry["tokens"], entry["documents"], 0, entry["tokens"]) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"{self.folder / entry['name']}.tokens.npy: {len(tokens)} tokens in {len(offsets) - 1} documents, "
                f"not the {entry['tokens']} in {entry['documents']} of {self.manifest_path}; pretokenize again"
            )
        return tokens, offsets

    def _load(self, name: str) -> np.ndarray:
        try:
            mapped = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.folder / name}: missing or broken ({error}); pretokenize again") from error
        return mapped.view(np.ndarray)  # slicing a `memmap` costs ten times as much
