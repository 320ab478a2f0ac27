"""The stream of packed rows that training reads: endless, a pure function of the seed, exactly resumable."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixmodal.data.packing import Batch, Sample, build_batch, pack
from mixmodal.data.split import check_split
from mixmodal.document import Run, SequenceFormat
from mixmodal.objectives.causal_masked import CausalMasked

logger = logging.getLogger(__name__)

MIN_DOCUMENTS_TO_JUDGE = 1000


class Documents(Protocol):
    """Spelled documents by index, as `TokenShards` holds them; its `digest`, where there is one, names the content."""

    keys: Any  # a sequence of strings; type checkers take no cached property for a property

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how documents are varied before they are packed.

    Args:
        tokens: folder with the token shards to train on.
        held_out_tokens: folder with token shards to evaluate on; none means no evaluation.
        seq_len: length of a row in tokens; a longer document is skipped, and masks are drawn where they still fit.
        image_first_share: probability that a document of one text and one picture (or other coded part) changes their
            order; stored with the text first, this share is trained with the picture first (Chameleon: 0.5).
        caption_dropout: share of the documents with a coded part whose text becomes `<mask:0>`, of loss weight 0, so
            that guidance has its unconditional stream. They are neither turned round nor masked further.
        first_part_weight: factor on the loss weights of a document's first part, where it has more than one. Below 1,
            more of what is learned is how a part follows from another; 1 is CM3Leon's.
        shuffle: a new order in every epoch; otherwise the stored order.
        max_skipped_share: share of documents that may be too long before training stops.
    """

    tokens: Path
    held_out_tokens: Path | None = None
    seq_len: int
    image_first_share: float = 0.5
    caption_dropout: float = 0.1
    first_part_weight: float = 1.0
    shuffle: bool = True
    max_skipped_share: float = 0.1

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"data: seq_len is {self.seq_len}; it must be at least 2 tokens")
        for name in ("image_first_share", "caption_dropout", "max_skipped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data: {name} is {getattr(self, name)}; it must lie in 0 .. 1")
        if self.first_part_weight < 0:
            raise ValueError(f"data: first_part_weight is {self.first_part_weight}; it must not be negative")


class PackedDocuments:
    """Micro-batches of packed rows without end.

    All randomness of a document comes from (seed, epoch, its index), the order of an epoch from (seed, epoch), and
    rows are filled in that order. Optimizer step s takes rows s * R .. (s + 1) * R - 1 of this one stream, where R is
    `micro_batch_size * grad_accum_steps * world_size`; each rank takes a contiguous part of them, and each of its
    micro-batches a contiguous part of that. So a step trains on the same rows however they are spread. Every rank
    walks through all documents, since a row starts where the one before it ended.

    Args:
        documents: spelled documents.
        sequence_format: splits and joins them; no text tokenizer is needed.
        objective: masks them.
        config: see there.
        micro_batch_size: rows in a batch.
        grad_accum_steps: batches of this rank in an optimizer step.
        rank, world_size: which part of each step's rows this process takes.
        seed: not negative.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_format: SequenceFormat,
        objective: CausalMasked,
        config: DataConfig,
        *,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        if not len(documents):
            raise ValueError(f"data: {config.tokens} holds no documents")
        check_split(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        self.documents = documents
        self.sequence_format = sequence_format
        self.objective = objective
        self.config = config
        self.micro_batch_size, self.grad_accum_steps = micro_batch_size, grad_accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.counts: Counter[str] = Counter(documents=0, too_long=0)
        self._pending: Sample | None = None  # drawn, and first in the next row
        self._step: list[list[Sample]] = []  # this rank's rows of a step that has begun
        self._micro_batch = 0
        self._begin_epoch(0)
        self._step_start = self._place()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._step:
            self._begin_step()
        start = self._micro_batch * self.micro_batch_size
        rows = self._step[start : start + self.micro_batch_size]
        self._micro_batch += 1
        if self._micro_batch == self.grad_accum_steps:
            self._end_step()
        return build_batch(rows, self.config.seq_len, self.sequence_format.vocabulary.pad)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Plain data, from which another stream goes on with exactly the batch that is next here."""
        split = [self.micro_batch_size, self.grad_accum_steps, self.world_size]
        return {
            "seed": self.seed,
            "num_documents": len(self.documents),
            "manifest_sha256": getattr(self.documents, "digest", ""),
            "seq_len": self.config.seq_len,
            **self._step_start,
            "micro_batch": self._micro_batch,
            "split": split,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; between two steps, any number of ranks and rows may go on.

        Raises:
            ValueError: where the seed or the data are others, or, within a step, the rows are spread differently.
        """
        own = self.state_dict()
        compared = ["seed", "num_documents", "manifest_sha256", "seq_len"]
        for key in compared + (["split"] if state["micro_batch"] else []):
            if state.get(key) != own[key]:
                raise ValueError(
                    f"data {self.config.tokens}: {key} is {own[key]}, but the checkpoint was written with "
                    f"{state.get(key)}; resume with the same data and seed, or start a new run folder"
                )
        self.counts = Counter(state["counts"])
        self._pending = None
        self._begin_epoch(state["epoch"])
        self._position = state["position"]
        self._end_step()
        if state["micro_batch"]:
            self._begin_step()
            self._micro_batch = state["micro_batch"]

    def _place(self) -> dict[str, Any]:
        """Where the next row begins."""
        position = self._position - (self._pending is not None)
        return {"epoch": self._epoch, "position": position, "counts": dict(self.counts)}

    # rows

    def _begin_step(self) -> None:
        rows_per_rank = self.micro_batch_size * self.grad_accum_steps
        for number in range(rows_per_rank * self.world_size):
            row = self._next_row()
            if number // rows_per_rank == self.rank:
                self._step.append(row)

    def _end_step(self) -> None:
        self._step, self._micro_batch = [], 0
        self._step_start = self._place()

    def _next_row(self) -> list[Sample]:
        row: list[Sample] = []
        room = self.config.seq_len
        while True:
            sample = self._pending or self._draw()
            self._pending = sample
            if len(sample.ids) > room:
                return row
            self._pending = None
            row.append(sample)
            room -= len(sample.ids)
            self.counts["documents"] += 1

    # documents

    def _draw(self) -> Sample:
        while True:
            if self._position == len(self.documents):
                self._check_skipped()
                self._begin_epoch(self._epoch + 1)
            index = int(self._order[self._position])
            self._position += 1
            key, ids = self.documents.keys[index], self.documents[index]
            if len(ids) <= self.config.seq_len:
                return self._vary(key, ids, self._random.of(index))
            self.counts["too_long"] += 1
            logger.debug("document %s has %d tokens, a row %d: skipped", key, len(ids), self.config.seq_len)
            if self.counts.total() >= MIN_DOCUMENTS_TO_JUDGE:
                self._check_skipped()

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = np.arange(len(self.documents))
        self._random = _Randomness(self.seed, epoch)
        if self.config.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(self._order)

    def _check_skipped(self) -> None:
        too_long, fitting = self.counts["too_long"], self.counts["documents"]
        if not fitting or too_long > self.config.max_skipped_share * (too_long + fitting):
            raise ValueError(
                f"data {self.config.tokens}: {too_long} of {too_long + fitting} documents are longer than seq_len "
                f"{self.config.seq_len}; raise seq_len, or max_skipped_share {self.config.max_skipped_share}"
            )

    def _vary(self, key: str, ids: np.ndarray, rng: np.random.Generator) -> Sample:
        """Drops the caption, or changes the order and draws masks."""
        drop = rng.random() < self.config.caption_dropout
        turn = rng.random() < self.config.image_first_share
        if drop or turn:
            parts = _parts(self.sequence_format.split(ids))
            is_text = [part[0].modality == "text" for part in parts]
            if drop and any(is_text) and not all(is_text):
                mask = [Run("text", np.array([self.sequence_format.vocabulary.sentinel(0)]))]
                kept = [mask if text else part for part, text in zip(parts, is_text)]
                ids = self.sequence_format.join([run for part in kept for run in part])
                return self._sample(key, ids, self.objective.weigh(ids))
            if turn and sorted(is_text) == [False, True]:
                ids = self.sequence_format.join([run for part in parts[::-1] for run in part])
        return self._sample(key, *self.objective.apply(ids, rng, max_len=self.config.seq_len))

    def _sample(self, key: str, ids: np.ndarray, loss_weights: np.ndarray) -> Sample:
        """With the first part's weights, up to the first token that ends a part."""
        if self.config.first_part_weight != 1:
            vocabulary = self.sequence_format.vocabulary
            ends = np.flatnonzero((ids[2:] == vocabulary.break_) | (ids[2:] == vocabulary.end_of_span))
            if len(ends) and vocabulary.break_ in ids:
                loss_weights[: ends[0] + 2] *= self.config.first_part_weight
        return Sample(key, ids, loss_weights)


class _Randomness:
    """A stream of random numbers for every document of an epoch.

    Philox (Salmon et al. 2011) is keyed by seed and epoch, and the index stands in a high word of its counter: each
    document has 2^128 numbers of its own. Setting the counter costs a tenth of seeding a generator.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        key = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
        self._philox = np.random.Philox(key=key)
        self._generator = np.random.Generator(self._philox)
        self._start: Any = self._philox.state

    def of(self, index: int) -> np.random.Generator:
        """The generator at the start of a document's stream; it is the same object for all of them."""
        self._start["state"]["counter"][:] = (0, 0, index, 0)
        self._philox.state = self._start
        return self._generator


def _parts(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs with neighbouring texts (masks among them) taken together."""
    numbered = groupby(enumerate(runs), key=lambda item: -1 if item[1].modality == "text" else item[0])
    return [[run for _, run in part] for _, part in numbered]


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

    Every rank gets the same number of batches of the same shape, the last ones filled up with empty rows, so that
    ranks that must go in step do so; sums over all batches and ranks count each token once. Documents longer than
    `config.seq_len` are skipped; their number is logged.
    """
    vocabulary = objective.vocabulary
    too_long: list[str] = []

    def samples() -> Iterator[Sample]:
        for index in range(len(documents)):
            ids = documents[index]
            if len(ids) > config.seq_len:
                too_long.append(documents.keys[index])
            else:
                yield Sample(documents.keys[index], ids, objective.weigh(ids))

    rows = pack(samples(), config.seq_len)
    while chunk := list(islice(rows, micro_batch_size * world_size)):
        own = chunk[rank * micro_batch_size : (rank + 1) * micro_batch_size]
        own += [[] for _ in range(micro_batch_size - len(own))]
        yield build_batch(own, config.seq_len, vocabulary.pad)
    if too_long:
        logger.warning(
            "%d of %d held-out documents, first %s, are longer than seq_len %d and are skipped",
            len(too_long), len(documents), too_long[0], config.seq_len,
        )  # fmt: skip
