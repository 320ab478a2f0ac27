"""One classifier of pictures for each method, behind the same door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image as Picture

from mixmodal.classification.adaptation import AdaptedClassifier
from mixmodal.classification.adapted_diffusion import DiffusionFeedback
from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.classification.classifier import PictureClassifier, Scored
from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.keyed import digest_of
from mixmodal.classification.loading import LoadedModel, find_pipeline, load_model
from mixmodal.classification.measured import Measured, Wanted, measure, measuring_units
from mixmodal.classification.policies import Policy
from mixmodal.classification.result import Classification
from mixmodal.classification.templates import fill
from mixmodal.classification.variants import VariantsConfig, encode_variants
from mixmodal.files import hash_files
from mixmodal.interop.export import find_export
from mixmodal.pipeline.classify_config import ClassifyConfig
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.measuring import Chosen
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.reading import local_device, resolve_device
from mixmodal.retrieval.encoder import find_encoder, load_encoder
from mixmodal.retrieval.retriever import Retrieved


class AutoregressivePictures:
    """A mixmodal model as a classifier of pictures: mean log-likelihoods over prompt templates and variants.

    Args:
        model: with its memory, where documents are retrieved.
        classes: a caption for each.
        method: as `AutoregressiveClassifier`; so are the options.
        templates: texts with `{}` where the caption goes.
        variants: in how many ways a picture is tokenized; its noise depends on the picture alone.
        retrieve: documents that are read before every class.
        random_seed: see `MixedModal.retrieve`.
    """

    def __init__(
        self,
        model: MixedModal,
        classes: Sequence[str],
        method: str,
        *,
        templates: Sequence[str],
        variants: VariantsConfig,
        retrieve: int = 0,
        random_seed: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.method, self.variants = model, method, variants
        self.captions = [fill(template, one) for template in templates for one in classes]
        self.num_retrieved, self.random_seed = retrieve, random_seed
        self.classifier = model.build_classifier(classes, method, templates=templates, **options)
        self.evaluations = np.full(len(classes), len(templates) * variants.number, dtype=np.int64)

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Findings in the order of pictures, with `log_likelihoods` and `num_tokens` as sums over templates and
        variants. Each picture is encoded alone: how an encoder rounds depends on how many pictures it encodes."""
        documents = [encode_variants(self.model.codec, [one], [digest_of(one)], self.variants)[0] for one in pictures]
        read = self._retrieve(pictures) if self.num_retrieved else None
        form = self.model.format
        before = None if read is None else [form.prefix([one.ids for one in row]) for row in read]
        found = self.classifier.score(documents, before)
        details = [
            {"log_likelihoods": totals.tolist(), "num_tokens": counts.tolist()}
            for totals, counts in zip(found.log_likelihoods.totals, found.log_likelihoods.counts)
        ]
        if read is not None:
            details = [{**one, "retrieved": [each.to_dict() for each in row]} for one, row in zip(details, read)]
        return split(found, self.evaluations, details)

    def _retrieve(self, pictures: Sequence[Picture]) -> list[list[Retrieved]]:
        options = {"random_seed": self.random_seed}
        return self.model.retrieve_for_classes(pictures, self.captions, self.method, self.num_retrieved, **options)


class ContrastivePictures:
    """A CLIP or SigLIP as a classifier of pictures; each is embedded alone, so that it does not depend on others."""

    def __init__(self, classifier: ContrastiveClassifier) -> None:
        self.classifier = classifier

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Findings in the order of pictures; one evaluation is a pass of the picture tower, shared by all classes."""
        found = [self.classifier.score([picture]) for picture in pictures]
        return [split(one, np.ones(one.scores.shape[1], dtype=np.int64), [{}])[0] for one in found]


class AdaptedPictures:
    """A CLIP or SigLIP that is adapted to each picture alone, by draws that depend on its pixels and the seed alone."""

    def __init__(self, classifier: AdaptedClassifier) -> None:
        self.classifier = classifier

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Findings in the order of pictures after adaptation, with the scores `before` and the `losses` of the steps.

        Evaluations are passes of the denoiser, a draw of a step each, and of the picture tower: one before, one a step
        and one after. All classes share them, so each class has them all.
        """
        found = self.classifier.score(pictures, [digest_of(one) for one in pictures])
        config, num_classes = self.classifier.config, found.after.scores.shape[1]
        passes = np.full(num_classes, config.num_steps * config.num_draws + config.num_steps + 2, dtype=np.int64)
        rows = zip(found.before.scores, found.losses, strict=True)
        return split(found.after, passes, [{"before": one.tolist(), "losses": two.tolist()} for one, two in rows])


class DiffusionPictures:
    """A diffusion model as a classifier of pictures: races of the classes over shared times and noises."""

    def __init__(self, scorer: DiffusionScorer, policy: Policy, config: EliminationConfig) -> None:
        self.scorer, self.policy, self.config = scorer, policy, config
        self.elimination = Elimination(scorer, len(scorer.classes), policy, config)

    def measure(self, chosen: Chosen, wanted: Wanted) -> Measured:
        """Fits what is wanted on pictures; nothing of the classifier changes, see `use`.

        Raises:
            ValueError: see `measured.measure`.
        """
        units = measuring_units(self.config.seed, self.config.num_templates)
        rows = []
        for picture in chosen.pictures:  # one at a time: with many classes the triples alone are many
            self.scorer.set_pictures([picture])
            rows.append(self.scorer.error_table(units))
        times, options = np.array([unit.time for unit in units]), self.scorer.config
        return measure(
            np.concatenate(rows), times, wanted, options.weighting, self.scorer.adapter.schedule, chosen.labels
        )

    def use(self, measured: Measured) -> None:
        """Takes what was measured for all pictures from now on."""
        if measured.weighting is not None:
            self.scorer.config = replace(self.scorer.config, weighting=measured.weighting)
        num_classes = len(self.scorer.classes)
        self.elimination = Elimination(self.scorer, num_classes, self.policy, self.config, measured.density)

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Findings in the order of pictures, with costs, standard errors of their distance to the best, and rounds."""
        self.scorer.set_pictures(pictures)
        return [
            Scored(
                scores=one.logits,
                probabilities=one.probabilities,
                tied=one.tied,
                evaluations=one.evaluations,
                details={
                    "costs": one.costs.tolist(),
                    "standard_errors": [float(error) if np.isfinite(error) else None for error in one.standard_errors],
                    "num_rounds": one.num_rounds,
                },
            )
            for one in self.elimination.score(range(len(pictures)))
        ]


def split(found: Classification, evaluations: np.ndarray, details: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """A result picture by picture."""
    rows = zip(found.scores, found.probabilities, found.tied, details, strict=True)
    return [
        Scored(scores=scores, probabilities=probabilities, tied=tied, evaluations=evaluations, details=more)
        for scores, probabilities, tied, more in rows
    ]


def build_autoregressive(
    config: ClassifyConfig, classes: Sequence[str], templates: Sequence[str]
) -> AutoregressivePictures:
    """From an exported model."""
    device = local_device(config.device)
    model = MixedModal.from_pretrained(config.model, device, DTYPES[config.dtype], config.batch_size, config.adapter)
    config.attach(model)
    return AutoregressivePictures(
        model,
        classes,
        config.method,
        templates=templates,
        variants=config.variants,
        retrieve=config.retrieve,
        random_seed=config.random_seed,
        debias=config.debias,
        length_normalise=config.length_normalise,
    )


def build_contrastive(
    config: ClassifyConfig, classes: Sequence[str], templates: Sequence[str]
) -> ContrastivePictures | AdaptedPictures:
    """From a folder of transformers, of `train-encoder`, or a hub id; with a denoiser where it is adapted.

    Raises:
        ValueError: naming the denoiser, where it can not be read or told texts.
    """
    encoder = load_encoder(config.model, resolve_device(config.device), config.batch_size)
    classifier = ContrastiveClassifier(encoder, classes, templates)
    if config.adapt.denoiser is None:
        return ContrastivePictures(classifier)
    dtype = DTYPES[config.dtype] or torch.float32
    loaded = load_diffusion(config.adapt.denoiser, resolve_device(config.device), dtype)
    try:
        feedback = DiffusionFeedback(loaded.adapter, classes, templates[0], config.batch_size)
    except ValueError as error:
        raise ValueError(f"adapt.denoiser {loaded.name}: {error}") from error
    adaptation = config.adapt.build_config(config.seed)
    return AdaptedPictures(
        AdaptedClassifier(classifier, feedback.prepare, feedback.embeddings, feedback.noise_shape, adaptation)
    )


def load_diffusion(model: str, device: str, dtype: torch.dtype, image_size: int | None = None) -> LoadedModel:
    """`load_model`, which prints what speaks against the model."""
    loaded = load_model(model, device, dtype, image_size)
    if loaded.adapter.caution:
        print(f"{model}: {loaded.adapter.caution}")
    return loaded


def build_diffusion(config: ClassifyConfig, classes: Sequence[str], templates: Sequence[str]) -> DiffusionPictures:
    """From a pipeline of diffusers, what `train-diffusion` exports, or a hub id."""
    options = config.diffusion
    dtype = DTYPES[config.dtype] or torch.float32
    loaded = load_diffusion(config.model, resolve_device(config.device), dtype, options.image_size)
    scorer = DiffusionScorer(
        loaded.adapter,
        classes,
        templates,
        options.build_scorer_config(config.seed, config.batch_size),
        options.build_cache(loaded.name, loaded.revision),
    )
    race = EliminationConfig(batch_size=config.batch_size, seed=config.seed, num_templates=len(templates))
    return DiffusionPictures(scorer, options.build_policy(), race)


Build = Callable[[ClassifyConfig, Sequence[str], Sequence[str]], PictureClassifier]


class Method(NamedTuple):
    """How a method's model is found and made a classifier of captions in templates."""

    build: Build
    find: Callable[[str], Path]


METHODS: dict[str, Method] = {
    **dict.fromkeys(AUTOREGRESSIVE, Method(build_autoregressive, find_export)),
    "diffusion": Method(build_diffusion, find_pipeline),
    "contrastive": Method(build_contrastive, find_encoder),
}


def hash_model(method: str, model: str) -> str:
    """SHA-256 over the names and contents of all files of a model's folder but its card, hexadecimal.

    Raises:
        ValueError: where there is no such model.
    """
    folder = METHODS[method].find(model)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    names = [path.relative_to(folder) for path in files]
    return hash_files(
        (name.as_posix(), path)
        for name, path in zip(names, files, strict=True)
        if not any(part.startswith(".") for part in name.parts)
    )
