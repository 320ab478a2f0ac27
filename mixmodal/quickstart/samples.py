"""Samples of the trained model: pictures from captions, captions from pictures, and one document of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from rich.progress import track

from mixmodal.evaluation.captioning import named_concept
from mixmodal.evaluation.concepts import DISTANCE, nearest_pictures, redraw, rest_of
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.options import sampling_options
from mixmodal.quickstart.demo import Demo, choose, save_picture
from mixmodal.quickstart.scoring import Label, split_rate
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.preprocessing import to_pictures, to_tensor

REFERENCES = {"original": "", "redrawn": ", to each demo picture as the image tokenizer redraws it"}


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """What is sampled and how.

    Args:
        prompts_per_split: pairs drawn from each split, training and held-out, for both directions.
        image: how codes are drawn.
        text: how text is drawn.
        guidance_scale: of codes towards the caption; 1 is none.
        best_of: pictures drawn for each caption, of which the one is kept from which the model reads the caption best.
        max_caption_tokens: tokens after which a caption is cut.
        batch_size: samples drawn at a time.
        compare_with: what generated pictures are compared with: all demo pictures themselves (`original`), or as the
            image tokenizer redraws them (`redrawn`), with the blur that a generated picture has, too. The rates of both
            are kept; this one is shown.
        mixed_prompt: caption that begins the mixed document; none takes the first held-out one.
        mixed_outputs: what follows it, in this order.
        seed: of the pairs and the samples.
    """

    prompts_per_split: int = 64
    image: TokenSampling = field(default_factory=TokenSampling)
    text: TokenSampling = field(default_factory=lambda: TokenSampling(temperature=0.0))
    guidance_scale: float = 1.0
    best_of: int = 1
    max_caption_tokens: int = 32
    batch_size: int = 32
    compare_with: Literal["original", "redrawn"] = "original"
    mixed_prompt: str | None = None
    mixed_outputs: tuple[str, ...] = ("image", "text", "image")
    seed: int = 0


def sample_demo(run: Path, model: MixedModal, demo: Demo, config: SamplesConfig) -> dict[str, Any]:
    """Samples for pairs of both splits, each beside what it should show.

    Returns:
        Plain data for the report; pictures are saved under `run/samples` and named relative to `run`.
    """
    splits = [demo.indices(heldout) for heldout in (True, False)]
    chosen = [index for indices in splits for index in choose(indices, config.prompts_per_split, config.seed)]
    started = time.perf_counter()
    prompts = [demo.labels[index].caption for index in chosen]
    pictures = generate(model, prompts, "image", config, "text to image")
    seconds = time.perf_counter() - started
    return {
        "distance": DISTANCE + REFERENCES[config.compare_with],
        "text_to_image": judge_pictures(run, model, demo, chosen, pictures, config),
        "image_to_text": write_captions(run, model, demo, chosen, config),
        "mixed": write_mixed(run, model, config.mixed_prompt or prompts[0], config),
        "tokens_per_second": len(chosen) * model.format.blocks["image"].length / seconds,
    }


def generate(
    model: MixedModal, prompts: Sequence[str | list[Any]], output: str, config: SamplesConfig, name: str
) -> list[Any]:
    """One sample for each prompt, in batches with a progress bar."""
    starts = range(0, len(prompts), config.batch_size)
    options = sampling_options({"image": config.image, "text": config.text})
    options["guidance_scale"] = config.guidance_scale if output == "image" else 1.0
    samples: list[Any] = []
    for start in track(starts, name):
        found = model.generate_batch(
            prompts[start : start + config.batch_size],
            output,
            seed=config.seed,
            best_of=config.best_of if output == "image" else 1,
            **options,
            max_new_tokens=config.max_caption_tokens if output == "text" else None,
        )
        samples += [one[0] for one in found]
    return samples


def judge_pictures(
    run: Path, model: MixedModal, demo: Demo, chosen: Sequence[int], pictures: Sequence[Image], config: SamplesConfig
) -> list[dict[str, Any]]:
    """Generated pictures with the demo picture nearest to each, and whether that is of the right concept and style."""
    images = torch.stack([to_tensor(picture) for picture in pictures])
    references = {"original": demo.images, "redrawn": redraw(model.codec, demo.images)}
    nearest = {name: nearest_pictures(images, others) for name, others in references.items()}
    items = []
    for number, (index, picture) in enumerate(zip(chosen, pictures, strict=True)):
        label = demo.labels[index]
        verdicts = {name: judge(label, demo.labels[int(found.indices[number])]) for name, found in nearest.items()}
        place = int(nearest[config.compare_with].indices[number])
        items.append(
            {
                "prompt": label.caption,
                "label": label._asdict(),
                "image": save_picture(picture, run, f"samples/generated/{number:03d}.png"),
                "nearest": {
                    "label": demo.labels[place]._asdict(),
                    "image": save_demo(run, demo, place),
                    "distance": float(nearest[config.compare_with].distances[number]),
                },
                **verdicts[config.compare_with],
                "by_reference": verdicts,
            }
        )
    return items


def judge(wanted: Label, found: Label) -> dict[str, bool]:
    """Whether the concept, the style and both are right."""
    verdict = {f"{name}_right": getattr(wanted, name) == getattr(found, name) for name in ("concept", "style")}
    return {**verdict, "both_right": all(verdict.values())}


def write_captions(
    run: Path, model: MixedModal, demo: Demo, chosen: Sequence[int], config: SamplesConfig
) -> list[dict[str, Any]]:
    """A caption for each picture, and whether it names the concept and the style."""
    prompts = [[picture] for picture in to_pictures(demo.images[list(chosen)])]
    captions = generate(model, prompts, "text", config, "image to text")
    concepts = sorted({label.concept for label in demo.labels})
    styles = sorted({label.style for label in demo.labels})
    items = []
    for index, caption in zip(chosen, captions, strict=True):
        label = demo.labels[index]
        concept_right = named_concept(caption, concepts) == label.concept
        style_right = named_concept(rest_of(caption, concepts), styles) == label.style
        items.append(
            {
                "label": label._asdict(),
                "image": save_demo(run, demo, index),
                "caption": caption,
                "concept_right": concept_right,
                "style_right": style_right,
                "both_right": concept_right and style_right,
            }
        )
    return items


def write_mixed(run: Path, model: MixedModal, prompt: str, config: SamplesConfig) -> dict[str, Any]:
    """One document that begins with `prompt` and goes on with `mixed_outputs`, each part given all before it."""
    document: list[Any] = [prompt]
    parts: list[dict[str, str]] = []
    for number, output in enumerate(config.mixed_outputs):
        (part,) = generate(model, [document], output, config, f"mixed document: {output}")
        if isinstance(part, str) and not part:
            break
        document.append(part)
        shown = part if isinstance(part, str) else save_picture(part, run, f"samples/mixed/{number}.png")
        parts.append({output: shown})
    return {"prompt": prompt, "parts": parts}


def save_demo(run: Path, demo: Demo, index: int) -> str:
    """The demo picture as a file of the samples."""
    (picture,) = to_pictures(demo.images[index : index + 1])
    return save_picture(picture, run, f"samples/demo/{index:05d}.png")


def summarise_samples(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rates of `summary.json`, by split; nan for a split without samples.

    Those of `text_to_image` and `image_to_text`; and those of pictures by what they are compared with.
    """
    drawn = results["text_to_image"]
    verdicts = {"text_to_image": drawn, "image_to_text": results["image_to_text"]}
    for reference in REFERENCES:
        verdicts[f"text_to_image_{reference}"] = [
            {"label": item["label"], **item["by_reference"][reference]} for item in drawn
        ]
    return {
        direction: {
            f"{name}_accuracy_{split}": split_rate(items, f"{name}_right", heldout).share
            for heldout, split in ((False, "trained"), (True, "heldout"))
            for name in ("concept", "style", "both")
        }
        for direction, items in verdicts.items()
    }
