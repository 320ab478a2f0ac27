"""One classifier of pictures for each method, behind the same door."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.classification.calibration import softmax
from mixmodal.classification.classifier import PictureClassifier, Scored
from mixmodal.document import Document
from mixmodal.files import sha256_of
from mixmodal.interop.export import find_export
from mixmodal.pipeline.classify_config import ClassifyConfig
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.reading import local_device
from mixmodal.retrieval.retriever import Retrieved


class AutoregressivePictures:
    """A mixmodal model as a classifier of pictures: mean log-likelihoods over prompt templates.

    The mean is of log p, not of p (arXiv 2603.19122 finds it the better one). Each picture is encoded alone: how an
    encoder rounds depends on how many pictures it encodes.

    Args:
        model: with its memory, where documents are retrieved.
        captions: for each template the K classes.
        method: as `AutoregressiveClassifier`; so are the options.
        retrieve: documents that are read before every class.
        random_seed: see `MixedModal.retrieve`.
    """

    def __init__(
        self,
        model: MixedModal,
        captions: Sequence[Sequence[str]],
        method: str,
        *,
        retrieve: int = 0,
        random_seed: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.captions, self.method = model, captions, method
        self.num_retrieved, self.random_seed = retrieve, random_seed
        self.classifiers = [model.build_classifier(texts, method, **options) for texts in captions]

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Findings in the order of pictures, with `log_likelihoods` and `num_tokens` as sums over templates."""
        documents = [Document(self.model.codec.encode_pictures([picture])) for picture in pictures]
        read = self._retrieve(pictures) if self.num_retrieved else None
        form = self.model.format
        before = None if read is None else [form.prefix([one.ids for one in row]) for row in read]
        found = [classifier.score(documents, before) for classifier in self.classifiers]
        mean = found[0]._replace(scores=np.mean([one.scores for one in found], axis=0))
        tied, probabilities = mean.tied, softmax(mean.scores)
        totals = sum(one.log_likelihoods.totals for one in found)
        counts = sum(one.log_likelihoods.counts for one in found)
        evaluations = np.full(len(self.captions[0]), len(found), dtype=np.int64)
        scored = []
        for row in range(len(pictures)):
            details: dict[str, Any] = {
                "log_likelihoods": np.asarray(totals)[row].tolist(),
                "num_tokens": np.asarray(counts)[row].tolist(),
            }
            if read is not None:
                details["retrieved"] = [one.to_dict() for one in read[row]]
            scored.append(
                Scored(
                    scores=mean.scores[row],
                    probabilities=probabilities[row],
                    tied=tied[row],
                    evaluations=evaluations,
                    details=details,
                )
            )
        return scored

    def _retrieve(self, pictures: Sequence[Picture]) -> list[list[Retrieved]]:
        captions = [caption for texts in self.captions for caption in texts]
        options = {"random_seed": self.random_seed}
        return self.model.retrieve_for_classes(pictures, captions, self.method, self.num_retrieved, **options)


def build_autoregressive(config: ClassifyConfig, captions: Sequence[Sequence[str]]) -> PictureClassifier:
    """From an exported model."""
    device = local_device(config.device)
    model = MixedModal.from_pretrained(config.model, device, DTYPES[config.dtype], config.batch_size)
    config.attach(model)
    return AutoregressivePictures(
        model,
        captions,
        config.method,
        retrieve=config.retrieve,
        random_seed=config.random_seed,
        debias=config.debias,
        length_normalise=config.length_normalise,
    )


Build = Callable[[ClassifyConfig, Sequence[Sequence[str]]], PictureClassifier]
BUILDERS: Mapping[str, Build] = dict.fromkeys(AUTOREGRESSIVE, build_autoregressive)
"""By method, what loads a model and gives a classifier of captions, by template and then class."""
NEEDS = {
    "diffusion": "needs a diffusion model, whose scorer is not part of this version",
    "contrastive": "needs a CLIP or SigLIP, whose scorer is not part of this version",
}
"""Methods that are known and have no builder yet: what they need."""


def check_method(method: str) -> None:
    """Complains about a method that has no builder.

    Raises:
        ValueError: saying what it needs, or naming the methods that are.
    """
    if method not in BUILDERS:
        known = NEEDS.get(method, "is unknown")
        raise ValueError(f"classification method {method!r} {known}; choose {' or '.join(BUILDERS)}")


def build_classifier(config: ClassifyConfig, captions: Sequence[Sequence[str]]) -> PictureClassifier:
    """The classifier of a method; this loads its model.

    Args:
        captions: for each template the K classes.

    Raises:
        ValueError: for an unknown method, a model that can not be loaded, or an option that can not act.
    """
    check_method(config.method)
    return BUILDERS[config.method](config, captions)


def hash_model(model: str) -> str:
    """SHA-256 over the names and contents of all files of a model's folder but its card, hexadecimal.

    Raises:
        ValueError: where there is no such model.
    """
    folder, digest = find_export(model), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
