"""How a stored document is varied before it is packed: captions dropped, pairs turned round, masks drawn.

Documents that were retrieved for it stand before it and are turned round with it; masks are drawn in all of them.
A document may say which of its tokens carry loss, as conversations do; masks move that with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mixmodal.data.packing import TrainingDocument
from mixmodal.data.source import Documents, LossDocuments, Randomness, Source
from mixmodal.document import Run, SequenceFormat
from mixmodal.objectives.causal_masked import TOKENS_PER_MASK, CausalMasked


def check_loss_flags(
    sources: Mapping[str, Source], loss_on: Literal["flagged", "all"], shares: Mapping[str, Mapping[str, float]]
) -> None:
    """Whether what documents say of their loss is kept, or left out where there is some.

    Args:
        sources: of a mixture, by name.
        loss_on: see `DataConfig`.
        shares: `image_first_share` and `caption_dropout` of each source.

    Raises:
        ValueError: naming the source and what to change.
    """
    if loss_on == "flagged":
        for name, source in sources.items():
            check_loss_kept(source, **shares[name])
    elif not any(_has_loss(source) for source in sources.values()):
        labels = ", ".join(source.label for source in sources.values())
        raise ValueError(
            f"data.loss_on all can not act: no document of {labels} says which tokens carry loss, as conversations do; "
            "leave it out"
        )


def _has_loss(source: Source) -> bool:
    return isinstance(source.documents, LossDocuments) and source.documents.has_loss


def check_loss_kept(source: Source, *, image_first_share: float, caption_dropout: float) -> None:
    """Whether documents that say which tokens carry loss keep that in all that they are varied by.

    The masks of `CausalMasked` move it with the tokens. Turning pairs round, dropping texts and putting documents
    before others do not, and are refused.

    Raises:
        ValueError: naming the source and what to change.
    """
    if not _has_loss(source):
        return
    shares = {"image_first_share": image_first_share, "caption_dropout": caption_dropout}
    found = [f"{name} from {share:g} to 0" for name, share in shares.items() if share]
    alone = ", or for this source alone in data.sources" if found else ""
    found += ["candidates to none"] if source.retrieval is not None else []
    if found:
        raise ValueError(
            f"{source.label}: its documents are conversations, which say which tokens carry loss; what moves or drops "
            f"tokens would lose that. Set {', '.join(found)}{alone}"
        )


class Variation:
    """Varies documents by random numbers of their own.

    Args:
        sequence_format: splits and joins them.
        objective: masks them.
        seq_len: length of a row in tokens; masks are drawn where they still fit.
        image_first_share, caption_dropout, first_part_weight: see `DataConfig`.
        retrieved_weight: factor on the loss weights of retrieved documents.
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
        retrieved_weight: float = 1.0,
    ) -> None:
        self.sequence_format, self.objective, self.seq_len = sequence_format, objective, seq_len
        self.image_first_share, self.caption_dropout = image_first_share, caption_dropout
        self.first_part_weight, self.retrieved_weight = first_part_weight, retrieved_weight
        self._keeps_length = not caption_dropout and not objective.config.draws
        vocabulary = sequence_format.vocabulary
        every_id = np.arange(vocabulary.size)
        self._is_text = vocabulary.contains("text", every_id) | vocabulary.contains("sentinel", every_id)
        self._is_code = vocabulary.is_content(every_id) & ~self._is_text

    def length(self, documents: Documents, index: int, randomness: Randomness, before: int = 0) -> int:
        """Tokens that `vary` gives, known without reading the document in all but a share of `caption_dropout`.

        A document with less content than masks gets fewer of them: it may be a few tokens shorter.

        Args:
            before: tokens of what was retrieved for it.
        """
        stored = int(documents.lengths[index]) + before
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

    def vary(
        self,
        key: str,
        ids: np.ndarray,
        rng: np.random.Generator,
        before: Sequence[np.ndarray] = (),
        loss: np.ndarray | None = None,
    ) -> TrainingDocument:
        """Drops the caption, or changes the order and draws masks.

        Args:
            key, ids: of the document.
            rng: the source of all randomness.
            before: ids of whole documents that stand before it in its segment.
            loss: which of its tokens carry loss, bool `(T,)`; None is all of them. See `check_loss_kept`.
        """
        drop, turn = self._draws_order(rng)
        masked = drop and self._is_mixed(ids)
        if masked:
            ids = self._without_text(ids)
        elif turn and (turned := self.sequence_format.turn_pair(ids)) is not None:
            ids = turned
        if before:
            text_first = bool(self._is_text[ids[1]])
            before = [self.sequence_format.order_pair(one, text_first=text_first) for one in before]
        factors = self._factors([*before, ids])
        if loss is not None:
            factors = loss.astype(np.float32) if factors is None else factors * loss
        chain = self.sequence_format.chain([*before, ids]) if before else ids
        if masked:
            weights = self.objective.weigh(chain)
            return TrainingDocument(key, chain, weights if factors is None else weights * factors)
        return TrainingDocument(key, *self.objective.apply(chain, rng, self.seq_len, factors))

    def _draws_order(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """Whether the caption is dropped and whether a pair is turned round."""
        return rng.random() < self.caption_dropout, rng.random() < self.image_first_share

    def _is_mixed(self, ids: np.ndarray) -> bool:
        """Whether text stands beside codes."""
        return bool(self._is_text[ids].any() and self._is_code[ids].any())

    def _without_text(self, ids: np.ndarray) -> np.ndarray:
        """With `<mask:0>` for every text; ends of turns stay."""
        mask = [Run("text", np.array([self.sequence_format.vocabulary.sentinel(0)]))]
        parts = self.sequence_format.group_texts(self.sequence_format.split(ids))
        kept = [mask if self._is_text[part[0].ids[0]] else part for part in parts]
        return self.sequence_format.join([run for part in kept for run in part])

    def _factors(self, documents: Sequence[np.ndarray]) -> np.ndarray | None:
        """On the loss weights of the documents' chain, float32 `(T,)`; None where all are 1.

        The last document is the one that is trained on; the token behind a retrieved one counts to it.
        """
        if self.first_part_weight == 1 and (self.retrieved_weight == 1 or len(documents) == 1):
            return None
        vocabulary = self.sequence_format.vocabulary
        factors = np.ones(sum(len(ids) - 1 for ids in documents) + 1, np.float32)
        start = 0
        for place, ids in enumerate(documents):
            own = factors[start + 1 : start + len(ids)]  # without what stands before its first part
            if place < len(documents) - 1:
                own *= self.retrieved_weight
            ends = np.flatnonzero((ids[2:] == vocabulary.break_) | (ids[2:] == vocabulary.end_of_span))
            if len(ends) and ids[ends[0] + 3 : -1].size:
                own[: ends[0] + 1] *= self.first_part_weight
            start += len(ids) - 1
        return factors
