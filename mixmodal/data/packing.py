"""Documents side by side in rows of one length: ids, positions, segment ids and loss weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import SequenceError


class TrainingDocument(NamedTuple):
    """One document as it is trained on.

    Args:
        key: names it in messages.
        ids: `(n,)` int64.
        loss_weights: `(n,)` float32, the weight of predicting each token; the first is 0.
    """

    key: str
    ids: np.ndarray
    loss_weights: np.ndarray


class Batch(NamedTuple):
    """Packed rows.

    Args:
        tokens: ids `(B, T)` int64, `<pad>` behind the last document.
        positions: `(B, T)` int64; they restart with every document and are 0 in padding.
        segment_ids: `(B, T)` int64: 1, 2, 3 .. for the documents of a row, 0 for padding.
        loss_weights: `(B, T)` float32, the weight of predicting each token; 0 at the start of a document.
        keys: the documents of each row, in order.
    """

    tokens: Tensor
    positions: Tensor
    segment_ids: Tensor
    loss_weights: Tensor
    keys: list[list[str]]

    @property
    def num_documents(self) -> int:
        return sum(len(row) for row in self.keys)

    @property
    def document_lengths(self) -> Tensor:
        """Tokens of each document, `(num_documents,)` int64, row by row."""
        size = int(self.segment_ids.amax()) + 1
        rows = torch.arange(len(self.segment_ids), device=self.segment_ids.device)[:, None]
        counts = (rows * size + self.segment_ids).view(-1).bincount(minlength=len(rows) * size).view(-1, size)
        return counts[:, 1:][counts[:, 1:] != 0]

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that are not padding, an int64 scalar."""
        return (self.segment_ids != 0).sum()


def pack(documents: Iterable[TrainingDocument], seq_len: int) -> Iterator[list[TrainingDocument]]:
    """Fills rows of `seq_len` tokens in the order given (next fit): a row ends where the next document does not fit.

    Raises:
        ValueError: for a document of more than `seq_len` tokens.
    """
    row: list[TrainingDocument] = []
    used = 0
    for document in documents:
        if len(document.ids) > seq_len:
            raise ValueError(f"document {document.key}: {len(document.ids)} tokens do not fit a row of {seq_len}")
        if row and used + len(document.ids) > seq_len:
            yield row
            row, used = [], 0
        row.append(document)
        used += len(document.ids)
    if row:
        yield row


def build_batch(rows: Sequence[Sequence[TrainingDocument]], seq_len: int, pad: int) -> Batch:
    """Rows of documents to tensors.

    Args:
        rows: the documents of each row, at most `seq_len` tokens together; a row may be empty.
        seq_len: T.
        pad: id of `<pad>`.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segment_ids = np.zeros(shape, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    ramp = np.arange(seq_len)
    for index, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, start=1):
            stop = start + len(document.ids)
            tokens[index, start:stop] = document.ids
            positions[index, start:stop] = ramp[: stop - start]
            segment_ids[index, start:stop] = segment
            loss_weights[index, start:stop] = document.loss_weights
            loss_weights[index, start] = 0  # nothing of this document stands before its first token
            start = stop
    arrays = (tokens, positions, segment_ids, loss_weights)
    return Batch(*map(torch.from_numpy, arrays), keys=[[document.key for document in row] for row in rows])


def split_pairs(batch: Batch, bos: int) -> Batch:
    """Packed rows of pairs as rows of their conversations: segments 1 and 2 are a pair, 3 and 4 the next one.

    Positions begin again in the second one. `keys` stay those of the pairs.

    Args:
        batch: rows whose documents are pairs.
        bos: id of `<s>`, which stands nowhere but at the start of a conversation.

    Raises:
        SequenceError: naming a document that is no pair.
    """
    inside = batch.segment_ids != 0
    starts = (batch.tokens == bos) & inside
    segments = starts.cumsum(1) * inside
    for keys, found, row in zip(batch.keys, batch.segment_ids, starts):
        counts = found[row].bincount(minlength=len(keys) + 1)[1:].tolist()
        for key, count in zip(keys, counts, strict=True):
            if count != 2:
                raise SequenceError(f"document {key} holds {count} conversations, and a pair two; prepare it again")
    places = starts.new_ones(starts.shape).cumsum(1) - 1
    first = (places * starts).cummax(1).values
    return batch._replace(segment_ids=segments, positions=(places - first) * inside)
