"""Which documents are taken from the memory: candidates, found once, and the draw among them, anew for each epoch.

RA-CM3 (arXiv 2211.12561) and CM3Leon (arXiv 2309.02591, section 4.2): the nearest documents that are no near-duplicates
of the query or of each other, those with both modalities first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, Memory

BOTH = HAS_TEXT | HAS_IMAGE


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which documents may be retrieved for a document.

    Args:
        num_candidates: most documents for the text query, and for the image query.
        max_score: ceiling on the inner product with the query, with the document itself and among the chosen: what lies
            above is a near-duplicate.
        prefer_both: documents with text and image come before all others.
        search_depth: nearest documents of a query that are looked through.
    """

    num_candidates: int = 2
    max_score: float = 0.9
    prefer_both: bool = True
    search_depth: int = 64

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"selection.num_candidates is {self.num_candidates}; it must be at least 1")
        if not -1 <= self.max_score <= 1:
            raise ValueError(f"selection.max_score is {self.max_score}; it must lie in -1 .. 1")
        if self.search_depth < self.num_candidates:
            raise ValueError(
                f"selection.search_depth is {self.search_depth}; it must be at least num_candidates, "
                f"{self.num_candidates}"
            )


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How many of the candidates stand before a document, and from which query they come.

    Args:
        counts: numbers of documents, of which one is drawn, each as likely; of fewer candidates all are taken.
        queries: `one` draws between the candidates of the text query and those of the image query, `all` has them all.
    """

    counts: tuple[int, ...] = (0, 1, 2)
    queries: Literal["one", "all"] = "one"

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0:
            raise ValueError(f"draw.counts is {self.counts}; give at least one number, none below 0")
        if self.queries not in ("one", "all"):
            raise ValueError(f"draw.queries is {self.queries!r}; choose one or all")


RA_CM3 = DrawConfig(counts=(0, 1, 2), queries="one")
CM3LEON = DrawConfig(counts=(3,), queries="all")


class Candidates(NamedTuple):
    """What may stand before a document: numbers in the memory, int64, best first; none stands in both."""

    text: np.ndarray
    image: np.ndarray


def choose(
    numbers: np.ndarray,
    scores: np.ndarray,
    vectors: np.ndarray,
    modalities: np.ndarray,
    config: SelectionConfig,
    *,
    own: int | None = None,
    own_vector: np.ndarray | None = None,
    taken: np.ndarray | None = None,
) -> np.ndarray:
    """The candidates of one query, int64 `(at most num_candidates,)`, best first.

    Args:
        numbers: found documents, `(k,)`, best first; -1 is none.
        scores: inner products with the query, `(k,)`.
        vectors: of the found documents, `(k, dim)`; rows of -1 are not read.
        modalities: of the found documents, `(k,)`.
        own: the number of the document that is asked for, where it stands in the memory.
        own_vector: its vector `(dim,)`, or any that stands for it; what is too near to it would give it away.
        taken: vectors `(n, dim)` of documents that are chosen already.
    """
    allowed = (numbers >= 0) & (scores <= config.max_score)
    if own is not None:
        allowed &= numbers != own
    if own_vector is not None:
        allowed &= vectors @ own_vector <= config.max_score
    places = np.flatnonzero(allowed)
    if config.prefer_both:
        places = places[np.argsort(modalities[places] != BOTH, kind="stable")]
    before = list(taken) if taken is not None else []
    chosen: list[int] = []
    for place in places:
        if len(chosen) == config.num_candidates:
            break
        if all(vectors[place] @ other <= config.max_score for other in before):
            before.append(vectors[place])
            chosen.append(int(numbers[place]))
    return np.asarray(chosen, np.int64)


def find_candidates(
    memory: Memory,
    config: SelectionConfig,
    *,
    text_queries: np.ndarray | None,
    image_queries: np.ndarray | None,
    own: Sequence[int] | None = None,
) -> list[Candidates]:
    """The candidates of a batch of documents.

    Args:
        text_queries: vectors of their texts, float32 `(n, dim)` of length 1; None where they have none.
        image_queries: vectors of their pictures, likewise.
        own: their numbers in the memory; None where they do not stand there, as at inference.

    Raises:
        ValueError: without queries, or with different numbers of them.
    """
    queries = {"text": text_queries, "image": image_queries}
    given = {name: rows for name, rows in queries.items() if rows is not None}
    counts = {len(rows) for rows in given.values()} | ({len(own)} if own is not None else set())
    if not given or len(counts) > 1:
        raise ValueError(f"queries and own documents in different numbers ({sorted(counts)}), or no queries")
    found = {name: memory.search(rows, config.search_depth) for name, rows in given.items()}
    own_vectors = memory.vectors(own) if own is not None else None
    candidates = []
    for row in range(counts.pop()):
        chosen = {name: np.empty(0, np.int64) for name in queries}
        for name, (scores, numbers) in found.items():
            vectors = memory.vectors(np.maximum(numbers[row], 0))
            chosen[name] = choose(
                numbers[row],
                scores[row],
                vectors,
                memory.modalities[np.maximum(numbers[row], 0)],
                config,
                own=own[row] if own is not None else None,
                own_vector=own_vectors[row] if own_vectors is not None else None,
                taken=memory.vectors(chosen["text"]),
            )
        candidates.append(Candidates(**chosen))
    return candidates


def drop_words(text: str, share: float, generator: np.random.Generator) -> str:
    """A text query without some of its words: each is left out with probability `share`, but never all of them.

    Words stand between white space, so that the texts of any encoder's tokenizer can be shortened. RA-CM3 leaves out
    0.2 of the query.

    Raises:
        ValueError: for a share outside 0 .. 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share of dropped words is {share}; it must be at least 0 and below 1")
    words = text.split()
    kept = generator.random(len(words)) >= share
    if len(words) and not kept.any():
        kept[generator.integers(len(words))] = True
    return " ".join(word for word, keep in zip(words, kept) if keep)


def draw(candidates: Candidates, config: DrawConfig, *, seed: int, epoch: int, document: int) -> np.ndarray:
    """The documents that stand before a document in this epoch, int64, in random order.

    A pure function of its arguments: of the seed, the epoch and the document's number.
    """
    generator = np.random.default_rng((seed, epoch, document))
    count = int(generator.choice(config.counts))
    pool = np.concatenate(candidates)
    if config.queries == "one":
        pools = [numbers for numbers in candidates if len(numbers)]
        pool = pools[generator.integers(len(pools))] if pools else pool
    return generator.permutation(pool)[:count]
