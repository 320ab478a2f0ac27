"""Classification by the likelihood that the model gives: log p(image | text) or log p(text | image).

Shapes: P pictures, K classes, N sequences, B batch, T tokens, D model, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import Document, SequenceFormat
from mixmodal.models.attention import KVCache
from mixmodal.models.transformer import Transformer

Method = Literal["image_given_text", "text_given_image"]
METHODS: tuple[str, ...] = ("image_given_text", "text_given_image")
LATER_METHODS = ("diffusion", "contrastive")
TIE = 1e-5  # nats; float32 sums of equal sequences differ by less


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
        totals, counts = (
            np.zeros(len(sequences)),
            np.array([int(one.scored.sum()) for one in sequences], dtype=np.int64),
        )
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row].ids))  # little padding
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            totals[rows] = self._score_batch([sequences[row] for row in rows], None, restrict, any_end)
        return LogLikelihoods(totals, counts)

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
            totals.reshape(-1)[start : start + len(rows)] = self._score_batch(
                flat[start : start + len(rows)], branch, restrict=True, any_end=False
            )
        return totals

    @torch.inference_mode()
    def _score_batch(
        self, sequences: Sequence[ScoredSequence], cache: KVCache | None, restrict: bool, any_end: bool
    ) -> np.ndarray:
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
        found = [
            self._log_probabilities(hidden[chunk], targets[chunk], restrict, any_end)
            for chunk in self._chunks(len(rows))
        ]
        sums = torch.zeros(len(sequences), dtype=torch.float64)
        return sums.index_add(0, rows, torch.cat([*found, hidden.new_zeros(0)]).double().cpu()).numpy()

    def _chunks(self, length: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk_tokens) for start in range(0, length, self.chunk_tokens))

    def _log_probabilities(self, hidden: Tensor, targets: Tensor, restrict: bool, any_end: bool) -> Tensor:
        """Log-probabilities `(S,)` float32 of `targets` `(S,)` behind `hidden` `(S, D)`."""
        if not restrict:
            return self.model.logits(hidden).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        found = torch.zeros(len(targets), device=hidden.device)
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
            found[chosen] = logits.log_softmax(dim=1).gather(1, columns[:, None])[:, 0]
        return found

    def _end_logits(self, hidden: Tensor, any_end: bool) -> Tensor:
        """The logit `(S, 1)` of the end of a text."""
        ends = [self.vocabulary.eos]
        if any_end:
            ends += sorted({block.open_id for block in self.format.blocks.values()})
        columns = [self.model.logits(hidden, ids=slice(end, end + 1)) for end in ends]
        return torch.cat(columns, dim=1).logsumexp(dim=1, keepdim=True)


class Classification(NamedTuple):
    """What a classifier finds for P pictures and K classes, each `(P, K)`.

    Args:
        scores: what is compared, float64.
        probabilities: softmax of the scores over the classes (equal priors), float64.
        log_likelihoods: the sums in nats behind the scores, and their counts.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    log_likelihoods: LogLikelihoods

    @property
    def tied(self) -> np.ndarray:
        """Which classes share the best score, `(P, K)` bool: one in each row, or more where there is a tie."""
        return self.scores >= self.scores.max(axis=1, keepdims=True) - TIE


class AutoregressiveClassifier:
    """Which of a few texts fits a picture best, by the model's likelihoods.

    Args:
        scorer: the model and its batches.
        classes: a document for each class, of text.
        method: `image_given_text` scores log p(image | text); `text_given_image` scores log p(text | image).
        debias: alpha in log p(text | image) - alpha log p(text) (VisualGPTScore, arXiv 2306.01879): 1 leaves no credit
            for a text that is likely by itself. The second term is the text at the start of a document.
        length_normalise: divide by the number of tokens, for classes of unequal length.

    Raises:
        ValueError: for an unknown method, fewer than two classes, or an option that can not act on the method.
    """

    def __init__(
        self,
        scorer: SequenceScorer,
        classes: Sequence[Document],
        method: str,
        debias: float = 0.0,
        length_normalise: bool = False,
    ) -> None:
        check_method(method)
        if len(classes) < 2:
            raise ValueError(f"classification needs at least two classes, not {len(classes)}")
        if method == "image_given_text" and (debias or length_normalise):
            raise ValueError(
                "debias and length_normalise can not act on image_given_text: every picture has as many codes, and "
                "p(image) is the same for all classes; leave them out or use text_given_image"
            )
        self.scorer, self.format = scorer, scorer.format
        self.classes, self.method = list(classes), method
        self.debias, self.length_normalise = debias, length_normalise
        self.priors = self._priors() if debias else np.zeros(len(classes))

    def _priors(self) -> np.ndarray:
        """log p(text) of each class, `(K,)`, in nats."""
        empty = Document([])
        texts = [ScoredSequence(*self.format.spell_continuation(empty, text)) for text in self.classes]
        return self.scorer.score(texts, any_end=True).totals

    def score(self, images: Sequence[Document], before: Sequence[np.ndarray] | None = None) -> Classification:
        """Scores pictures, each a document of one image.

        Args:
            before: for each picture what the model reads before it and every class: what `format.prefix` gives for
                retrieved documents. The text alone, which `debias` takes off, is without: they are evidence, too.
        """
        if before is not None and len(before) != len(images):
            raise ValueError(f"{len(images)} pictures need as many sequences before them, not {len(before)}")
        given = self._given_text if self.method == "image_given_text" else self._given_image
        found = given(images, before)
        scores = found.totals - self.debias * self.priors
        if self.length_normalise:
            scores = scores / found.counts
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return Classification(scores, odds / odds.sum(axis=1, keepdims=True), found)

    def _given_text(self, images: Sequence[Document], before: Sequence[np.ndarray] | None) -> LogLikelihoods:
        pairs = [
            [ScoredSequence(*self.format.spell_continuation(text, image)) for text in self.classes] for image in images
        ]
        if before is not None:
            return self.scorer.score_continuations(before, [[pair.cut(1) for pair in row] for row in pairs])
        found = self.scorer.score([pair for row in pairs for pair in row])
        shape = (len(images), len(self.classes))
        return LogLikelihoods(found.totals.reshape(shape), found.counts.reshape(shape))

    def _given_image(self, images: Sequence[Document], before: Sequence[np.ndarray] | None) -> LogLikelihoods:
        prefixes = [self.format.spell_prompt(image, "text") for image in images]
        pairs = [
            [ScoredSequence(*self.format.spell_continuation(image, text)).cut(len(prefix)) for text in self.classes]
            for image, prefix in zip(images, prefixes)
        ]
        if before is not None:
            prefixes = [np.concatenate([first, prefix[1:]]) for first, prefix in zip(before, prefixes)]
        return self.scorer.score_continuations(prefixes, pairs)


def check_method(method: str) -> None:
    """Complains about a method that is not there.

    Raises:
        ValueError: naming the methods that are.
    """
    if method in METHODS:
        return
    known = "is not part of this version" if method in LATER_METHODS else "is unknown"
    raise ValueError(f"classification method {method!r} {known}; choose {' or '.join(METHODS)}")
