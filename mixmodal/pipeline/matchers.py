"""Scores of pictures with captions for each method, behind the same door."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.classification.compositional import ScorePairs, ScorePictures
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.classification.pair_scores import by_costs, by_encoder, by_image_alone, by_likelihood, by_text_alone
from mixmodal.pipeline.classifiers import load_diffusion
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.match_config import MatchConfig
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.reading import local_device, resolve_device
from mixmodal.retrieval.encoder import load_encoder


class Matcher(NamedTuple):
    """What a line of a task is scored by.

    Args:
        pairs: pictures with captions.
        pictures: log p(image), where the scores are log p(image | text).
        blind: log p(text), where there is a model that has it.
    """

    pairs: ScorePairs
    pictures: ScorePictures | None
    blind: ScorePairs | None


def build_matcher(config: MatchConfig) -> Matcher:
    """Loads what the method needs.

    Raises:
        ValueError: naming a model that is not there, or of another kind.
    """
    blind = None if config.blind is None else by_text_alone(load_ours(config, config.blind)[1])
    if config.method in AUTOREGRESSIVE:
        model, scorer = load_ours(config, config.model, config.adapter)
        pairs = by_likelihood(scorer, model.codec, config.method, debias=config.debias)
        pictures = by_image_alone(scorer, model.codec) if config.method == "image_given_text" else None
        return Matcher(pairs, pictures, blind or by_text_alone(scorer))
    return Matcher(by_denoising(config) if config.method == "diffusion" else by_logits(config), None, blind)


def load_ours(config: MatchConfig, source: str, adapter: Path | None = None) -> tuple[MixedModal, SequenceScorer]:
    """An exported model, with an adapter of it where one is given, and what scores its sequences."""
    device = local_device(config.device)
    model = MixedModal.from_pretrained(source, device, DTYPES[config.dtype], config.batch_size, adapter)
    return model, SequenceScorer(model.model, model.format, config.batch_size)


def by_logits(config: MatchConfig) -> ScorePairs:
    """From a folder of transformers, of `train-encoder`, or a hub id."""
    return by_encoder(load_encoder(config.model, resolve_device(config.device), config.batch_size))


def by_denoising(config: MatchConfig) -> ScorePairs:
    """From a pipeline of diffusers, what `train-diffusion` exports, or a hub id."""
    options = config.diffusion
    dtype = DTYPES[config.dtype] or torch.float32
    loaded = load_diffusion(config.model, resolve_device(config.device), dtype, options.image_size)
    settings = options.build_scorer_config(config.seed, config.batch_size)
    cache = options.build_cache(loaded.name, loaded.revision)

    def build(pictures: Sequence[Picture], captions: Sequence[str]) -> DiffusionScorer:
        found = DiffusionScorer(loaded.adapter, captions, config=settings, cache=cache, free_text_encoders=False)
        found.set_pictures(pictures)
        return found

    return by_costs(build, options.build_policy().build_units(seed=config.seed))
