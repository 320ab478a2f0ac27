"""How a stored document is varied before it is packed: captions dropped, pairs turned round, masks drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from mixmodal.data.packing import Sample
from mixmodal.data.source import Documents, Randomness
from mixmodal.document import Run, SequenceFormat
from mixmodal.objectives.causal_masked import TOKENS_PER_MASK, CausalMasked


class Variation:
    """Varies documents by random numbers of their own.

    Args:
        sequence_format: splits and joins them.
        objective: masks them.
        seq_len: length of a row in tokens; masks are drawn where they still fit.
        image_first_share, caption_dropout, first_part_weight: see `DataConfig`.
    """

    def __init__(
        self,
        sequence_format: SequenceFormat,
        objective: CausalMasked,
        *,
        seq_len: int,
        image_first_share: float,
        caption_dropout: float,
        first_part_weight: float,
    ) -> None:
        self.sequence_format, self.objective, self.seq_len = sequence_format, objective, seq_len
        self.image_first_share, self.caption_dropout = image_first_share, caption_dropout
        self.first_part_weight = first_part_weight
        self._keeps_length = not caption_dropout and not objective.config.draws
        vocabulary = sequence_format.vocabulary
        every_id = np.arange(vocabulary.size)
        self._is_text = vocabulary.contains("text", every_id) | vocabulary.contains("sentinel", every_id)
        self._is_code = vocabulary.is_content(every_id) & ~self._is_text

    def length(self, documents: Documents, index: int, randomness: Randomness) -> int:
        """Tokens that `vary` gives, known without reading the document in all but a share of `caption_dropout`.

        A document with less content than masks gets fewer of them: it may be a few tokens shorter.
        """
        stored = int(documents.lengths[index])
        if self._keeps_length:
            return stored
        rng = randomness.of(index)
        if self._draws_order(rng)[0]:
            ids = documents[index]
            text = self._is_text[ids]
            if text.any() and self._is_code[ids].any():
                num_parts = int(np.count_nonzero(text[1:] & ~text[:-1]))  # <s> stands before the first
                return stored - int(np.count_nonzero(text)) + num_parts
        return stored + TOKENS_PER_MASK * self.objective.draw_num_masks(stored, rng, self.seq_len)

    def vary(self, key: str, ids: np.ndarray, rng: np.random.Generator) -> Sample:
        """Drops the caption, or changes the order and draws masks."""
        drop, turn = self._draws_order(rng)
        if drop or turn:
            parts = _parts(self.sequence_format.split(ids))
            is_text = [part[0].modality == "text" for part in parts]
            if drop and any(is_text) and not all(is_text):
                mask = [Run("text", np.array([self.sequence_format.vocabulary.sentinel(0)]))]
                kept = [mask if text else part for part, text in zip(parts, is_text)]
                ids = self.sequence_format.join([run for part in kept for run in part])
                return self._sample(key, ids, self.objective.weigh(ids))
            if turn and sorted(is_text) == [False, True]:
                ids = self.sequence_format.join([run for part in parts[::-1] for run in part])
        return self._sample(key, *self.objective.apply(ids, rng, max_len=self.seq_len))

    def _draws_order(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """Whether the caption is dropped and whether a pair is turned round."""
        return rng.random() < self.caption_dropout, rng.random() < self.image_first_share

    def _sample(self, key: str, ids: np.ndarray, loss_weights: np.ndarray) -> Sample:
        """With the first part's weights, up to the first token that ends a part."""
        if self.first_part_weight != 1:
            vocabulary = self.sequence_format.vocabulary
            ends = np.flatnonzero((ids[2:] == vocabulary.break_) | (ids[2:] == vocabulary.end_of_span))
            if len(ends) and vocabulary.break_ in ids:
                loss_weights[: ends[0] + 2] *= self.first_part_weight
        return Sample(key, ids, loss_weights)


def _parts(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs with neighbouring texts (masks among them) taken together."""
    numbered = groupby(enumerate(runs), key=lambda item: -1 if item[1].modality == "text" else item[0])
    return [[run for _, run in part] for _, part in numbered]
