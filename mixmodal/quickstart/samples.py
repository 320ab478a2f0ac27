"""Samples of the trained model: pictures from captions, captions from pictures, and one document of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track

from mixmodal.document import Coded, Document, Image, Mask, Part, Text
from mixmodal.interop.export import Export
from mixmodal.quickstart.demo import Demo, choose, save_picture
from mixmodal.quickstart.scoring import DISTANCE, named_concept, nearest_pictures
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import TokenSampling
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
        max_caption_tokens: tokens after which a caption is cut.
        batch_size: samples drawn at a time.
        compare_with: what generated pictures are compared with: all demo pictures themselves (`original`), or as the
            image tokenizer redraws them (`redrawn`), with the blur that a generated picture has, too.
        mixed_prompt: caption that begins the mixed document; none takes the first held-out one.
        mixed_outputs: what follows it, in this order.
        seed: of the pairs and the samples.
    """

    prompts_per_split: int = 64
    image: TokenSampling = field(default_factory=TokenSampling)
    text: TokenSampling = field(default_factory=lambda: TokenSampling(temperature=0.0))
    guidance_scale: float = 1.0
    max_caption_tokens: int = 32
    batch_size: int = 32
    compare_with: Literal["original", "redrawn"] = "original"
    mixed_prompt: str | None = None
    mixed_outputs: tuple[str, ...] = ("image", "text", "image")
    seed: int = 0


class Speed(NamedTuple):
    """Tokens drawn and the seconds that took."""

    tokens: int
    seconds: float


class Sampler:
    """Continues documents by one part of a modality, in batches, and keeps account of the time.

    Args:
        export: the trained model with its tokenizers.
        config: see there.
    """

    def __init__(self, export: Export, config: SamplesConfig) -> None:
        self.export, self.config = export, config
        self.generator = SequenceGenerator(export.model, export.format)
        self.speed = Speed(0, 0.0)

    def continue_documents(self, documents: Sequence[Document], output: str, name: str = "") -> list[Part | None]:
        """The part that follows each document; None where the model wrote no text."""
        size = self.config.batch_size
        batches = [range(start, min(start + size, len(documents))) for start in range(0, len(documents), size)]
        parts: list[Part | None] = []
        for places in track(batches, name or output, disable=not name):
            parts += self._continue_batch([documents[place] for place in places], output, list(places))
        return parts

    def _continue_batch(self, documents: Sequence[Document], output: str, places: Sequence[int]) -> list[Part | None]:
        spell, scale = self.export.format.spell_prompt, self.config.guidance_scale if output == "image" else 1.0
        started = time.perf_counter()
        found = self.generator.generate(
            [spell(document, output) for document in documents],
            seeds=[(self.config.seed, place) for place in places],
            output=output,
            sampling={"image": self.config.image, "text": self.config.text},
            guidance_prompts=[spell(masked(document), output) for document in documents] if scale != 1 else None,
            guidance_scale=scale,
            max_new_tokens=self.config.max_caption_tokens if output == "text" else None,
        )
        tokens = sum(len(ids) for ids in found)
        self.speed = Speed(self.speed.tokens + tokens, self.speed.seconds + time.perf_counter() - started)
        return [self._part(ids, output) for ids in found]

    def _part(self, ids: Any, output: str) -> Part | None:
        """The content of new ids; control tokens around it are left out."""
        vocabulary = self.export.vocabulary
        content = vocabulary.from_ids(output, ids[vocabulary.contains(output, ids)])
        if output == "image":
            return Image(content.reshape(self.export.format.grids[output]))
        text = self.export.codec.text_tokenizer.decode(content.tolist())
        return Text(text) if text else None


def masked(document: Document) -> Document:
    """The document without its texts: what guidance leads away from."""
    return Document([Mask() if isinstance(part, Text) else part for part in document.parts])


def sample_demo(run: Path, export: Export, demo: Demo, config: SamplesConfig) -> dict[str, Any]:
    """Samples for pairs of both splits, each beside what it should show.

    Returns:
        Plain data for the report; pictures are saved under `run/samples` and named relative to `run`.
    """
    sampler = Sampler(export, config)
    splits = [demo.indices(heldout) for heldout in (True, False)]
    chosen = [index for indices in splits for index in choose(indices, config.prompts_per_split, config.seed)]
    return {
        "distance": DISTANCE + REFERENCES[config.compare_with],
        "text_to_image": draw_pictures(run, sampler, demo, chosen),
        "image_to_text": write_captions(run, sampler, demo, chosen),
        "mixed": write_mixed(run, sampler, config.mixed_prompt or demo.labels[chosen[0]].caption),
        "tokens": sampler.speed.tokens,
        "seconds": sampler.speed.seconds,
    }


def draw_pictures(run: Path, sampler: Sampler, demo: Demo, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """A picture for each caption, and the demo picture nearest to it."""
    codec = sampler.export.codec
    prompts = [codec.to_document([demo.labels[index].caption]) for index in chosen]
    coded = [part for part in sampler.continue_documents(prompts, "image", "text to image") if isinstance(part, Coded)]
    pictures = codec.decode_images(coded)
    generated = torch.stack([to_tensor(picture) for picture in pictures])
    others = demo.images if sampler.config.compare_with == "original" else redrawn(sampler, demo)
    nearest = nearest_pictures(generated, others)
    items = []
    for number, (index, picture) in enumerate(zip(chosen, pictures, strict=True)):
        label, place = demo.labels[index], int(nearest.indices[number])
        near = demo.labels[place]
        items.append(
            {
                "prompt": label.caption,
                "label": label._asdict(),
                "image": save_picture(picture, run, f"samples/generated/{number:03d}.png"),
                "nearest": {
                    "label": near._asdict(),
                    "image": save_demo(run, demo, place),
                    "distance": float(nearest.distances[number]),
                },
                "concept_right": near.concept == label.concept,
                "style_right": near.style == label.style,
            }
        )
    return items


def redrawn(sampler: Sampler, demo: Demo) -> torch.Tensor:
    """All demo pictures through the image tokenizer and back, `(N, 3, H, W)`."""
    tokenizer = sampler.export.codec.image_tokenizer
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in demo.images.split(256)])


def write_captions(run: Path, sampler: Sampler, demo: Demo, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """A caption for each picture, and whether it names the concept and the style."""
    codec = sampler.export.codec
    documents = codec.to_documents([[picture] for picture in to_pictures(demo.images[list(chosen)])])
    found = sampler.continue_documents(documents, "text", "image to text")
    concepts = sorted({label.concept for label in demo.labels})
    styles = sorted({label.style for label in demo.labels})
    items = []
    for index, part in zip(chosen, found, strict=True):
        label, caption = demo.labels[index], part.text if isinstance(part, Text) else ""
        items.append(
            {
                "label": label._asdict(),
                "image": save_demo(run, demo, index),
                "caption": caption,
                "concept_right": named_concept(caption, concepts) == label.concept,
                "style_right": named_concept(rest_of(caption, concepts), styles) == label.style,
            }
        )
    return items


def rest_of(caption: str, concepts: Sequence[str]) -> str:
    """The caption without the concept that it names, so that the word for a style is not sought in a name."""
    concept = named_concept(caption, concepts)
    start = caption.casefold().find(concept.casefold()) if concept else -1
    return caption if concept is None or start < 0 else caption[:start] + caption[start + len(concept) :]


def write_mixed(run: Path, sampler: Sampler, prompt: str) -> dict[str, Any]:
    """One document that begins with `prompt` and goes on with `mixed_outputs`, each part given all before it."""
    document = sampler.export.codec.to_document([prompt])
    parts: list[dict[str, str]] = []
    for number, output in enumerate(sampler.config.mixed_outputs):
        (part,) = sampler.continue_documents([document], output)
        if part is None:
            break
        document = Document([*document.parts, part])
        if isinstance(part, Coded):
            (picture,) = sampler.export.codec.decode_images([part])
            parts.append({"image": save_picture(picture, run, f"samples/mixed/{number}.png")})
        elif isinstance(part, Text):
            parts.append({"text": part.text})
    return {"prompt": prompt, "parts": parts}


def save_demo(run: Path, demo: Demo, index: int) -> str:
    """The demo picture as a file of the samples."""
    (picture,) = to_pictures(demo.images[index : index + 1])
    return save_picture(picture, run, f"samples/demo/{index:05d}.png")


def summarise_samples(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rates of `summary.json`: `text_to_image` and `image_to_text`, by split."""
    rates: dict[str, dict[str, float]] = {}
    for direction in ("text_to_image", "image_to_text"):
        rates[direction] = {}
        for heldout, split in ((False, "trained"), (True, "heldout")):
            items = [item for item in results[direction] if item["label"]["heldout"] == heldout]
            for name in ("concept", "style"):
                share = sum(item[f"{name}_right"] for item in items) / max(1, len(items))
                rates[direction][f"{name}_accuracy_{split}"] = share
    return rates
