"""Documents of a memory before those that are trained on: which ones, drawn anew in every epoch, and how many fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.data.token_shards import TokenShards
from mixmodal.document import count_fitting
from mixmodal.retrieval.candidates import CandidateStore, open_candidates
from mixmodal.retrieval.memory import Memory, open_memory
from mixmodal.retrieval.selection import RA_CM3, DrawConfig, draw

Overflow = Literal["fewer", "refuse"]
Variants = Literal["any", "same"]


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What stands before a document, inside its segment.

    Args:
        memory: folder of `mixmodal index`.
        draw: how many documents, and of which candidates: RA-CM3's `{counts: [0, 1, 2], queries: one}`, or CM3Leon's
            `{counts: [3], queries: all}`.
        loss_weight: factor on the loss weights of retrieved documents: 1 is CM3Leon's, 0.1 RA-CM3's.
        overflow: what is done with documents that do not fit a row beside the one they were found for: `fewer` leaves
            out the last that were drawn, whole, and counts them; `refuse` ends the training.
        variants: which one of a document is read: `any`, or the `same` as of the document that it stands before, which
            has as many; where pictures are changed alike (`change_alike` of token shards), what is read then lies
            where it is to be drawn.
        random: documents drawn from the whole memory in the place of candidates, for comparison.
    """

    memory: Path
    draw: DrawConfig = RA_CM3
    loss_weight: float = 1.0
    overflow: Overflow = "fewer"
    variants: Variants = "any"
    random: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.loss_weight < float("inf"):
            raise ValueError(f"data.retrieval.loss_weight is {self.loss_weight}; it must be at least 0")
        if self.overflow not in ("fewer", "refuse"):
            raise ValueError(f"data.retrieval.overflow is {self.overflow!r}; choose fewer or refuse")
        if self.variants not in ("any", "same"):
            raise ValueError(f"data.retrieval.variants is {self.variants!r}; choose any or same")
        if self.random and self.draw.queries != RA_CM3.queries:
            raise ValueError("data.retrieval.draw.queries can not act where random is true; leave it out")


class DrawnDocuments(NamedTuple):
    """What was drawn for one document.

    Args:
        documents: number in the memory and variant of each, in the order in which they stand.
        num_tokens: what they add to the document.
        left_out: documents that did not fit.
    """

    documents: tuple[tuple[int, int], ...] = ()
    num_tokens: int = 0
    left_out: int = 0


NOTHING = DrawnDocuments()


class Retrieval:
    """Draws documents for those of one source, from random numbers that are the document's own.

    Args:
        memory: what is drawn from; it need not be searched.
        candidates: by sample; None draws from the whole memory.
        num_variants: documents that a sample of the source gives.
        config: see there.

    Raises:
        ValueError: where variants are to be the same and there are not as many of them.
    """

    def __init__(
        self, memory: Memory, candidates: CandidateStore | None, num_variants: int, config: RetrievalConfig
    ) -> None:
        self.memory, self.config = memory, config
        self._candidates, self._num_variants = candidates, num_variants
        names = (memory.digest, candidates.digest if candidates else "random")
        if config.variants == "same" and memory.num_variants != num_variants:
            raise ValueError(
                f"{memory.folder}: {memory.num_variants} variants a document, where those that are trained on have "
                f"{num_variants}; make both of the same token shards, or set data.retrieval.variants to any"
            )
        self.digest = hashlib.sha256(" ".join(names).encode()).hexdigest()

    def draw(self, document: int, key: str, room: int, generator: np.random.Generator) -> DrawnDocuments:
        """What stands before a document.

        Args:
            document: its number in its source.
            key: its key there, `SAMPLE#variant`.
            room: tokens that a row has beside it.
            generator: at the start of random numbers of the document's own.

        Raises:
            ValueError: naming the document, where not all fit and the config refuses that.
        """
        numbers = self._numbers(document, key, generator)
        variants = (generator.random(len(numbers)) * self.memory.num_variants).astype(np.int64)
        if self.config.variants == "same":
            variants[:] = document % self._num_variants
        drawn = tuple(zip(numbers.tolist(), variants.tolist(), strict=True))
        lengths = [self.memory.length(number, variant) for number, variant in drawn]
        count = count_fitting(lengths, room)
        left_out = len(drawn) - count
        if left_out and self.config.overflow == "refuse":
            raise ValueError(
                f"document {key}: {left_out} of {len(drawn)} retrieved documents do not fit the {room} tokens beside "
                f"it; raise data.seq_len, draw fewer, or set data.retrieval.overflow to fewer"
            )
        return DrawnDocuments(drawn[:count], sum(lengths[:count]) - count, left_out)

    def read(self, retrieved: DrawnDocuments) -> list[np.ndarray]:
        """The ids `(T,)` of each document that was drawn."""
        return [self.memory.ids(number, variant) for number, variant in retrieved.documents]

    def _numbers(self, document: int, key: str, generator: np.random.Generator) -> np.ndarray:
        if self._candidates is not None:
            return draw(self._candidates[document // self._num_variants], self.config.draw, generator)
        counts = self.config.draw.counts
        count = counts[int(generator.random() * len(counts))]
        sample = key.rpartition("#")[0]
        drawn = dict.fromkeys((generator.random(count + 1) * len(self.memory)).astype(np.int64).tolist())
        others = [number for number in drawn if self.memory.keys[number] != sample]
        return np.array(others[:count], np.int64)


def open_retrieval(
    config: RetrievalConfig | None, sources: Mapping[str, TokenShards], candidates: Mapping[str, Path | None]
) -> dict[str, Retrieval]:
    """What is drawn for each source; one without candidates is trained on without retrieval.

    Args:
        config: None is no retrieval.
        sources: token shards by name.
        candidates: folder of `mixmodal retrieve` of each.

    Raises:
        ValueError: naming the manifest and the key, where memory, candidates and token shards do not belong together.
    """
    if config is None:
        return {}
    memory = open_memory(config.memory, encoder_identity=None, verify=False, searched=False)
    drawn: dict[str, Retrieval] = {}
    for name, shards in sources.items():
        folder = candidates[name]
        if folder is None and not config.random:
            continue
        memory.check_like(shards.manifest)
        store = open_candidates(folder, memory=memory, tokens_digest=shards.digest) if folder else None
        drawn[name] = Retrieval(memory, store, shards.num_variants, config)
    return drawn


def check_retrieval(config: RetrievalConfig | None, candidates: Sequence[Path | None]) -> None:
    """Whether every key about retrieval can act.

    Raises:
        ValueError: naming the key.
    """
    given = any(folder is not None for folder in candidates)
    if config is None and given:
        raise ValueError("data: candidates can not act without retrieval; give retrieval.memory, or leave them out")
    if config is not None and config.random and given:
        raise ValueError("data: candidates can not act where retrieval.random is true; leave one of them out")
    if config is not None and not config.random and not given:
        raise ValueError("data: retrieval needs the candidates of a source, which `mixmodal retrieve` finds")
