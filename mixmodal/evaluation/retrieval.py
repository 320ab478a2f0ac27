"""What retrieved documents are worth: the log-likelihood of a part with 0, 1, 2 .. of them before its document.

The control has random documents of the memory in their place: what they give is not what was retrieved but the form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.classification.likelihoods import ScoredSequence, SequenceScorer
from mixmodal.document import SequenceFormat, count_fitting
from mixmodal.retrieval.candidates import CandidateStore
from mixmodal.retrieval.memory import Memory

Kind = Literal["retrieved", "random"]


class Pair(NamedTuple):
    """A document of one text and one coded part.

    Args:
        sample: its number among the samples, which candidates go by.
        key: its name.
        ids: `(T,)`, what is scored last.
    """

    sample: int
    key: str
    ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a number of documents is worth, over all pairs.

    Args:
        predicted: modality of the part that is scored; the other part is given.
        kind: whether documents were retrieved for what is given, or are random.
        count: documents wanted before each pair.
        used: documents that stood there, on average: a pair can have fewer candidates, or no room.
        nats_per_token: negative log-likelihood of the part over its tokens, each among all ids, as in training; mean
            over pairs, so that a pair with a long text weighs no more than one with a short one.
        nats_less: how much that is below what it is without documents.
        nats_less_error: standard error of that mean, over pairs.
        num_pairs: how many were scored.
    """

    predicted: str
    kind: Kind
    count: int
    used: float
    nats_per_token: float
    nats_less: float
    nats_less_error: float
    num_pairs: int


class RetrievalAblation:
    """Scores pairs under numbers of documents.

    Args:
        scorer: the model and its batches.
        memory: what documents are read from.
        candidates: those of the pairs' samples. The text is scored with what the picture finds, the picture with what
            the text finds: what is scored never takes part in finding.
        room: tokens of the model's context.
    """

    def __init__(self, scorer: SequenceScorer, memory: Memory, candidates: CandidateStore, room: int) -> None:
        self.scorer, self.memory, self.candidates, self.room = scorer, memory, candidates, room
        self.format: SequenceFormat = scorer.format

    def measure(
        self, pairs: Sequence[Pair], predicted: str, counts: Sequence[int], num_random: int, seed: int
    ) -> list[Worth]:
        """One entry for each count of retrieved documents, and for each above 0 of random ones.

        Args:
            pairs: those with `predicted` last.
            predicted: modality that is scored.
            counts: of documents; 0 is what all others are compared with.
            num_random: draws of random documents for each pair, of which the mean counts.
            seed: of those draws.
        """
        alone, _ = self._score(pairs, lambda pair, draw: [], draws=1)
        found: list[Worth] = []
        for count in sorted({0, *counts}):
            kinds: list[Kind] = ["retrieved", "random"] if count else ["retrieved"]
            for kind in kinds:
                choose = self._retrieved(predicted, count) if kind == "retrieved" else self._random(count, seed)
                scores, used = self._score(pairs, choose, draws=num_random if kind == "random" else 1)
                less = (scores - alone).mean(axis=1)
                found.append(
                    Worth(
                        predicted=predicted,
                        kind=kind,
                        count=count,
                        used=used,
                        nats_per_token=float(-scores.mean()),
                        nats_less=float(less.mean()),
                        nats_less_error=float(less.std(ddof=1) / len(less) ** 0.5) if len(less) > 1 else float("nan"),
                        num_pairs=len(pairs),
                    )
                )
        return found

    def _retrieved(self, predicted: str, count: int) -> Callable[[Pair, int], Sequence[int]]:
        def choose(pair: Pair, draw: int) -> Sequence[int]:
            candidates = self.candidates[pair.sample]
            return (candidates.image if predicted == "text" else candidates.text)[:count].tolist()

        return choose

    def _random(self, count: int, seed: int) -> Callable[[Pair, int], Sequence[int]]:
        def choose(pair: Pair, draw: int) -> Sequence[int]:
            generator = np.random.default_rng((seed, pair.sample, draw))
            numbers = generator.choice(len(self.memory), min(count + 1, len(self.memory)), replace=False).tolist()
            return [number for number in numbers if self.memory.keys[number] != pair.key][:count]

        return choose

    def _score(
        self, pairs: Sequence[Pair], choose: Callable[[Pair, int], Sequence[int]], draws: int
    ) -> tuple[np.ndarray, float]:
        """Log-likelihood a token, `(pairs, draws)`, and the mean number of documents that stood before a pair."""
        sequences: list[ScoredSequence] = []
        used = 0
        for pair in pairs:
            for draw in range(draws):
                before = self._fitting(pair, choose(pair, draw))
                used += len(before)
                sequences.append(self._scored(before, pair.ids))
        found = self.scorer.score(sequences, restrict=False)
        return (found.totals / found.counts).reshape(len(pairs), draws), used / len(sequences)

    def _fitting(self, pair: Pair, numbers: Sequence[int]) -> list[np.ndarray]:
        """Documents as they stand, ordered as the pair is, the best one last; those that do not fit are left out."""
        text_first = self.format.split(pair.ids)[0].modality == "text"
        found = [self.format.order_pair(self.memory.ids(number), text_first=text_first) for number in numbers]
        return found[: count_fitting(map(len, found), self.room - len(pair.ids))][::-1]

    def _scored(self, before: Sequence[np.ndarray], ids: np.ndarray) -> ScoredSequence:
        """The chain, in which the tokens of the last part of `ids` are scored."""
        last = len(self.format.split(ids)[-1].ids)
        is_content = np.flatnonzero(self.format.vocabulary.is_content(ids))[-last:]
        chain = self.format.chain([*before, ids])
        scored = np.zeros(len(chain), bool)
        scored[len(chain) - len(ids) + is_content] = True
        return ScoredSequence(chain, scored)
