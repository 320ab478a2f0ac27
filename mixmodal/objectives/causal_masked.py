"""CM3, the causal masked objective (Aghajanyan et al., arXiv 2201.07520, section 2), applied to ids of one document.

    original   <s> t0 t1 t2 t3 t4 </s>
    masked     <s> t0 <mask:0> t4 <mask:0> t1 t2 t3 <eoss> </s>

Masks are drawn in a document before it is packed and nothing is cut afterwards, so no token is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixmodal.document import SequenceError
from mixmodal.vocabulary import Vocabulary

TOKENS_PER_MASK = 3  # two sentinels and <eoss>


@dataclass(frozen=True, kw_only=True)
class CausalMaskedConfig:
    """How many spans of a document move to its end: `clamp(Poisson(poisson_rate), min_masks, max_masks)`.

    With `poisson_rate` 0 and `min_masks` 0 documents stay as they are: plain next-token prediction.

    Args:
        min_masks: 1 is the paper's, 0 that of its code, where 37 % of the documents stay plain.
        max_masks: at most as many as the vocabulary has sentinels.
        poisson_rate: mean of the Poisson distribution, in masks.
    """

    min_masks: int = 1
    max_masks: int = 16
    poisson_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_masks <= self.max_masks:
            raise ValueError(f"objective: min_masks {self.min_masks} must lie in 0 .. max_masks {self.max_masks}")
        if self.poisson_rate < 0:
            raise ValueError(f"objective: poisson_rate is {self.poisson_rate}; it must not be negative")

    @property
    def draws(self) -> bool:
        """Whether any document can get a mask."""
        return self.max_masks > 0 and (self.min_masks > 0 or self.poisson_rate > 0)


class CausalMasked:
    """Moves spans of a document to its end and back.

    A span lies within one stretch of content (text or codes between two control tokens), since a model that starts a
    picture in its middle can not be used (CM3Leon, arXiv 2309.02591, section 2.2). Of a document with several
    stretches, n distinct content tokens are drawn; each gives one span to its stretch, so that a stretch is chosen by
    its length. Within a stretch all ways to place its spans, none empty and none overlapping, are equally likely:
    this is the paper's `(U(0, s), U(0, s))`, given that spans are neither empty nor overlap. Spans may touch.

    Args:
        config: how many spans.
        vocabulary: gives the sentinels.

    Raises:
        ValueError: where `max_masks` is above the number of sentinels.
    """

    def __init__(self, config: CausalMaskedConfig, vocabulary: Vocabulary) -> None:
        if config.max_masks > vocabulary.config.num_sentinels:
            sentinels = vocabulary.config.num_sentinels
            raise ValueError(f"objective: max_masks is {config.max_masks}; the vocabulary has {sentinels} sentinels")
        self.config = config
        self.vocabulary = vocabulary
        # Look-up tables over the whole vocabulary: every training document passes here.
        every_id = np.arange(vocabulary.size)
        self._is_content = vocabulary.is_content(every_id)
        self._is_sentinel = vocabulary.contains("sentinel", every_id)
        self._weights = 1 - self._is_sentinel.astype(np.float32)

    def apply(
        self,
        ids: np.ndarray,
        rng: np.random.Generator,
        max_len: int | None = None,
        factors: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks one document, or a chain of them.

        Args:
            ids: `(T,)` int64, from `<s>` to `</s>`; sentinels that stand in it already are kept and left alone.
            rng: the source of all randomness.
            max_len: fewer masks are drawn where the result would be longer, in tokens.
            factors: on the weights of the tokens, float32 `(T,)`; they move with their tokens, and the `<eoss>` behind
                a span has that of the token before it. None is 1 for all.

        Returns:
            ids `(T + 3 n,)` int64 and their `weigh`ts.

        Raises:
            SequenceError: where the ids are not one document from `<s>` to `</s>`.
        """
        ids = np.asarray(ids, dtype=np.int64)
        self._check_ends(ids)
        spans = self.draw_spans(ids, rng, max_len)
        if spans:
            if factors is not None:
                factors = _move(factors, spans, [factors[start] for start, _ in spans])
            first = len(self.vocabulary.ids("sentinel")) - self._num_fresh_sentinels(ids)
            sentinels = [self.vocabulary.sentinel(first + index) for index in range(len(spans))]
            ids = _move(ids, spans, sentinels, self.vocabulary.end_of_span)
        weights = self.weigh(ids)
        return ids, weights if factors is None else weights * factors

    def weigh(self, ids: np.ndarray) -> np.ndarray:
        """The weights of predicting the tokens of one document, float32 `(T,)`.

        0 for the first token and for sentinels, whose places are random (section 2), 1 for all others.
        """
        weights = self._weights[ids]
        weights[0] = 0
        return weights

    def draw_num_masks(self, length: int, rng: np.random.Generator, max_len: int | None = None) -> int:
        """How many masks a document of `length` tokens is to get; one with less content than masks gets fewer.

        It is the first that `apply` draws, so that the length of what it returns is known without the ids.
        """
        config = self.config
        num_masks = min(max(int(rng.poisson(config.poisson_rate)), config.min_masks), config.max_masks)
        if max_len is not None:
            num_masks = min(num_masks, (max_len - length) // TOKENS_PER_MASK)
        return max(0, num_masks)

    def draw_spans(
        self, ids: np.ndarray, rng: np.random.Generator, max_len: int | None = None
    ) -> list[tuple[int, int]]:
        """Half-open spans `(start, stop)` of content, in order; see the class for how they are drawn."""
        num_masks = self.draw_num_masks(len(ids), rng, max_len)
        if not num_masks:
            return []
        content = self._is_content[ids]
        edges = (content[1:] != content[:-1]).nonzero()[0] + 1  # <s> and </s> are no content: edges come in pairs
        starts, stops = edges[::2], edges[1::2]
        ends = (stops - starts).cumsum()  # of the stretches, counted in content tokens
        num_masks = min(num_masks, int(ends[-1]) if len(ends) else 0, self._num_fresh_sentinels(ids))
        if num_masks < 1:
            return []
        drawn = _choose(int(ends[-1]), num_masks, rng)
        counts = Counter(ends.searchsorted(drawn, side="right").tolist())
        spans: list[tuple[int, int]] = []
        for stretch, count in sorted(counts.items()):
            start = int(starts[stretch])
            spans += [(start + a, start + b) for a, b in _place(int(stops[stretch]) - start, count, rng)]
        return spans

    def restore(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `apply`, also for what a model has filled in: spans go back to where their masks stand.

        Raises:
            SequenceError: where the ids are not one document, or a span at the end has not exactly one mask before it.
        """
        ids = np.asarray(ids, dtype=np.int64)
        self._check_ends(ids)
        stop = len(ids) - 1
        spans: dict[int, np.ndarray] = {}
        while (start := self._span_start(ids, stop)) is not None:
            sentinel = int(ids[start])
            if sentinel in spans:
                break  # a masked picture at the end of a Chameleon document: `<mask:i> codes <eoss>` is its rest
            spans[sentinel] = ids[start + 1 : stop - 1]
            stop = start
        body = ids[:stop]
        for sentinel in spans:
            if (body == sentinel).sum() != 1:
                raise SequenceError(f"the span of {self.vocabulary.name(sentinel)} has not exactly one place to go")
        pieces = [spans.get(token, body[i : i + 1]) for i, token in enumerate(body.tolist())]
        return np.concatenate([*pieces, ids[-1:]])

    def _span_start(self, ids: np.ndarray, stop: int) -> int | None:
        """Where the span `<mask:i> content <eoss>` that ends before `stop` starts; None where none ends there.

        A plain document can not hold this pattern: the only other `<eoss>` closes a picture, which a `<break>` opens.
        """
        if ids[stop - 1] != self.vocabulary.end_of_span:
            return None
        start = stop - 2
        while self._is_content[ids[start]]:
            start -= 1
        return start if self._is_sentinel[ids[start]] else None

    def _num_fresh_sentinels(self, ids: np.ndarray) -> int:
        """Sentinels above all that stand in the document: only fresh ones can tell a span's place."""
        sentinels = self.vocabulary.ids("sentinel")
        used = ids[self._is_sentinel[ids]]
        return len(sentinels) if not len(used) else sentinels.stop - 1 - int(used.max())

    def _check_ends(self, ids: np.ndarray) -> None:
        if len(ids) < 2 or ids[0] != self.vocabulary.bos or ids[-1] != self.vocabulary.eos:
            raise SequenceError("masks are drawn in one whole document, from <s> to </s>")


def _move(
    values: np.ndarray, spans: list[tuple[int, int]], marks: Sequence[float], end: float | None = None
) -> np.ndarray:
    """Values of the tokens `(T,)` with those of every span moved to before the last; `(T + 3 * spans,)`.

    Args:
        marks: what stands in a span's old place and before it in its new one.
        end: what stands behind it; None is the value of its last token.
    """
    body, tail, done = [], [], 0
    for mark, (start, stop) in zip(marks, spans, strict=True):
        body += [values[done:start], [mark]]
        tail += [[mark], values[start:stop], [values[stop - 1] if end is None else end]]
        done = stop
    return np.concatenate([*body, values[done:-1], *tail, values[-1:]]).astype(values.dtype)


def _place(length: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """One of all ways to place `count` disjoint, non-empty spans in `range(length)`, uniformly.

    First and last tokens `p1 <= q1 < p2 <= q2 < ..` become strictly increasing when span k is stretched by one token
    and moved by k; so they are a sorted choice of 2 * count of length + count numbers.
    """
    drawn = sorted(_choose(length + count, 2 * count, rng))
    return [(drawn[2 * k] - k, drawn[2 * k + 1] - k) for k in range(count)]


def _choose(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` distinct numbers of `range(size)`, every set of them equally likely (Floyd's algorithm).

    numpy's `choice` does the same at ten times the cost for the two or four numbers that are wanted here.
    """
    chosen: set[int] = set()
    for top, number in zip(range(size - count, size), rng.random(count).tolist()):
        candidate = int(number * (top + 1))
        chosen.add(top if candidate in chosen else candidate)
    return list(chosen)
