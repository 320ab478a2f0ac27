"""The classify command: zero-shot classification of a folder of pictures by likelihood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import check_method
from mixmodal.classification.evaluate import evaluate_classifier, read_classes, read_pictures
from mixmodal.data.skipping import SkipCounter
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.reading import ReadingConfig
from mixmodal.retrieval.retriever import Retrieved


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(ReadingConfig):
    """Classifies pictures among captions by the likelihood that the model gives.

    With `--memory DIR --retrieve N` the model reads the documents of a memory that are nearest to the picture, the same
    before every class. A memory that holds the pictures themselves, with their captions, gives the answers away.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        data: folder of pictures, in subfolders named by their label where that is known, or of shards.
        classes: text file with one class a line: its caption, or its label, a tab and its caption.
        out: JSON file for scores and probabilities of every picture, accuracy and confusion.
        method: `image_given_text` scores log p(image | text), `text_given_image` scores log p(text | image).
        template: text around the caption, as `a photo of {}`.
        debias: alpha in log p(text | image) - alpha log p(text); for `text_given_image` only.
        length_normalise: divide scores by the number of tokens; for `text_given_image` only.
        max_skipped_share: share of broken pictures, 0 .. 1, above which the job fails.
        batch_size: sequences in one forward; scores do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    data: Path
    classes: Path
    out: Path
    method: str = "image_given_text"
    template: str = "{}"
    debias: float = 0.0
    length_normalise: bool = False
    max_skipped_share: float = 0.05
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"


def classify(config: ClassifyConfig) -> None:
    """Scores every picture, writes the report and says where.

    Raises:
        ValueError: for an unknown method, bad classes or data, or too many broken pictures.
    """
    check_method(config.method)
    classes = read_classes(config.classes, config.template)
    counter = SkipCounter(config.max_skipped_share)
    pictures = read_pictures(config.data, classes, counter)
    model = MixedModal.from_pretrained(config.model, config.device, DTYPES[config.dtype], config.batch_size)
    captions = [one.caption for one in classes]
    classifier = model.build_classifier(
        captions,
        config.method,
        debias=config.debias,
        length_normalise=config.length_normalise,
    )
    config.attach(model)

    def retrieve(images: Sequence[Picture]) -> list[list[Retrieved]]:
        options = {"random_seed": config.random_seed}
        return model.retrieve_for_classes(images, captions, config.method, config.retrieve, **options)

    found = retrieve if config.retrieve else None
    report = evaluate_classifier(classifier, model.codec, pictures, classes, config.batch_size, found)
    counter.finish()
    settings = {"debias": config.debias, "length_normalise": config.length_normalise}
    described = {
        "model": config.model,
        "data": str(config.data),
        "method": config.method,
        "settings": settings,
        **config.describe(),
        "classes": [one._asdict() for one in classes],
        "skipped": counter.to_dict(),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({**described, **report}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    accuracy = "" if report["accuracy"] is None else f", accuracy {report['accuracy']:.3f}"
    print(f"{report['num_pictures']} pictures among {len(classes)} classes{accuracy}; report in {config.out}")
