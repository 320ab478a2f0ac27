"""Of several images drawn for a prompt the one that fits it best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mixmodal.classification.autoregressive import ScoredSequence, SequenceScorer
from mixmodal.document import Document, SequenceFormat, Text
from mixmodal.sampling.rules import TokenSampling


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


def keep_best(
    scorer: SequenceScorer,
    prompts: Sequence[tuple[Document, Sequence[np.ndarray]]],
    found: Sequence[Document],
    best_of: int,
) -> list[Document]:
    """Of every `best_of` candidates the one from which the model reads the text of its prompt best.

    By log p(text | image), as DALL-E re-ranks with CLIP (arXiv 2102.12092, 2.6).

    Args:
        prompts: of each candidate, with the documents before it: they are turned as it stands here, picture first.

    Raises:
        ValueError: for a prompt without text.
    """
    sequences: list[ScoredSequence] = []
    for (prompt, before), candidate in zip(prompts, found, strict=True):
        texts = texts_of(prompt)
        pictures = [part for part in prompt.parts if not isinstance(part, Text)]
        context = Document([*pictures, *candidate.parts])
        turned = [scorer.format.order_pair(ids, text_first=False) for ids in before]
        sequence = ScoredSequence(*scorer.format.spell_continuation(context, Document(texts)))
        sequences.append(sequence.behind(scorer.format.prefix(turned)))
    totals = scorer.score(sequences).totals.reshape(-1, best_of)
    return [found[group * best_of + int(place)] for group, place in enumerate(totals.argmax(axis=1))]
