"""Which documents are taken from the memory: candidates, found once, and the draw among them, anew for each epoch.

RA-CM3 (arXiv 2211.12561) and CM3Leon (arXiv 2309.02591, section 4.2): the nearest documents that are no near-duplicates
of the query or of each other, those with both modalities first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, Memory

BOTH = HAS_TEXT | HAS_IMAGE
NONE = np.empty(0, np.int64)


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


Refuse = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows of a batch, int64 `(m,)`, and found documents of each, int64 `(m, k)` with -1 for none, to bool `(m, k)`."""


class Chosen(NamedTuple):
    """The candidates of a batch: of the text queries at index 0 of the second axis, of the image queries at index 1.

    Args:
        numbers: in the memory, int64 `(n, 2, num_candidates)`, best first, then -1.
        scores: inner products with the query, float32, likewise; -inf where there is none.
    """

    numbers: np.ndarray
    scores: np.ndarray


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
    allowed = np.ones(len(numbers), bool) if own is None else numbers != own
    near = [*([own_vector] if own_vector is not None else []), *(taken if taken is not None else [])]
    for vector in near:
        allowed &= vectors @ vector <= config.max_score
    places = _choose(numbers[None], scores[None], vectors[None], modalities[None], allowed[None], config)[0]
    return numbers[places[places >= 0]].astype(np.int64)


def _choose(
    numbers: np.ndarray,
    scores: np.ndarray,
    vectors: np.ndarray,
    modalities: np.ndarray,
    allowed: np.ndarray,
    config: SelectionConfig,
) -> np.ndarray:
    """Places of the candidates among the found ones, int64 `(n, num_candidates)`, best first, then -1.

    Args:
        numbers, scores, modalities: `(n, k)`, see `choose`; vectors are `(n, k, dim)`.
        allowed: which of them may be chosen, beside what the numbers and scores say, bool `(n, k)`.
    """
    allowed = allowed & (numbers >= 0) & (scores <= config.max_score)
    rows, places = np.arange(len(numbers)), np.arange(numbers.shape[1])
    rank = places + (modalities != BOTH) * (len(places) if config.prefer_both else 0)
    chosen = np.full((len(numbers), config.num_candidates), -1, np.int64)
    for slot in range(config.num_candidates):
        place = np.where(allowed, rank, 2 * len(places)).argmin(axis=1)
        there = allowed[rows, place]
        chosen[there, slot] = place[there]
        if slot + 1 < config.num_candidates:
            allowed &= _products(vectors, vectors[rows, place]) <= config.max_score
        allowed[rows, place] = False
    return chosen


def _products(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Inner products of `(n, k, dim)` with `(n, dim)`: float32 `(n, k)`, equal ones for equal vectors in any batch."""
    return np.einsum("nkd,nd->nk", vectors, others)


def select(
    memory: Memory,
    config: SelectionConfig,
    *,
    text_queries: np.ndarray | None,
    image_queries: np.ndarray | None,
    own: Sequence[int] | None = None,
    own_vectors: np.ndarray | None = None,
    asks: np.ndarray | None = None,
    refuse: Refuse | None = None,
) -> Chosen:
    """The candidates of a batch of documents.

    Args:
        text_queries: vectors of their texts, float32 `(n, dim)` of length 1; None where they have none.
        image_queries: vectors of their pictures, likewise.
        own: their numbers in the memory; None where they do not stand there, as at inference.
        own_vectors: their vectors, float32 `(n, dim)`; None takes those of `own` from the memory.
        asks: which of them have a text and which a picture, bool `(n, 2)`; the others' queries are not read. None has
            them all.
        refuse: what else may not be chosen.

    Raises:
        ValueError: without queries, or with different numbers of them.
    """
    queries = (text_queries, image_queries)
    counts = {len(rows) for rows in (*queries, own, own_vectors, asks) if rows is not None}
    if (text_queries is None and image_queries is None) or len(counts) > 1:
        raise ValueError(f"queries and own documents in different numbers ({sorted(counts)}), or no queries")
    count = counts.pop()
    if own_vectors is None and own is not None:
        own_vectors = memory.vectors(own)
    chosen = Chosen(
        np.full((count, 2, config.num_candidates), -1, np.int64),
        np.full((count, 2, config.num_candidates), -np.inf, np.float32),
    )
    for kind, vectors in enumerate(queries):
        rows = np.arange(count) if asks is None else np.flatnonzero(asks[:, kind])
        if vectors is None or not len(rows):
            continue
        found = _search(memory, vectors[rows], config.search_depth)
        taken = chosen.numbers[rows, :kind].reshape(len(rows), -1)
        allowed = _apart(memory, config, found, taken, own_vectors[rows] if own_vectors is not None else None)
        if own is not None:
            allowed &= found.numbers != np.asarray(own)[rows, None]
        if refuse is not None:
            allowed &= ~refuse(rows, found.numbers)
        modalities = memory.modalities[np.maximum(found.numbers, 0)]
        places = _choose(found.numbers, found.scores, found.vectors, modalities, allowed, config)
        for into, values, none in ((chosen.numbers, found.numbers, -1), (chosen.scores, found.scores, -np.inf)):
            into[rows, kind] = np.where(places < 0, none, np.take_along_axis(values, np.maximum(places, 0), 1))
    return chosen


class _Nearest(NamedTuple):
    """What is nearest to each query: numbers and scores `(n, depth)`, vectors `(n, depth, dim)`."""

    numbers: np.ndarray
    scores: np.ndarray
    vectors: np.ndarray


def _apart(
    memory: Memory, config: SelectionConfig, found: _Nearest, taken: np.ndarray, own_vectors: np.ndarray | None
) -> np.ndarray:
    """Which found documents are no near-duplicates of the own one, nor of those that are taken: bool `(n, depth)`.

    Args:
        taken: numbers, int64 `(n, m)`; -1 is none.
    """
    allowed = np.ones(found.numbers.shape, bool)
    if own_vectors is not None:
        allowed &= _products(found.vectors, own_vectors) <= config.max_score
    for other in taken.T:
        near = _products(found.vectors, memory.vectors(np.maximum(other, 0))) > config.max_score
        allowed &= ~(near | (found.numbers == other[:, None])) | (other < 0)[:, None]
    return allowed


def _search(memory: Memory, queries: np.ndarray, depth: int) -> _Nearest:
    """What is nearest to each query, vectors `(n, dim)`.

    Documents with equal scores come in the order of their numbers, whatever the batch is in which they are found.
    """
    numbers = memory.search(queries, depth).numbers
    vectors = memory.vectors(np.maximum(numbers, 0).ravel()).reshape(*numbers.shape, memory.dim)
    scores = np.where(numbers < 0, -np.inf, _products(vectors, queries)).astype(np.float32)
    order = np.lexsort((numbers, -scores))
    moved = np.flatnonzero((order != np.arange(order.shape[1])).any(axis=1))  # few, and vectors take long to copy
    for array in (numbers, scores, vectors):
        array[moved] = array[moved[:, None], order[moved]]
    return _Nearest(numbers, scores, vectors)


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


def draw(candidates: Candidates, config: DrawConfig, generator: np.random.Generator) -> np.ndarray:
    """The documents that stand before a document, int64, in random order; a few microseconds.

    A pure function of its arguments, where the generator is at the start of a stream of the document's own.
    """
    text, image = candidates
    draws = generator.random(2 + len(text) + len(image))
    count = config.counts[int(draws[0] * len(config.counts))]
    if not count:
        return NONE
    if not (len(text) and len(image)):
        pool = text if len(text) else image
    elif config.queries == "one":
        pool = text if draws[1] < 0.5 else image
    else:
        pool = np.concatenate(candidates)
    return pool[draws[2 : 2 + len(pool)].argsort()[:count]]
