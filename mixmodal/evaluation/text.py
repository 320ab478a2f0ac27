"""Likelihoods of texts of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixmodal.classification.likelihoods import LogLikelihoods, ScoredSequence, SequenceScorer
from mixmodal.document import Document, SequenceFormat, Text


def rolling_windows(format: SequenceFormat, text: str, max_seq_len: int) -> list[ScoredSequence]:
    """Sequences that score every piece of a text once.

    A text that the model's context takes is one sequence. Of a longer one, each sequence begins as a document does;
    those behind the first have half of their pieces from the one before, unscored, as context. The end is not scored.

    Args:
        format: spells the text.
        text: not empty.
        max_seq_len: of the model.

    Raises:
        SequenceError: for an empty text.
        ValueError: for a context that takes fewer than two pieces.
    """
    ids = format.spell(Document([Text(text)]))
    content = np.flatnonzero(format.vocabulary.is_content(ids))
    lead, pieces = ids[: content[0]], ids[content[0] : content[-1] + 1]
    room = max_seq_len - len(lead)
    if room < 2:
        raise ValueError(f"the model's context of {max_seq_len} takes {room} pieces of a text; at least 2 are needed")
    if len(pieces) <= room:
        return [_window(lead, pieces, 0)]
    step, windows = room // 2, [_window(lead, pieces[:room], 0)]
    for end in range(room, len(pieces), step):
        last = min(end + step, len(pieces))
        start = last - room
        windows.append(_window(lead, pieces[start:last], end - start))
    return windows


def _window(lead: np.ndarray, pieces: np.ndarray, unscored: int) -> ScoredSequence:
    scored = np.arange(len(lead) + len(pieces)) >= len(lead) + unscored
    return ScoredSequence(np.concatenate([lead, pieces]).astype(np.int64), scored)


def score_texts(scorer: SequenceScorer, texts: Sequence[str]) -> LogLikelihoods:
    """Log-likelihoods `(N,)` of whole texts, nats, and their numbers of pieces; see `rolling_windows`."""
    windows = [rolling_windows(scorer.format, text, scorer.model.config.max_seq_len) for text in texts]
    found = scorer.score([one for some in windows for one in some])
    owners = np.repeat(np.arange(len(texts)), [len(some) for some in windows])
    totals, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    np.add.at(totals, owners, found.totals)
    np.add.at(counts, owners, found.counts)
    return LogLikelihoods(totals, counts)
