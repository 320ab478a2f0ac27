"""The tokens of a part's documents on their way into its files: read twice, never in memory as a whole."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mixmodal.files import replacing
from mixmodal.ragged import INTEGERS, offsets_of

Variants = Sequence[np.ndarray] | Callable[[], Sequence[np.ndarray]]
"""Ids `(T,)` of each variant of a document, or a function that reads them."""


class TokenRows:
    """Rows of ids: of each document all its variants, the documents one behind the other.

    Args:
        keys: of the documents, for messages.
        documents: what they are spelled as.
        num_variants: that each of them has.

    Attributes:
        offsets: see `ragged.offsets_of`, over all rows.

    Raises:
        ValueError: naming a document with another number of variants, or with ids that are none.
    """

    def __init__(self, keys: Sequence[str], documents: Sequence[Variants], num_variants: int) -> None:
        self._documents = documents
        rows: list[range] = []
        largest = 0
        for key, document in zip(keys, documents, strict=True):
            variants = _read(document)
            if len(variants) != num_variants:
                raise ValueError(f"document {key!r} has {len(variants)} variants of tokens, not {num_variants}")
            for ids in variants:
                if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in INTEGERS or ids.min() < 0:
                    raise ValueError(f"document {key!r}: its tokens are no ids (T,) from 0 on, or there are none")
                rows.append(range(len(ids)))
                largest = max(largest, int(ids.max()))
        self.offsets = offsets_of(rows)
        self.dtype = np.min_scalar_type(max(largest, 256))  # uint16 or uint32
        if self.dtype.itemsize > 4:
            raise ValueError(f"tokens up to {largest} do not fit 32 bits")

    def save(self, path: Path) -> None:
        """Writes the ids as a .npy file, whole or not at all."""
        with replacing(path) as part, part.open("wb") as file:
            for block in self._blocks():
                file.write(block)

    def sha256(self) -> str:
        """Of the file that `save` writes."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        header = io.BytesIO()
        shape = {"shape": (int(self.offsets[-1]),), "fortran_order": False, "descr": self.dtype.str}
        np.lib.format.write_array_header_1_0(header, shape)
        yield header.getvalue()
        for document in self._documents:
            for ids in _read(document):
                yield ids.astype(self.dtype).tobytes()


def _read(document: Variants) -> Sequence[np.ndarray]:
    return document() if callable(document) else document
