"""The stream of packed rows that training reads: endless, a pure function of the seed, exactly resumable."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mixmodal.data.balance import build_mixture, build_sources, check_balance, weights_of
from mixmodal.data.mixture import ShareLimits, StageConfig, check_mixture, weights_at
from mixmodal.data.packing import Batch, TrainingDocument, build_batch
from mixmodal.data.retrieved import NOTHING, DrawnDocuments, Retrieval, RetrievalConfig, check_retrieval, open_retrieval
from mixmodal.data.source import (
    PLAIN,
    REMEDY,
    SHARES,
    Documents,
    Randomness,
    Source,
    SourceConfig,
    check_equal,
    loss_of,
)
from mixmodal.data.split import check_split
from mixmodal.data.token_shards import TokenShards
from mixmodal.data.variation import Variation, check_loss_flags
from mixmodal.document import SequenceError, SequenceFormat
from mixmodal.objectives.causal_masked import CausalMasked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how documents are varied before they are packed.

    Args:
        tokens: folder with the token shards to train on.
        sources: several of them by name, in the place of `tokens`, with their shares of the trained tokens.
        stages: other weights of the sources from given steps on.
        modality_balance: shares of the documents whose answers are `text`, `image` or `both`, relative to each other;
            0 leaves them out. Weights of sources are then shares of the tokens within each.
        share_limits: how far the shares of sources, and those of `modality_balance`, may lie from those that they have
            by their size; none is no limit.
        candidates: folder of `mixmodal retrieve` with what may stand before the documents of `tokens`.
        retrieval: how it is drawn, and from which memory; none means that documents stand alone.
        held_out_tokens: folder with token shards to evaluate on; none means no evaluation.
        seq_len: length of a row in tokens; a longer document is skipped, and masks are drawn where they still fit.
        image_first_share: probability that a document of one text and one picture (or other coded part) changes their
            order; stored with the text first, this share is trained with the picture first (Chameleon: 0.5).
        caption_dropout: share of the documents with a coded part whose text becomes `<mask:0>`, of loss weight 0, so
            that guidance has its unconditional stream. They are neither turned round nor masked further.
        first_part_weight: factor on the loss weights of a document's first part, where it has more than one. Below 1,
            more of what is learned is how a part follows from another; 1 is CM3Leon's.
        loss_on: of documents that say which tokens carry loss, as conversations do: `flagged`, those (Chameleon: the
            answers), or `all`, every token as of other documents (CM3Leon). Held-out losses are of flagged ones.
        shuffle: a new order in every epoch; otherwise the stored order.
        lookahead: documents that a row may pass by for later, shorter ones that fit it; they begin the next rows. With
            0, a row ends at the first document that does not fit; where lengths differ much, 16 leaves little padding.
        max_skipped_share: share of documents of a source that may be too long before training stops.
        verify_shards: on resume, read all token shards, each rank its share of them, and compare them with their
            manifest.
    """

    tokens: Path | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    stages: tuple[StageConfig, ...] = ()
    modality_balance: dict[str, float] = field(default_factory=dict)
    share_limits: ShareLimits | None = None
    candidates: Path | None = None
    retrieval: RetrievalConfig | None = None
    held_out_tokens: Path | None = None
    seq_len: int
    image_first_share: float = 0.5
    caption_dropout: float = 0.1
    first_part_weight: float = 1.0
    loss_on: Literal["flagged", "all"] = "flagged"
    shuffle: bool = True
    lookahead: int = 0
    max_skipped_share: float = 0.1
    verify_shards: bool = True

    def __post_init__(self) -> None:
        if (self.tokens is None) == (not self.sources):
            raise ValueError("data: give either tokens, a folder of token shards, or sources, several by name")
        if self.tokens is None or self.stages:
            check_mixture(self.sources, self.stages)
        check_balance(self.modality_balance)
        if self.share_limits is not None and len(self.sources) < 2 and not self.modality_balance:
            raise ValueError("data: share_limits acts on several sources or modality_balance alone; leave it out")
        if self.seq_len < 2:
            raise ValueError(f"data: seq_len is {self.seq_len}; it must be at least 2 tokens")
        for name in (*SHARES, "max_skipped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data: {name} is {getattr(self, name)}; it must lie in 0 .. 1")
        for name in ("first_part_weight", "lookahead"):
            if getattr(self, name) < 0:
                raise ValueError(f"data: {name} is {getattr(self, name)}; it must not be negative")
        if self.sources and self.candidates:
            raise ValueError("data: candidates are those of tokens; give each source its own")
        check_retrieval(self.retrieval, [source.candidates for source in self.mixture.values()])

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """The sources; `tokens` is a single one without a name."""
        if self.tokens is None:
            return self.sources
        return {PLAIN: SourceConfig(tokens=self.tokens, candidates=self.candidates)}

    def shares(self, source: SourceConfig) -> dict[str, float]:
        """`image_first_share` and `caption_dropout` of a source."""
        return {name: getattr(source if getattr(source, name) is not None else self, name) for name in SHARES}

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of each source in an optimizer step."""
        return weights_at(self.mixture, self.stages, step)


def open_sources(config: DataConfig) -> dict[str, TokenShards]:
    """The token shards of each source.

    Raises:
        ValueError: naming manifest and key where they do not belong together.
    """
    opened = {name: TokenShards.open(source.tokens) for name, source in config.mixture.items()}
    first, *others = opened.values()
    for other in others:
        other.check_like(first)
    return opened


def open_retrievals(config: DataConfig, sources: Mapping[str, TokenShards]) -> dict[str, Retrieval]:
    """What stands before the documents of each source that has candidates.

    Raises:
        ValueError: naming manifest and key where memory, candidates and token shards do not belong together.
    """
    candidates = {name: source.candidates for name, source in config.mixture.items()}
    return open_retrieval(config.retrieval, sources, candidates)


class _Drawn(NamedTuple):
    """A document that was drawn and stands in no row yet; `length` counts its tokens as they are trained on."""

    source: Source
    epoch: int
    document: int
    length: int
    randomness: Randomness
    retrieved: DrawnDocuments = NOTHING


class PackedDocuments:
    """Micro-batches of packed rows; they end only where a source ends them (`SourceConfig.when_done`).

    All randomness of a document comes from (seed, source, epoch, its index), the order of an epoch from (seed, source,
    epoch), which source comes next from all that was drawn before, and rows are filled in that order, but for
    `lookahead`. Optimizer step s takes the next R rows of this one stream, where R is `micro_batch_size *
    grad_accum_steps * world_size`; each rank takes a contiguous part of them, and each of its micro-batches a
    contiguous part of that. So a step trains on the same rows however they are spread. Every rank walks through all
    documents, since a row starts where the one before it ended; of those in the rows of others it needs the length
    only.

    Args:
        documents: spelled documents, or those of each source by name as in `config.sources`.
        sequence_format: splits and joins them; no text tokenizer is needed.
        objective: masks them.
        config: see there.
        micro_batch_size: rows in a batch.
        grad_accum_steps: batches of this rank in an optimizer step.
        rank, world_size: which part of each step's rows this process takes.
        seed: not negative.
        retrieval: what stands before the documents of a source, by its name.
    """

    def __init__(
        self,
        documents: Documents | Mapping[str, Documents],
        sequence_format: SequenceFormat,
        objective: CausalMasked,
        config: DataConfig,
        *,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        retrieval: Mapping[str, Retrieval] | None = None,
    ) -> None:
        check_split(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        named = documents if isinstance(documents, Mapping) else {PLAIN: documents}
        self.sources = build_sources(config, named, seed=seed, retrieval=retrieval or {})
        shares = {name: config.shares(source.config) for name, source in self.sources.items()}
        check_loss_flags(self.sources, config.loss_on, shares)
        self.config = config
        self.mixture = build_mixture(config, self.sources)
        self._variations = {
            name: Variation(
                sequence_format,
                objective,
                seq_len=config.seq_len,
                first_part_weight=config.first_part_weight,
                retrieved_weight=config.retrieval.loss_weight if config.retrieval else 1.0,
                **shares[name],
            )
            for name in self.sources
        }
        self.pad = sequence_format.vocabulary.pad
        self.micro_batch_size, self.grad_accum_steps = micro_batch_size, grad_accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._pending: list[_Drawn] = []  # in the order drawn; the first of them begins the next row
        self._rows: list[list[TrainingDocument]] = []  # this rank's rows of a step that has begun
        self._micro_batch = 0
        self._step = 0
        self._step_start = self._place()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            StopIteration: saying why, where a source ends training before the step is full.
            ValueError: where too many documents of a source are too long.
        """
        if not self._rows:
            self._begin_step()
        start = self._micro_batch * self.micro_batch_size
        rows = self._rows[start : start + self.micro_batch_size]
        self._micro_batch += 1
        if self._micro_batch == self.grad_accum_steps:
            self._end_step()
        return build_batch(rows, self.config.seq_len, self.pad)

    @property
    def counts(self) -> Counter[str]:
        """Documents that stand in rows and those that were too long, of all sources."""
        counts: Counter[str] = Counter(documents=0, too_long=0)
        for source in self.sources.values():
            counts.update(documents=source.used, too_long=source.too_long)
        return counts

    # state

    def state_dict(self) -> dict[str, Any]:
        """Plain data, from which another stream goes on with exactly the batch that is next here."""
        return {
            "seed": self.seed,
            "seq_len": self.config.seq_len,
            **self._step_start,
            "micro_batch": self._micro_batch,
            "split": [self.micro_batch_size, self.grad_accum_steps, self.world_size],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; between two steps, any number of ranks and rows may go on.

        Sources may have been added, which begin, or taken out, and weights may have changed.

        Raises:
            ValueError: where the seed or the data are others, naming the shard that is, or, within a step, the rows
                are spread differently.
        """
        own = self.state_dict()
        for key in ["seed", "seq_len"] + (["split"] if state["micro_batch"] else []):
            check_equal(f"data {self.config.tokens or 'sources'}", key, own[key], state.get(key))
        check_equal("data", "whether there is a modality_balance", "balance" in own, "balance" in state)
        places = state.get("sources", {})
        self._check_contents(places)
        self._step = state["step"]
        self.mixture.load_state_dict(state, places)
        self._pending = [
            self._measured(self.sources[name], epoch, document)
            for name, epoch, document in state["pending"]
            if name in self.sources
        ]
        self._rows, self._micro_batch = [], 0
        self._step_start = self._place()
        if state["micro_batch"]:
            self._begin_step()
            self._micro_batch = state["micro_batch"]

    def _check_contents(self, places: Mapping[str, Mapping[str, Any]]) -> None:
        """Whether the sources hold what they did."""
        if not set(places) & set(self.sources):
            raise ValueError(
                f"data: none of the checkpoint's sources, {sorted(places)}, is among {sorted(self.sources)}; {REMEDY}"
            )
        for name in sorted(set(places) ^ set(self.sources)):
            logger.warning(
                "data.sources.%s: %s", name, "left out from here on" if name in places else "new from here on"
            )
        opened: dict[Path, TokenShards] = {}
        for name, source in self.sources.items():
            if name not in places:
                continue
            source.check_content(places[name])
            if self.config.verify_shards and isinstance(source.documents, TokenShards):
                opened[source.documents.folder] = source.documents
        for shards in opened.values():
            shards.verify(self.rank, self.world_size)

    def _place(self) -> dict[str, Any]:
        """Where the next row begins."""
        places = {name: source.state_dict() for name, source in self.sources.items()}
        pending = [[drawn.source.name, drawn.epoch, drawn.document] for drawn in self._pending]
        return {"step": self._step, **self.mixture.state_dict(), "pending": pending, "sources": places}

    # rows

    def _begin_step(self) -> None:
        self.mixture.set_weights(weights_of(self.config, self.sources, self._step))
        rows_per_rank = self.micro_batch_size * self.grad_accum_steps
        rows = []
        for number in range(rows_per_rank * self.world_size):
            is_own = number // rows_per_rank == self.rank
            row = self._next_row(is_own)
            if is_own:
                rows.append(row)
        self._rows = rows

    def _end_step(self) -> None:
        self._rows, self._micro_batch = [], 0
        self._step += 1
        self._step_start = self._place()

    def _next_row(self, is_own: bool) -> list[TrainingDocument]:
        """The documents of the next row, or none of them where it is another rank's."""
        row: list[TrainingDocument] = []
        room, passed = self.config.seq_len, 0
        while passed <= self.config.lookahead:
            if passed == len(self._pending):
                self._pending.append(self._draw())
            drawn = self._pending[passed]
            if drawn.length > room:
                passed += 1
                continue
            del self._pending[passed]
            room -= drawn.length
            drawn.source.use(drawn.length, drawn.retrieved)
            if is_own:
                row.append(self._vary(drawn))
        return row

    def _draw(self) -> _Drawn:
        source, document = self.mixture.draw()
        drawn = self._measured(source, source.epoch, document)
        self.mixture.charge(source, drawn.length)
        return drawn

    def _measured(self, source: Source, epoch: int, document: int) -> _Drawn:
        randomness = source.randomness_of(epoch)
        retrieved = source.retrieve(document, randomness)
        try:
            variation = self._variations[source.name]
            length = variation.length(source.documents, document, randomness, retrieved.num_tokens)
        except SequenceError as error:
            raise _bad_document(source, document, error) from error
        return _Drawn(source, epoch, document, length, randomness, retrieved)

    def _vary(self, drawn: _Drawn) -> TrainingDocument:
        source = drawn.source
        key = source.documents.keys[drawn.document]
        key = f"{source.origin}:{key}" if source.origin else key
        before = source.retrieval.read(drawn.retrieved) if source.retrieval else []
        try:
            own = drawn.randomness.of(drawn.document)
            loss = loss_of(source.documents, drawn.document) if self.config.loss_on == "flagged" else None
            document = self._variations[source.name].vary(key, source.documents[drawn.document], own, before, loss)
            if len(document.ids) > drawn.length:
                raise SequenceError("it is not spelled as this version spells it")
        except SequenceError as error:
            raise _bad_document(source, drawn.document, error) from error
        return document


def _bad_document(source: Source, document: int, error: SequenceError) -> SequenceError:
    return SequenceError(f"{source.label}: document {source.documents.keys[document]}: {error}; pretokenize again")
