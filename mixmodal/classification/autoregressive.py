"""Classification by the likelihood that the model gives: log p(image | text) or log p(text | image).

Shapes: P pictures, V documents of each, K classes, M documents of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixmodal.classification.calibration import softmax
from mixmodal.classification.likelihoods import LogLikelihoods, ScoredSequence, SequenceScorer
from mixmodal.classification.result import Classification
from mixmodal.classification.templates import check_number
from mixmodal.document import Document

METHODS: tuple[str, ...] = ("image_given_text", "text_given_image")

Variants = Document | Sequence[Document]
"""One document, or several of the same meaning: a class in several prompt templates, a picture tokenized in ways."""


class AutoregressiveClassifier:
    """Which of a few texts fits a picture best, by the model's likelihoods.

    Where classes or pictures are several documents, a score is the mean over all pairs of them: of log p rather than
    of p, the better form (arXiv 2603.19122, for orders; arXiv 2510.12060, for pictures tokenized several times).

    Args:
        scorer: the model and its batches.
        classes: a document of text for each class, or as many for each, in several templates.
        method: `image_given_text` scores log p(image | text); `text_given_image` scores log p(text | image).
        debias: alpha in log p(text | image) - alpha log p(text) (VisualGPTScore, arXiv 2306.01879): 1 leaves no credit
            for a text that is likely by itself. The second term is the text at the start of a document.
        length_normalise: divide by the number of tokens, for classes of unequal length.

    Raises:
        ValueError: for an unknown method, fewer than two classes, classes in unequal numbers of templates, or an
            option that can not act on the method.
    """

    def __init__(
        self,
        scorer: SequenceScorer,
        classes: Sequence[Variants],
        method: str,
        debias: float = 0.0,
        length_normalise: bool = False,
    ) -> None:
        check_method(method)
        check_number(len(classes))
        if method == "image_given_text" and (debias or length_normalise):
            raise ValueError(
                "debias and length_normalise can not act on image_given_text: every picture has as many codes, and "
                "p(image) is the same for all classes; leave them out or use text_given_image"
            )
        self.scorer, self.format = scorer, scorer.format
        self.classes, self.num_templates = flatten(classes, "class")
        self.shape = (len(classes), self.num_templates)
        self.method = method
        self.debias, self.length_normalise = debias, length_normalise
        self.priors = self._priors() if debias else np.zeros(self.shape)

    def _priors(self) -> np.ndarray:
        """log p(text) of each class in each template, `(K, M)`, in nats."""
        return score_texts(self.scorer, self.classes).totals.reshape(self.shape)

    def score(self, images: Sequence[Variants], before: Sequence[np.ndarray] | None = None) -> Classification:
        """Scores pictures, each a document of one image, or as many for each, tokenized in several ways.

        The log-likelihoods and counts of the result are sums over all documents of a picture and a class.

        Args:
            before: for each picture what the model reads before it and every class: what `format.prefix` gives for
                retrieved documents. The text alone, which `debias` takes off, is without: they are evidence, too.

        Raises:
            ValueError: for pictures in unequal numbers of documents, or another number of sequences before them.
        """
        if before is not None and len(before) != len(images):
            raise ValueError(f"{len(images)} pictures need as many sequences before them, not {len(before)}")
        documents, num_variants = flatten(images, "picture")
        if before is not None:
            before = [one for one in before for _ in range(num_variants)]
        given = self._given_text if self.method == "image_given_text" else self._given_image
        found = given(documents, before)
        shape = (len(images), num_variants, *self.shape)
        totals, counts = found.totals.reshape(shape), found.counts.reshape(shape)
        scores = totals - self.debias * self.priors
        if self.length_normalise:
            scores = scores / counts
        scores = scores.mean(axis=(1, 3))
        sums = LogLikelihoods(totals.sum(axis=(1, 3)), counts.sum(axis=(1, 3)))
        return Classification(scores, softmax(scores), sums)

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


def score_texts(scorer: SequenceScorer, texts: Sequence[Document]) -> LogLikelihoods:
    """log p(text) of documents of text at the start of a document, `(N,)`, in nats: what a blind reader expects."""
    rows = [ScoredSequence(*scorer.format.spell_continuation(Document([]), text)) for text in texts]
    return scorer.score(rows, any_end=True)


def score_images(scorer: SequenceScorer, images: Sequence[Document]) -> LogLikelihoods:
    """log p(image) of documents of one image at the start of a document, `(N,)`, in nats."""
    return scorer.score([ScoredSequence(*scorer.format.spell_continuation(Document([]), image)) for image in images])


def flatten(items: Sequence[Variants], what: str) -> tuple[list[Document], int]:
    """All documents of all items in order, and how many each has.

    Raises:
        ValueError: where some have more than others, or one has none.
    """
    rows = [[one] if isinstance(one, Document) else list(one) for one in items]
    numbers = sorted({len(row) for row in rows})
    if len(numbers) > 1 or numbers == [0]:
        raise ValueError(f"every {what} needs as many documents, at least one; there are some with {numbers}")
    return [document for row in rows for document in row], numbers[0] if numbers else 1


def check_method(method: str) -> None:
    """Complains about a method that is not there.

    Raises:
        ValueError: naming the methods that are.
    """
    if method in METHODS:
        return
    raise ValueError(f"classification method {method!r} is unknown; choose {' or '.join(METHODS)}")
