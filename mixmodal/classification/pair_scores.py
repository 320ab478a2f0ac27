"""Scores of pictures with captions, by each kind of model: functions for `evaluate_compositions`.

Shapes: P pictures, C captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import AutoregressiveClassifier, score_images, score_texts
from mixmodal.classification.compositional import ScorePairs, ScorePictures
from mixmodal.classification.contrastive import embed_classes, logits_of
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.classification.units import Scorer, Unit
from mixmodal.document import Document, Text
from mixmodal.retrieval.encoder import DocumentEncoder
from mixmodal.tokenization.codec import Codec


def by_likelihood(scorer: SequenceScorer, codec: Codec, method: str, *, debias: float = 0.0) -> ScorePairs:
    """log p(image | text) or log p(text | image) in nats; see `AutoregressiveClassifier`."""

    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> np.ndarray:
        classes = [Document([Text(caption)]) for caption in captions]
        classifier = AutoregressiveClassifier(scorer, classes, method, debias)
        return classifier.score([Document([image]) for image in codec.encode_pictures(pictures)]).scores

    return score


def by_image_alone(scorer: SequenceScorer, codec: Codec) -> ScorePictures:
    """log p(image) in nats, at the start of a document."""

    def score(pictures: Sequence[Picture]) -> np.ndarray:
        return score_images(scorer, [Document([image]) for image in codec.encode_pictures(pictures)]).totals

    return score


def by_text_alone(scorer: SequenceScorer) -> ScorePairs:
    """log p(text) in nats, which looks at no picture: what a task gives away by its captions (arXiv 2306.01879)."""

    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> np.ndarray:
        found = score_texts(scorer, [Document([Text(caption)]) for caption in captions]).totals
        return np.repeat(found[None], len(pictures), axis=0)

    return score


def by_encoder(encoder: DocumentEncoder) -> ScorePairs:
    """Logits of a CLIP or SigLIP."""

    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> np.ndarray:
        vectors = embed_classes(encoder, [[caption] for caption in captions])
        return logits_of(encoder, encoder.embed_images(pictures), vectors)

    return score


def by_costs(build: Callable[[Sequence[Picture], Sequence[str]], Scorer], units: Sequence[Unit]) -> ScorePairs:
    """Minus the mean cost over units, the same for all pictures and captions: of a denoiser, for example.

    Costs are multiplied by `Unit.weight`, and by the scorer's `scale`, where it has one.

    Args:
        build: a scorer whose pictures and classes are these.
    """

    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> np.ndarray:
        scorer = build(pictures, captions)
        shape = (len(pictures), len(captions), len(units))
        picture, caption, unit = (places.reshape(-1).tolist() for places in np.indices(shape))
        costs = scorer.cost(picture, caption, [units[place] for place in unit]).reshape(shape)
        weights = np.array([one.weight for one in units])
        return -getattr(scorer, "scale", 1.0) * (costs * weights).mean(axis=2)

    return score
