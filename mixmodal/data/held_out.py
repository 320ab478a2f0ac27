"""Held-out documents in packed rows: each once, as it is stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from mixmodal.data.packing import Batch, TrainingDocument, build_batch, pack
from mixmodal.data.pipeline import DataConfig
from mixmodal.data.source import Documents, loss_of
from mixmodal.objectives.causal_masked import CausalMasked

logger = logging.getLogger(__name__)


def held_out_batches(
    documents: Documents,
    objective: CausalMasked,
    config: DataConfig,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every document once, as it is stored, packed in order; without masks, dropout or changes of order.

    Where documents say which tokens carry loss, only those do.

    Every rank gets the same number of batches of the same shape, the last ones filled up with empty rows, so that
    ranks that must go in step do so; sums over all batches and ranks count each token once. Documents longer than
    `config.seq_len` are skipped; their number is logged.
    """
    vocabulary = objective.vocabulary
    too_long: list[str] = []

    def stored() -> Iterator[TrainingDocument]:
        for index in range(len(documents)):
            ids = documents[index]
            if len(ids) > config.seq_len:
                too_long.append(documents.keys[index])
            else:
                weights, loss = objective.weigh(ids), loss_of(documents, index)
                yield TrainingDocument(documents.keys[index], ids, weights if loss is None else weights * loss)

    rows = pack(stored(), config.seq_len)
    while chunk := list(islice(rows, micro_batch_size * world_size)):
        own = chunk[rank * micro_batch_size : (rank + 1) * micro_batch_size]
        own += [[] for _ in range(micro_batch_size - len(own))]
        yield build_batch(own, config.seq_len, vocabulary.pad)
    if too_long:
        logger.warning(
            "%d of %d documents, first %s, are longer than seq_len %d and are skipped",
            len(too_long), len(documents), too_long[0], config.seq_len,
        )  # fmt: skip
