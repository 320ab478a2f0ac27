"""Token shards: spelled documents as flat arrays on disk, memory-mapped, with a manifest of what they were made with.

manifest.json
shard_00000.tokens.npy (uint16 or uint32, all documents)  shard_00000.offsets.npy (int64, documents + 1)
shard_00000.keys.npy (uint8, UTF-8 of all keys)  shard_00000.key_offsets.npy (int64, documents + 1)
shard_00000.loss.npy (uint8, 1 for each token that carries loss), where the shard holds conversations
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mixmodal.document import SequenceFormat, TextCodec, build_format
from mixmodal.files import sha256_of, write_whole
from mixmodal.manifests import MANIFEST_NAME, check_file, read_manifest, reading
from mixmodal.ragged import RaggedArray, RaggedShard, Strings, encode_strings, map_npy, offsets_of
from mixmodal.vocabulary import Vocabulary

FORMAT_VERSION = 2
TOKENIZERS = ("text_tokenizer_sha256", "image_tokenizer_sha256")
NUM_UINT16 = 1 << 16
FILE_KINDS = ("tokens", "offsets", "keys", "key_offsets")
LOSS_KIND = "loss"
"""A file that only shards of conversations have; in others every token carries loss."""
PAIRS = "pairs"
"""A key of the manifest that only shards of preferences have."""
DIGITS = 8
REMEDY = "pretokenize again"
WHAT = "token shards"


def write_token_shard(
    folder: Path,
    name: str,
    documents: Sequence[np.ndarray],
    keys: Sequence[str],
    vocab_size: int,
    losses: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Writes the files of one shard, each whole or not at all.

    Args:
        documents: ids `(T,)` of each document.
        keys: one name a document.
        vocab_size: decides between 16 and 32 bits a token.
        losses: which tokens carry loss, bool `(T,)` of each document; None is all of them, and no file.

    Returns:
        The shard's entry of the manifest.
    """
    dtype = np.uint16 if vocab_size <= NUM_UINT16 else np.uint32
    tokens = np.concatenate([*documents, np.empty(0, dtype=np.int64)]).astype(dtype)
    key_bytes, key_offsets = encode_strings(keys)
    arrays = {"tokens": tokens, "offsets": offsets_of(documents), "keys": key_bytes, "key_offsets": key_offsets}
    if losses is not None:
        assert list(map(len, losses)) == list(map(len, documents)), "not one flag for each token"
        arrays[LOSS_KIND] = np.concatenate([*losses, np.empty(0, dtype=bool)]).astype(np.uint8)
    sha256: dict[str, str] = {}
    for kind, array in arrays.items():
        data = _npy(array)
        write_whole(folder / f"{name}.{kind}.npy", data)
        sha256[kind] = hashlib.sha256(data).hexdigest()
    return {"name": name, "documents": len(documents), "tokens": len(tokens), "sha256": sha256}


def is_token_shard(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the files of a manifest's entry are there and are those that it was written with."""
    paths = {kind: folder / f"{entry['name']}.{kind}.npy" for kind in (*FILE_KINDS, *_loss_kinds(entry))}
    if not all(path.is_file() for path in paths.values()):
        return False
    return {kind: sha256_of(path) for kind, path in paths.items()} == entry["sha256"]


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
    num_pairs: int = 0,
) -> dict[str, Any]:
    """The manifest as plain data, for `write_manifest`.

    Args:
        spelling: how the documents are spelled.
        shards: what `write_token_shard` returned, in order.
        counts: documents, tokens, text_tokens, image_tokens and `skipped` by reason; with conversations or tasks also
            `tasks`: documents, loss_tokens, text_loss_tokens and image_loss_tokens of each.
        num_variants: documents a sample gives; document i is variant i % num_variants of its sample.
        num_pairs: documents that are pairs of answers, see `mixmodal.data.preferences`: all, or none.

    `loss` is there, and true, where a shard says which of its tokens carry loss, and `pairs` where documents are pairs.

    Raises:
        ValueError: where pairs stand beside other documents.
    """
    if num_pairs and num_pairs != counts["documents"]:
        raise ValueError(
            f"{num_pairs} of {counts['documents']} documents are pairs of a chosen and a rejected answer, beside which "
            "nothing else can be trained on; prepare them apart"
        )
    return {
        **({LOSS_KIND: True} if any(map(_loss_kinds, shards)) else {}),
        **({PAIRS: True} if num_pairs else {}),
        "format_version": FORMAT_VERSION,
        "vocabulary": spelling.vocabulary.to_dict(),
        "vocabulary_digest": spelling.vocabulary.digest,
        "sequence_format": spelling.settings,
        "text_tokenizer_sha256": text_tokenizer_sha256,
        "image_tokenizer_sha256": image_tokenizer_sha256,
        "num_variants": num_variants,
        "counts": dict(counts),
        "shards": [dict(shard) for shard in shards],
    }


def _loss_kinds(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of the file of losses, where a shard has one."""
    return (LOSS_KIND,) if LOSS_KIND in entry["sha256"] else ()


def _shard_digest(entry: Mapping[str, Any]) -> str:
    kinds = (*FILE_KINDS, *_loss_kinds(entry))
    return hashlib.sha256("".join(entry["sha256"][kind] for kind in kinds).encode()).hexdigest()[:DIGITS]


class TokenShards:
    """Spelled documents by index, over all shards of a folder.

    Args:
        folder: what `pretokenize` wrote.

    Attributes:
        keys: key of each document: `KEY#variant`; a sequence that reads from disk what is asked for.
        has_loss: whether some documents say which of their tokens carry loss.
        has_pairs: whether its documents are pairs of answers, one behind the other.

    Raises:
        ValueError: where the manifest is missing or does not fit its shards or its vocabulary.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest_path = self.folder / MANIFEST_NAME
        keys = ("vocabulary", "vocabulary_digest", "sequence_format", *TOKENIZERS, "counts", "shards")
        self.manifest = read_manifest(self.folder, WHAT, version=FORMAT_VERSION, keys=keys, remedy=REMEDY)
        self.num_variants: int = self.manifest.get("num_variants", 1)
        self.has_pairs: bool = self.manifest.get(PAIRS, False)
        with reading(self.manifest_path, WHAT, REMEDY):
            self.vocabulary = Vocabulary.from_dict(self.manifest["vocabulary"])
            self.check(vocabulary_digest=self.vocabulary.digest)
            entries = self.manifest["shards"]
            self._documents = RaggedArray([self._open_documents(entry) for entry in entries])
            self.keys = Strings(RaggedArray([self._open_keys(entry) for entry in entries]))
            self._losses = [self._open_loss(entry) for entry in entries]
        self.has_loss = any(losses is not None for losses in self._losses)

    @classmethod
    def open(cls, folder: Path | str) -> TokenShards:
        """The token shards of a folder."""
        return cls(folder)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Ids of one document, int64 `(T,)`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: no document {index}, there are {len(self)}")
        return self._documents[index].astype(np.int64)

    def loss(self, index: int, /) -> np.ndarray | None:
        """Which tokens of one document carry loss, bool `(T,)`; None where its shard does not say: all of them."""
        shard, row = self._documents.place(index)
        losses = self._losses[shard]
        return None if losses is None else losses[row] != 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, uint32 `(documents,)`."""
        return self._documents.lengths()

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of every shard's files: names what the documents are."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def shard_digests(self) -> str:
        """The first 8 hexadecimal digits of the SHA-256 of each shard's files, joined; see `changed_since`."""
        return "".join(map(_shard_digest, self.manifest["shards"]))

    def changed_since(self, shard_digests: str) -> list[str]:
        """Names of the shards that differ from what `shard_digests` was, those that came or went included."""
        before = [shard_digests[at : at + DIGITS] for at in range(0, len(shard_digests), DIGITS)]
        names = [entry["name"] for entry in self.manifest["shards"]]
        names += [f"shard number {number}, which is gone" for number in range(len(names), len(before))]
        now = [_shard_digest(entry) for entry in self.manifest["shards"]]
        return [name for name, one, other in zip_longest(names, before, now) if one != other]

    def verify(self, part: int = 0, of: int = 1) -> None:
        """Reads every `of`-th shard from `part` on and compares it with the manifest.

        Raises:
            ValueError: naming a file that is not as it was written.
        """
        for entry in self.manifest["shards"][part::of]:
            for kind, wanted in entry["sha256"].items():
                check_file(self.folder / f"{entry['name']}.{kind}.npy", wanted, REMEDY)

    def arrays(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Of each shard the ids of all documents `(T,)`, their offsets `(documents + 1,)`, and which tokens carry loss,
        uint8 `(T,)`, or None where it does not say: memory-mapped, for what looks at all of them."""
        for entry in self.manifest["shards"]:
            documents = self._open_documents(entry)
            loss = self._open(entry, LOSS_KIND, "offsets").values if _loss_kinds(entry) else None
            yield documents.values, documents.offsets, loss

    def build_format(self, text_tokenizer: TextCodec | None = None) -> SequenceFormat:
        """The sequence format that the documents are spelled in.

        Raises:
            ValueError: naming the manifest, for a format that this version does not have.
        """
        section = self.manifest["sequence_format"]
        try:
            return build_format(vocabulary=self.vocabulary, text_tokenizer=text_tokenizer, **section)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.manifest_path}: sequence_format: {error}; {REMEDY}") from error

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

    def check_pairs(self, wanted: bool) -> None:
        """Whether its documents are pairs of answers, which preference tuning takes and nothing else.

        Raises:
            ValueError: naming the manifest and what to change.
        """
        if self.has_pairs and not wanted:
            raise ValueError(
                f"{self.manifest_path}: its documents are pairs of a chosen and a rejected answer, of which preference "
                "tuning alone knows what to do: set preference in a config of `mixmodal finetune`, or give other shards"
            )
        if wanted and not self.has_pairs:
            raise ValueError(
                f"{self.manifest_path}: its documents are no pairs of answers, which preference needs: prepare a "
                "corpus of kind preferences, or leave preference out"
            )

    def check_like(self, other: TokenShards) -> None:
        """Whether both were made with the same tokenizers, vocabulary and sequence format: trained on together.

        Raises:
            ValueError: naming this manifest and the key that differs.
        """
        same = {key: other.manifest[key] for key in TOKENIZERS}
        self.check(**same, vocabulary_digest=other.vocabulary.digest)
        found, wanted = self.manifest["sequence_format"], other.manifest["sequence_format"]
        if found != wanted:
            raise ValueError(
                f"{self.manifest_path}: sequence_format is {found}, not {wanted} as in {other.manifest_path}; "
                "pretokenize one of them again"
            )

    def _open_documents(self, entry: Mapping[str, Any]) -> RaggedShard:
        shard = self._open(entry, "tokens", "offsets")
        path, tokens, offsets, _ = shard
        if len(tokens) != entry["tokens"]:
            raise ValueError(
                f"{path}: {len(tokens)} tokens, not the {entry['tokens']} of {self.manifest_path}; pretokenize again"
            )
        if (offsets[0], offsets[-1]) != (0, len(tokens)) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"{path}: the offsets beside it do not rise from 0 to {len(tokens)}; pretokenize again")
        return shard

    def _open_keys(self, entry: Mapping[str, Any]) -> RaggedShard:
        """The keys of one shard; their offsets are compared with them when a key is read, so that none is read now."""
        return self._open(entry, "keys", "key_offsets")

    def _open_loss(self, entry: Mapping[str, Any]) -> RaggedArray | None:
        if not _loss_kinds(entry):
            return None
        shard = self._open(entry, LOSS_KIND, "offsets")
        if len(shard.values) != entry["tokens"]:
            raise ValueError(
                f"{shard.path}: {len(shard.values)} flags for the {entry['tokens']} tokens of {self.manifest_path}; "
                "pretokenize again"
            )
        return RaggedArray([shard])

    def _open(self, entry: Mapping[str, Any], values: str, offsets: str) -> RaggedShard:
        path, ends = (self.folder / f"{entry['name']}.{kind}.npy" for kind in (values, offsets))
        shard = RaggedShard(path, map_npy(path, remedy=REMEDY), map_npy(ends, remedy=REMEDY), REMEDY)
        if len(shard.offsets) - 1 != entry["documents"]:
            raise ValueError(
                f"{ends}: {len(shard.offsets) - 1} documents, not the {entry['documents']} of {self.manifest_path}; "
                "pretokenize again"
            )
        return shard
