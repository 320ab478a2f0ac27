"""A source of documents: each epoch in an order of its own, with its place, its counts and what tells its content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mixmodal.data.retrieved import NOTHING, DrawnDocuments, Retrieval
from mixmodal.data.token_shards import TokenShards

logger = logging.getLogger(__name__)

WhenDone = Literal["repeat", "stop", "drop"]
PLAIN = ""
"""Name of the source that `data.tokens` is."""
PLACE = ("epoch", "position", "done", "drawn", "used", "tokens", "too_long", "retrieved", "left_out")
"""What a source's place in its documents is, and what it has counted."""
REMEDY = "resume with the same data and seed, or start a new run folder"
SHARES = ("image_first_share", "caption_dropout")
"""What a source may set for itself."""
MIN_DOCUMENTS_TO_JUDGE = 1000


class Documents(Protocol):
    """Spelled documents by index, as `TokenShards` holds them."""

    keys: Any  # a sequence of strings, of any type
    lengths: Any  # tokens of each document, integers `(documents,)`; type checkers take no cached property for one

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@runtime_checkable
class LossDocuments(Protocol):
    """Documents that may say which of their tokens carry loss, as `TokenShards` does."""

    has_loss: bool

    def loss(self, index: int, /) -> np.ndarray | None: ...


def loss_of(documents: Documents, index: int) -> np.ndarray | None:
    """Which tokens of a document carry loss, bool `(T,)`; None where nothing is said: all of them."""
    return documents.loss(index) if isinstance(documents, LossDocuments) else None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture.

    Args:
        tokens: folder with its token shards.
        weight: its share of the trained tokens, relative to the other weights; 0 leaves it out until a stage names it.
        candidates: folder of `mixmodal retrieve` with what may stand before its documents, see `data.retrieval`.
        when_done: after its last document: `repeat` begins it again in a new order; `drop` leaves it out, and the
            others share what was its; `stop` ends training before the first step that would need more of it.
        image_first_share: of its documents; by default that of `data`.
        caption_dropout: of its documents; by default that of `data`.
    """

    tokens: Path
    weight: float = 1.0
    candidates: Path | None = None
    when_done: WhenDone = "repeat"
    image_first_share: float | None = None
    caption_dropout: float | None = None

    def __post_init__(self) -> None:
        for name in SHARES:
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"data.sources: {name} is {value}; it must lie in 0 .. 1")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"data.sources: a weight is {self.weight}; it must be at least 0")


class Randomness:
    """A stream of random numbers for every document of an epoch.

    Philox (Salmon et al. 2011) is keyed by seed, epoch and source, and the index stands in a high word of its counter:
    each document has streams of 2^128 numbers of its own. Setting the counter costs a tenth of seeding a generator.
    """

    def __init__(self, entropy: tuple[int, ...]) -> None:
        key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        self._philox = np.random.Philox(key=key)
        self._generator = np.random.Generator(self._philox)
        self._start: Any = self._philox.state

    def of(self, index: int, stream: int = 0) -> np.random.Generator:
        """The generator at the start of a document's stream; it is the same object for all of them.

        Args:
            index: of the document.
            stream: 0 is what it is varied by, 1 what is retrieved for it.
        """
        self._start["state"]["counter"][:] = (0, 0, index, stream)
        self._philox.state = self._start
        return self._generator


class Source:
    """A source's documents in the order of its epoch; those that no row can hold are skipped and counted.

    The order is a function of (seed, epoch, name), so that it depends on no other source.

    Args:
        name: `PLAIN`, or its key in `data.sources`.
        documents: what it holds.
        config: see there.
        shuffle: a new order in every epoch; otherwise the stored one.
        seq_len: length of a row in tokens.
        max_skipped_share: share of the documents that may be skipped.
        seed: of the run.
        retrieval: what stands before its documents; None is nothing.
        modality: of the answers of all its documents, where `data.modality_balance` takes them apart.
        indices: of the documents that are its, where these are not all.

    Attributes:
        name: `NAME`, or `NAME/MODALITY`; only `MODALITY` of `PLAIN`.
        origin: the name in the config.
    """

    def __init__(
        self,
        name: str,
        documents: Documents,
        config: SourceConfig,
        *,
        shuffle: bool,
        seq_len: int,
        max_skipped_share: float,
        seed: int,
        retrieval: Retrieval | None = None,
        modality: str | None = None,
        indices: np.ndarray | None = None,
    ) -> None:
        self.retrieval = retrieval
        self.origin, self.modality = name, modality
        self.name = name = "/".join(part for part in (name, modality) if part)
        self.documents, self.config = documents, config
        self.label = self.label_of(self.origin, config) + (f", answers of {modality}" if modality else "")
        self.num_documents = len(documents) if indices is None else len(indices)
        self._indices = indices
        if not len(documents):
            raise ValueError(f"{self.label} holds no documents")
        shards = {"manifest_sha256": "", "shards": ""}
        if isinstance(documents, TokenShards):
            shards = {"manifest_sha256": documents.digest, "shards": documents.shard_digests}
        found = {"retrieval_sha256": retrieval.digest if retrieval else None}
        self.content = {"num_documents": self.num_documents, **shards, **found}
        self.lengths = documents.lengths
        self.done = False
        self.drawn = 0  # tokens since the weights are what they are
        self.used, self.tokens, self.too_long = 0, 0, 0
        self.retrieved, self.left_out = 0, 0  # documents before those that were used, and those that did not fit
        self._shuffle, self._seq_len, self._max_skipped_share = shuffle, seq_len, max_skipped_share
        digest = hashlib.sha256(name.encode()).digest()
        self._seed, self._salt = seed, (int.from_bytes(digest[:8], "big"),) if name else ()
        self._begin_epoch(0)

    @staticmethod
    def label_of(name: str, config: SourceConfig) -> str:
        """What names a source in messages."""
        return f"data.sources.{name} ({config.tokens})" if name else f"data {config.tokens}"

    @cached_property
    def size(self) -> int:
        """Tokens of all its documents, without masks."""
        return int(np.sum(self.lengths if self._indices is None else self.lengths[self._indices]))

    def take(self) -> int | None:
        """Index of the next document of the epoch that fits a row; None at its end.

        Raises:
            ValueError: naming the source, where too many of its documents do not fit.
        """
        while self.position < len(self._order):
            self.position += 1
            index = int(self._order[self.position - 1])
            if self.lengths[index] <= self._seq_len:
                return index
            self._skip(index)
        self._check_skipped()
        return None

    def randomness_of(self, epoch: int) -> Randomness:
        """What an epoch's documents are varied by."""
        return self._randomness if epoch == self.epoch else Randomness(self._entropy(epoch))

    def retrieve(self, index: int, randomness: Randomness) -> DrawnDocuments:
        """What stands before a document in the epoch of `randomness`.

        Raises:
            ValueError: naming source and document, where not all of it fits and the config refuses that.
        """
        if self.retrieval is None:
            return NOTHING
        room = self._seq_len - int(self.lengths[index])
        try:
            return self.retrieval.draw(index, self.documents.keys[index], room, randomness.of(index, stream=1))
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error

    def use(self, tokens: int, retrieved: DrawnDocuments = NOTHING) -> None:
        """Counts a document that stands in a row."""
        self.used += 1
        self.tokens += tokens
        self.retrieved += len(retrieved.documents)
        self.left_out += retrieved.left_out

    def repeat(self) -> None:
        """Begins the next epoch."""
        self._begin_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Its place and its counts, with what tells that its documents are the same."""
        return {**self.content, **{key: getattr(self, key) for key in PLACE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begin_epoch(state["epoch"])
        for key in PLACE:
            setattr(self, key, state.get(key, 0))  # counts that an earlier version did not keep begin at 0
        self.done = self.done and self.config.when_done == "drop"  # which may have been changed since

    def check_content(self, state: Mapping[str, Any]) -> None:
        """Whether the documents are those of which `state` tells.

        Raises:
            ValueError: naming the source, and the shard that changed.
        """
        changed = self.documents.changed_since(state["shards"]) if isinstance(self.documents, TokenShards) else []
        if changed:
            more = f", and {len(changed) - 1} more" if changed[1:] else ""
            raise ValueError(f"{self.label}: {changed[0]}{more} changed since the checkpoint was written; {REMEDY}")
        for key, own in self.content.items():
            check_equal(self.label, key, own, state.get(key))

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._randomness = Randomness(self._entropy(epoch))
        size = len(self.documents)
        dtype = np.uint32 if size < 2**32 else np.uint64
        self._order = np.arange(size, dtype=dtype) if self._indices is None else self._indices.astype(dtype)
        if self._shuffle:
            np.random.default_rng(self._entropy(epoch)).shuffle(self._order)

    def _entropy(self, epoch: int) -> tuple[int, ...]:
        return (self._seed, epoch, *self._salt)

    def _skip(self, index: int) -> None:
        self.too_long += 1
        key, length = self.documents.keys[index], int(self.lengths[index])
        logger.debug("%s: document %s has %d tokens, a row %d: skipped", self.label, key, length, self._seq_len)
        if self.too_long + self.used >= MIN_DOCUMENTS_TO_JUDGE:
            self._check_skipped()

    def _check_skipped(self) -> None:
        total = self.too_long + self.used
        if not self.used or self.too_long > self._max_skipped_share * total:
            raise ValueError(
                f"{self.label}: {self.too_long} of {total} documents are longer than seq_len {self._seq_len}; "
                f"raise seq_len, or max_skipped_share {self._max_skipped_share}"
            )


def check_equal(label: str, key: str, own: Any, written: Any) -> None:
    """Whether what a checkpoint was written with is what there is.

    Raises:
        ValueError: naming both.
    """
    if own != written:
        raise ValueError(f"{label}: {key} is {own}, but the checkpoint was written with {written}; {REMEDY}")
