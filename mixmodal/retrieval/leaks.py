"""Documents of a memory that give another one away whatever their vectors are: namesakes, and those with its pictures.

A picture that stands in the memory with another caption passes the ceiling on the vectors of whole documents, and a
model that has it before it would only have to copy.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from mixmodal.document import SequenceFormat
from mixmodal.retrieval.memory import Memory
from mixmodal.retrieval.selection import Refuse

SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that rows of a batch become different numbers: an entry of one row is not taken for one of another."""


class LeakGuard:
    """Tells which documents of a memory a batch of documents may not have.

    Keys and codes of pictures are compared by 64 bits of a digest: two that differ are taken for the same in 1 of 2^64
    cases, and then a candidate is left out that need not be.

    Args:
        memory: read once, keys and the first variant of each document: 16 bytes a document and 8 a picture stay.
        spelling: of the memory's documents, see `Memory.check_tokens`.
    """

    def __init__(self, memory: Memory, spelling: SequenceFormat) -> None:
        self._spelling = spelling
        names, pictures, ends = array("Q"), array("Q"), array("q", [0])
        for number in range(len(memory)):
            names.append(_digest(memory.keys[number].encode("utf-8", "surrogatepass")))
            pictures.extend(self._pictures(memory.ids(number)))
            ends.append(len(pictures))
        self._names = np.frombuffer(names, np.uint64)
        self._digests = np.frombuffer(pictures, np.uint64)
        self._ends = np.frombuffer(ends, np.int64)

    def refuse(self, keys: Sequence[str], documents: Sequence[np.ndarray]) -> Refuse:
        """What a batch may not have.

        Args:
            keys: of its documents, as they are called in the memory.
            documents: their ids `(T,)`, of the first variant.
        """
        names = np.array([_digest(key.encode("utf-8", "surrogatepass")) for key in keys], np.uint64)
        pictures = [self._pictures(ids) for ids in documents]
        rows = np.repeat(np.arange(len(pictures), dtype=np.uint64), [len(found) for found in pictures])
        digests = np.array([digest for found in pictures for digest in found], np.uint64)
        own = np.unique(digests ^ rows * SPREAD)

        def refuse(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
            there = np.maximum(numbers, 0)
            starts = self._ends[there].ravel()
            counts = self._ends[there + 1].ravel() - starts
            places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            owners = np.repeat(np.arange(numbers.size), counts)
            of_row = np.repeat(rows.astype(np.uint64), numbers.shape[1])[owners]
            hits = owners[np.isin(self._digests[places] ^ of_row * SPREAD, own)]
            has_picture = np.bincount(hits, minlength=numbers.size).astype(bool).reshape(numbers.shape)
            return (numbers >= 0) & (has_picture | (self._names[there] == names[rows, None]))

        return refuse

    def _pictures(self, ids: np.ndarray) -> list[int]:
        """A digest of the codes of each picture, or of another coded part."""
        runs = self._spelling.split(ids)
        return [_digest(run.ids.tobytes()) for run in runs if run.modality in self._spelling.blocks]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
