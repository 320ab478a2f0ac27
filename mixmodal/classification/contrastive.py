"""Zero-shot classification by a two-tower encoder: CLIP (arXiv 2103.00020, section 3.1) or SigLIP (arXiv 2303.15343).

Shapes: P pictures, K classes, M templates, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.classification.calibration import softmax
from mixmodal.classification.likelihoods import LogLikelihoods
from mixmodal.classification.result import Classification
from mixmodal.classification.templates import PLACE, check_number, fill_templates
from mixmodal.retrieval.encoder import DocumentEncoder, normalise


class ContrastiveClassifier:
    """Which of a few captions is nearest to a picture.

    The score of a class is the model's logit, `scale * cosine + bias`. In several templates a class is the mean of
    its texts' vectors of length 1, brought to length 1 (arXiv 2103.00020, section 3.1.4).

    Args:
        encoder: what `load_encoder` gives: a folder of transformers, of `train-encoder`, or a hub id.
        classes: a caption for each class.
        templates: texts with `{}` where the caption goes.

    Raises:
        ValueError: for fewer than two classes, no template, or one without `{}`.
    """

    def __init__(self, encoder: DocumentEncoder, classes: Sequence[str], templates: Sequence[str] = (PLACE,)) -> None:
        check_number(len(classes))
        self.encoder = encoder
        self.vectors = embed_classes(encoder, fill_templates(templates, classes))

    def score(self, pictures: Sequence[Picture]) -> Classification:
        """Scores pictures of any size and mode.

        Probabilities are the softmax of the logits over the classes. The log-likelihood of a class is the logarithm of
        its probability among the classes for CLIP, and of the sigmoid of its logit, the probability that text and
        picture belong together, for SigLIP; its count is 1.
        """
        return classification_of(
            logits_of(self.encoder, self.encoder.embed_images(pictures), self.vectors), self.encoder.is_sigmoid
        )


def classification_of(logits: np.ndarray, is_sigmoid: bool) -> Classification:
    """The result of logits `(P, K)`, float64; see `ContrastiveClassifier.score`."""
    bounds = np.logaddexp(0, logits) if is_sigmoid else np.logaddexp.reduce(logits, axis=1, keepdims=True)
    totals = logits - bounds
    return Classification(logits, softmax(logits), LogLikelihoods(totals, np.ones(logits.shape, dtype=np.int64)))


def logits_of(encoder: DocumentEncoder, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The model's logits `(P, K)`, float64, of vectors of length 1 `(P, D)` and `(K, D)`."""
    return encoder.logit_scale * (images.astype(np.float64) @ texts.astype(np.float64).T) + encoder.logit_bias


def embed_classes(encoder: DocumentEncoder, classes: Sequence[Sequence[str]]) -> np.ndarray:
    """A vector for each class, float32 `(K, D)` of length 1, from as many texts for each, `(K, M)`.

    Equal texts have one vector, so that equal classes are tied.
    """
    texts = {text: place for place, text in enumerate(dict.fromkeys(text for row in classes for text in row))}
    vectors = encoder.embed_texts(list(texts)).astype(np.float64)
    rows = np.array([[texts[text] for text in row] for row in classes])
    return normalise(normalise(vectors)[rows].mean(axis=1)).astype(np.float32)
