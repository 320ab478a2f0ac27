"""How likely a model takes documents to be, and what that tells of the class of a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import AutoregressiveClassifier
from mixmodal.classification.likelihoods import LogLikelihood, ScoredSequence, SequenceScorer
from mixmodal.classification.result import Classification
from mixmodal.classification.templates import PLACE, fill_templates
from mixmodal.document import Document, SequenceFormat, Text
from mixmodal.pipeline.prompts import Before, parts_of, spell_documents
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.tokenization.codec import Codec, Content


class Scoring:
    """What `MixedModal` scores."""

    codec: Codec
    format: SequenceFormat
    retrieve_for_classes: Callable[..., list[list[Retrieved]]]
    _scorer: SequenceScorer

    def log_likelihood(
        self, context: Sequence[Content], continuation: Sequence[Content], before: Sequence[Before] = ()
    ) -> LogLikelihood:
        """log p(continuation | before, context): a code competes with codes, a text piece with pieces and the end.

        Args:
            before: whole documents that the model reads before the context, as for `generate`; none is left out.

        Raises:
            ValueError: for an empty continuation, or more tokens than the model's context takes.
        """
        return self.log_likelihoods([(context, continuation)], before)[0]

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[Content], Sequence[Content]]], before: Sequence[Before] = ()
    ) -> list[LogLikelihood]:
        """`log_likelihood` of many pairs of a context and a continuation, `batch_size` in one forward."""
        prefix = self.format.prefix(spell_documents(self.codec, before))
        sequences: list[ScoredSequence] = []
        for context, continuation in pairs:
            known, wanted = self.codec.to_documents([parts_of(context), parts_of(continuation)])
            if not wanted.parts:
                raise ValueError("log_likelihood: the continuation is empty; give it at least one part")
            sequences.append(ScoredSequence(*self.format.spell_continuation(known, wanted)).behind(prefix))
        found = self._scorer.score(sequences)
        return [LogLikelihood(float(total), int(count)) for total, count in zip(found.totals, found.counts)]

    def build_classifier(
        self,
        classes: Sequence[str],
        method: str = "image_given_text",
        *,
        debias: float = 0.0,
        length_normalise: bool = False,
        templates: Sequence[str] = (PLACE,),
    ) -> AutoregressiveClassifier:
        """A classifier among captions; the options are those of `AutoregressiveClassifier`.

        Args:
            templates: texts with `{}` where the caption goes; a score is the mean over them.
        """
        documents = [[Document([Text(text)]) for text in texts] for texts in fill_templates(templates, classes)]
        return AutoregressiveClassifier(self._scorer, documents, method, debias, length_normalise)

    def score_classes(
        self,
        images: Sequence[Picture],
        classes: Sequence[str],
        method: str = "image_given_text",
        *,
        retrieve: int = 0,
        **options: Any,
    ) -> Classification:
        """Scores and probabilities of each class for each picture, `(P, K)`.

        Args:
            retrieve: documents of the attached memory that are read before every class; see `retrieve_for_classes`.
        """
        classifier = self.build_classifier(classes, method, **options)
        documents = [Document([image]) for image in self.codec.encode_pictures(images)]
        if not retrieve:
            return classifier.score(documents)
        found = self.retrieve_for_classes(images, classes, method, retrieve)
        return classifier.score(documents, [self.format.prefix([one.ids for one in row]) for row in found])

    def classify(self, image: Picture, classes: Sequence[str], method: str = "image_given_text", **options: Any) -> str:
        """The class whose caption fits the picture best, of equals the first; options are those of `score_classes`.

        Raises:
            ValueError: for an unknown method, or an option that can not act on it.
        """
        return classes[int(self.score_classes([image], classes, method, **options).scores[0].argmax())]
