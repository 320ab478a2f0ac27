"""Log-likelihoods of marked tokens under the model, in batches.

Shapes: P prefixes, K continuations of each, N sequences, B batch, T tokens, D model, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import SequenceFormat
from mixmodal.models.attention import KVCache
from mixmodal.models.transformer import Transformer


class ScoredSequence(NamedTuple):
    """A whole document as ids `(T,)` int64, and which of its tokens count, `(T,)` bool."""

    ids: np.ndarray
    scored: np.ndarray

    def behind(self, prefix: np.ndarray) -> ScoredSequence:
        """The same document behind others, of which no token counts; `prefix` is what `format.prefix` gives."""
        unscored = np.zeros(len(prefix), dtype=bool)
        return ScoredSequence(np.concatenate([prefix, self.ids[1:]]), np.concatenate([unscored, self.scored[1:]]))

    def cut(self, start: int) -> ScoredSequence:
        """What stands behind the first `start` tokens."""
        return ScoredSequence(self.ids[start:], self.scored[start:])


class LogLikelihoods(NamedTuple):
    """Sums in nats, float64, and the number of tokens in them, int64, of equal shape."""

    totals: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class LogLikelihood:
    """A sum in nats, and the number of tokens in it.

    Args:
        total: log-likelihood, float64.
        count: scored tokens.
    """

    total: float
    count: int


Measure = Callable[[Tensor, Tensor], Tensor]
"""Something of each token, `(S,)`: of hidden states `(S, D)` and the tokens behind them `(S,)`."""


class SequenceScorer:
    """Log-likelihoods of marked tokens, in batches.

    A code competes with the codes of its modality only, and a text piece with the text pieces and `</s>`: what the
    grammar forbids takes no share, as in sampling.

    Args:
        model: the network, in evaluation mode.
        format: the sequence format it was trained on.
        batch_size: sequences in one forward.
        chunk_tokens: scored tokens whose logits stand in memory at once.
    """

    def __init__(
        self, model: Transformer, format: SequenceFormat, batch_size: int = 64, chunk_tokens: int = 2048
    ) -> None:
        self.model, self.format = model, format
        self.batch_size, self.chunk_tokens = batch_size, chunk_tokens
        self.vocabulary = format.vocabulary

    def score(
        self, sequences: Sequence[ScoredSequence], restrict: bool = True, any_end: bool = False
    ) -> LogLikelihoods:
        """Log-likelihoods `(N,)` of the scored tokens, each given all before it.

        Args:
            restrict: let a token compete with the legal ones only; otherwise with the whole vocabulary, as in training.
            any_end: count every token that can end a text as `</s>`: what the end of a text is where the document may
                go on with a picture.

        Raises:
            ValueError: for a sequence longer than the model's context.
        """
        counts = np.array([int(one.scored.sum()) for one in sequences], dtype=np.int64)
        return LogLikelihoods(self._sums(sequences, self._measure(restrict, any_end)), counts)

    def count_misses(self, sequences: Sequence[ScoredSequence]) -> np.ndarray:
        """How many scored tokens are not the likeliest of the legal ones, int64 `(N,)`; 0 is what greedy drawing gives.

        Raises:
            ValueError: for a sequence longer than the model's context.
        """
        return self._sums(sequences, self._misses).astype(np.int64)

    def _sums(self, sequences: Sequence[ScoredSequence], measure: Measure) -> np.ndarray:
        totals = np.zeros(len(sequences))
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row].ids))  # little padding
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            totals[rows] = self._sum_batch([sequences[row] for row in rows], None, measure)
        return totals

    def _measure(self, restrict: bool, any_end: bool) -> Measure:
        return lambda hidden, targets: self._log_probabilities(hidden, targets, restrict, any_end)

    def score_continuations(
        self, prefixes: Sequence[np.ndarray], continuations: Sequence[Sequence[ScoredSequence]]
    ) -> LogLikelihoods:
        """`score` of `prefix + continuation`, `(P, K)`, where each prefix is computed once and its cache repeated.

        Args:
            prefixes: P sequences `(T,)`, from `<s>` on; those of equal length are computed together.
            continuations: K for each prefix.
        """
        found = np.array([[int(one.scored.sum()) for one in row] for row in continuations], dtype=np.int64)
        totals = np.zeros(found.shape)
        num_pictures = max(1, self.batch_size // max(1, found.shape[1]))
        lengths = np.array([len(prefix) for prefix in prefixes])
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for start in range(0, len(rows), num_pictures):
                chosen = rows[start : start + num_pictures]
                totals[chosen] = self._score_branches(
                    *([some[row] for row in chosen] for some in (prefixes, continuations))
                )
        return LogLikelihoods(totals, found)

    @torch.inference_mode()
    def _score_branches(
        self, prefixes: Sequence[np.ndarray], continuations: Sequence[Sequence[ScoredSequence]]
    ) -> np.ndarray:
        device = self.model.embedding.weight.device
        shared = torch.from_numpy(np.stack(prefixes)[:, :-1]).to(device)  # the last token goes with each continuation
        width = max(len(one.ids) for row in continuations for one in row)
        cache = self.model.build_cache(len(prefixes), shared.shape[1] + 1 + width)
        if shared.shape[1]:
            self.model.hidden(shared, cache=cache)
        num_classes, totals = len(continuations[0]), np.zeros((len(prefixes), len(continuations[0])))
        flat = [
            ScoredSequence(np.append(prefix[-1], one.ids), np.append(False, one.scored))
            for prefix, row in zip(prefixes, continuations)
            for one in row
        ]
        for start in range(0, len(flat), self.batch_size):
            rows = torch.arange(start, min(start + self.batch_size, len(flat)), device=device)
            branch = cache.select(rows // num_classes)
            totals.reshape(-1)[start : start + len(rows)] = self._sum_batch(
                flat[start : start + len(rows)], branch, self._measure(restrict=True, any_end=False)
            )
        return totals

    @torch.inference_mode()
    def _sum_batch(self, sequences: Sequence[ScoredSequence], cache: KVCache | None, measure: Measure) -> np.ndarray:
        """What is measured of scored tokens, summed over each sequence."""
        device, width = self.model.embedding.weight.device, max(len(one.ids) for one in sequences)
        used = 0 if cache is None else cache.used
        if used + width > self.model.config.max_seq_len:
            raise ValueError(
                f"a sequence of {used + width} tokens does not fit into the model's context of "
                f"{self.model.config.max_seq_len}; shorten the text"
            )
        tokens = torch.full((len(sequences), width), self.vocabulary.pad)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, one in enumerate(sequences):
            tokens[row, : len(one.ids)] = torch.from_numpy(one.ids)
            scored[row, : len(one.ids)] = torch.from_numpy(one.scored)
        rows, places = scored.nonzero(as_tuple=True)  # (S,)
        targets = tokens[rows, places].to(device)
        hidden = self.model.hidden(tokens.to(device), cache=cache)[rows.to(device), places.to(device) - 1]  # (S, D)
        found = [measure(hidden[chunk], targets[chunk]) for chunk in self._chunks(len(rows))]
        sums = torch.zeros(len(sequences), dtype=torch.float64)
        return sums.index_add(0, rows, torch.cat([*found, hidden.new_zeros(0)]).double().cpu()).numpy()

    def _chunks(self, length: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk_tokens) for start in range(0, length, self.chunk_tokens))

    def _log_probabilities(self, hidden: Tensor, targets: Tensor, restrict: bool, any_end: bool) -> Tensor:
        """Log-probabilities `(S,)`, at least float32, of `targets` `(S,)` behind `hidden` `(S, D)`."""
        if not restrict:
            return self.model.logits(hidden).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        found = hidden.new_zeros(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for chosen, logits, columns in self._legal(hidden, targets, any_end):
            found[chosen] = logits.log_softmax(dim=1).gather(1, columns[:, None])[:, 0]
        return found

    def _misses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """1 for each of `targets` `(S,)` that is not the likeliest behind `hidden` `(S, D)`, else 0."""
        found = hidden.new_zeros(len(targets), dtype=torch.float32)
        for chosen, logits, columns in self._legal(hidden, targets, any_end=False):
            found[chosen] = (logits.argmax(dim=1) != columns).float()
        return found

    def _legal(self, hidden: Tensor, targets: Tensor, any_end: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For the targets of each modality: which they are, logits of what they compete with, and their columns."""
        for modality in self.vocabulary.modalities:
            span = self.vocabulary.ids(modality)
            chosen = self.vocabulary.contains(modality, targets)
            if modality == "text":
                chosen = chosen | (targets == self.vocabulary.eos)
            if not chosen.any():
                continue
            logits = self.model.logits(hidden[chosen], ids=slice(span.start, span.stop))
            columns = targets[chosen] - span.start
            if modality == "text":
                logits = torch.cat((logits, self._end_logits(hidden[chosen], any_end)), dim=1)
                columns = torch.where(targets[chosen] == self.vocabulary.eos, len(span), columns)
            yield chosen, logits, columns

    def _end_logits(self, hidden: Tensor, any_end: bool) -> Tensor:
        """The logit `(S, 1)` of the end of a text."""
        ends = [self.vocabulary.eos]
        if any_end:
            ends += sorted({block.open_id for block in self.format.blocks.values()})
        columns = [self.model.logits(hidden, ids=slice(end, end + 1)) for end in ends]
        return torch.cat(columns, dim=1).logsumexp(dim=1, keepdim=True)
