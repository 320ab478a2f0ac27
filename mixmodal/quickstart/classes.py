"""Classification of held-out pictures by likelihood: the true caption among others in the same style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mixmodal.classification.autoregressive import METHODS
from mixmodal.document import Document
from mixmodal.evaluation.concepts import rate
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.demo import Demo, choose, save_picture
from mixmodal.quickstart.scoring import Label, confusion_by_category, draw_candidates, top_confusions
from mixmodal.tokenization.preprocessing import to_pictures

EXAMPLES = 24
TOP = 12
NAMES = {"image_given_text": "p(image | caption)", "text_given_image": "p(caption | image)"}


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """What the classifier is asked.

    Args:
        num_candidates: captions to choose from, the true one among them.
        max_pictures: held-out pictures, drawn by the seed where there are more.
        debias: weight of log p(caption) that is taken from log p(caption | image); 1 leaves no credit for a caption
            that is likely by itself.
        seed: of the pictures and the candidates.
    """

    num_candidates: int = 10
    max_pictures: int = 200
    debias: float = 0.0
    seed: int = 0


def classify_heldout(run: Path, model: MixedModal, demo: Demo, config: ClassesConfig) -> dict[str, Any]:
    """Asks both directions about each held-out picture.

    Returns:
        For each method hits, count, confusion and most frequent mistakes, and a few examples with their pictures, which
        are saved under `run/classification`.
    """
    chosen = choose(demo.indices(heldout=True), config.max_pictures, config.seed)
    pictures = to_pictures(demo.images[chosen])
    images = [Document([image]) for image in model.codec.encode_pictures(pictures)]
    candidates = [
        draw_candidates(demo.labels, index, config.num_candidates - 1, np.random.default_rng((config.seed, index)))
        for index in chosen
    ]
    picked: dict[str, list[Label]] = {method: [] for method in METHODS}
    for image, places in track(list(zip(images, candidates, strict=True)), "classification"):
        captions = [demo.labels[place].caption for place in places]
        for method in METHODS:
            debias = config.debias if method == "text_given_image" else 0.0
            picked[method].append(demo.labels[places[best_class(model, captions, method, debias, image)]])
    true = [demo.labels[index] for index in chosen]
    results: dict[str, Any] = {"num_candidates": config.num_candidates, "debias": config.debias}
    for method in METHODS:
        results[method] = summarise(true, picked[method])
    results["examples"] = [
        {
            "image": save_picture(pictures[i], run, f"classification/{i:03d}.png"),
            "caption": true[i].caption,
            "methods": {
                NAMES[method]: {
                    "chosen": picked[method][i].caption,
                    "right": picked[method][i].concept == true[i].concept,
                }
                for method in METHODS
            },
        }
        for i in range(min(EXAMPLES, len(true)))
    ]
    return results


def best_class(model: MixedModal, captions: Sequence[str], method: str, debias: float, image: Document) -> int:
    """Index of the best caption; of a tie the last, so that the true one, which comes first, gains nothing."""
    tied = model.build_classifier(captions, method, debias=debias).score([image]).tied[0]
    return int(np.flatnonzero(tied)[-1])


def summarise(true: Sequence[Label], chosen: Sequence[Label]) -> dict[str, Any]:
    """Hits and mistakes of one method as plain data."""
    right = rate(left.concept == right.concept for left, right in zip(true, chosen, strict=True))
    confusion = confusion_by_category(true, chosen)
    return {
        "hits": right.hits,
        "trials": right.trials,
        "confusion": {"names": confusion.names, "counts": confusion.counts.tolist()},
        "top_confusions": [list(row) for row in top_confusions(true, chosen, TOP)],
    }
