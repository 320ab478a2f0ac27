"""Of several images drawn for a prompt the one that fits it best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixmodal.classification.likelihoods import ScoredSequence, SequenceScorer
from mixmodal.document import Document, EndOfTurn, SequenceFormat, Text
from mixmodal.retrieval.encoder import DocumentEncoder
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Codec

Asked = tuple[Document, Sequence[np.ndarray]]
"""A prompt, and ids `(T,)` of the whole documents before it."""
Rank = Callable[[Sequence[Asked], Sequence[Document]], np.ndarray]
"""The score `(n,)` of each candidate for its prompt; the highest is best."""


def check_best_of(format: SequenceFormat, output: str, sampling: Mapping[str, TokenSampling], best_of: int) -> None:
    """Whether there is something to choose among.

    Raises:
        ValueError: where there is not.
    """
    if best_of > 1 and (output not in format.blocks or not sampling[output].temperature):
        raise ValueError("best_of chooses among images that differ; it needs output image and a temperature above 0")


def texts_of(prompt: Document) -> list[Text]:
    """What images are compared with.

    Raises:
        ValueError: for a prompt without text.
    """
    texts = [part for part in prompt.parts if isinstance(part, Text)]
    if not texts:
        raise ValueError("best_of compares images with the prompt's text, and the prompt has none; leave it at 1")
    return texts


def rank_by_likelihood(scorer: SequenceScorer) -> Rank:
    """How well the model reads the text of the prompt from a candidate: log p(text | image), nats.

    Documents before a prompt are turned as it stands here, picture first.
    """

    def rank(prompts: Sequence[Asked], found: Sequence[Document]) -> np.ndarray:
        sequences: list[ScoredSequence] = []
        for (prompt, before), candidate in zip(prompts, found, strict=True):
            pictures = [part for part in prompt.parts if not isinstance(part, Text | EndOfTurn)]
            context = Document([*pictures, *candidate.parts])
            turned = [scorer.format.order_pair(ids, text_first=False) for ids in before]
            sequence = ScoredSequence(*scorer.format.spell_continuation(context, Document(texts_of(prompt))))
            sequences.append(sequence.behind(scorer.format.prefix(turned)))
        return scorer.score(sequences).totals

    return rank


def rank_by_encoder(encoder: DocumentEncoder, codec: Codec) -> Rank:
    """How near a candidate is to the text of the prompt: the cosine of their vectors, as DALL-E ranks by CLIP."""

    def rank(prompts: Sequence[Asked], found: Sequence[Document]) -> np.ndarray:
        texts = [" ".join(text.text for text in texts_of(prompt)) for prompt, _ in prompts]
        pictures = codec.decode_images([part for candidate in found for part in candidate.parts[-1:]])  # type: ignore[misc]
        return (encoder.embed_texts(texts) * encoder.embed_images(pictures)).sum(axis=1)

    return rank


def keep_best(rank: Rank, prompts: Sequence[Asked], found: Sequence[Document], best_of: int) -> list[Document]:
    """Of every `best_of` candidates the one that `rank` puts first (arXiv 2102.12092, 2.6).

    Args:
        prompts: of each candidate.

    Raises:
        ValueError: for a prompt without text.
    """
    scores = rank(prompts, found).reshape(-1, best_of)
    return [found[group * best_of + int(place)] for group, place in enumerate(scores.argmax(axis=1))]
