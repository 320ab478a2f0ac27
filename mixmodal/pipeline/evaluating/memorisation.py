"""Training pictures that drawn ones repeat: shares beside those of held-out pictures, and the nearest one itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Image
from mixmodal.evaluation.memorisation import CodeBlock, Repeats, find_repeats, training_codes
from mixmodal.files import write_whole
from mixmodal.interop.export import IMAGE_TOKENIZER
from mixmodal.pipeline.evaluating.task import SHOWN, Item, Setup, batches, open_first, save
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.preprocessing import PictureError

NEAREST = "nearest.jsonl"
"""A line for each drawn picture: the key of the nearest training document, and the share of equal codes."""


@dataclass(frozen=True, kw_only=True)
class MemorisationOptions:
    """Compares codes that were drawn with those of training pictures, place by place.

    Args:
        training: folders of the token shards that the model was trained on.
        threshold: share of equal codes from which on a picture is a near repeat.
    """

    training: tuple[Path, ...]
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.training:
            raise ValueError("memorisation.training is empty; give at least one folder of token shards")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"memorisation.threshold is {self.threshold}; it must be above 0 and at most 1")


class NearestTraining(NamedTuple):
    """What drawn pictures repeat.

    Args:
        metrics: shares of drawn and held-out pictures.
        pictures: of the first records, by their keys, the PNG file of the nearest training picture, and what it is.
        note: what was compared.
        training_sha256: digest of the token shards.
    """

    metrics: dict[str, float | None]
    pictures: dict[str, dict[str, str]]
    note: str
    training_sha256: str


def open_training(options: MemorisationOptions, model: MixedModal) -> list[TokenShards]:
    """The token shards.

    Raises:
        ValueError: where one is not there, or was made with another image tokenizer than the model's.
    """
    found = [TokenShards.open(folder) for folder in options.training]
    for shards in found:
        if model.folder is not None:
            shards.check(image_tokenizer_sha256=ImageTokenizer.sha256(model.folder / IMAGE_TOKENIZER))
    return found


def find_nearest_training(
    options: MemorisationOptions, setup: Setup, entries: Sequence[Mapping[str, Any]], held_out: Iterable[Item]
) -> NearestTraining:
    """Compares the codes of records with all of training; names the nearest training picture, and draws the first ones.

    Args:
        options: which training pictures.
        setup: PNG files and `nearest.jsonl` are written into its folder.
        entries: records with the `codes` (h, w) that were drawn.
        held_out: samples whose pictures are encoded and compared, too.

    Raises:
        ValueError: as `open_training` does, where training has no picture of so many codes, or for drawn pictures of
            several sizes.
    """
    model = setup.load()
    shards = open_training(options, model)
    drawn = stack_codes(entries)
    encoded = (model.codec.encode_pictures(batch) for batch in batches(_open(held_out, setup), model.codec.batch_size))
    alike = [image.codes for images in encoded for image in images if image.codes.shape == drawn.shape[1:]]

    def compare(codes: np.ndarray) -> Repeats:
        blocks: Iterator[CodeBlock] = chain.from_iterable(training_codes(one, drawn[0].size) for one in shards)
        return find_repeats(codes, blocks, options.threshold, setup.device)

    found, metrics = compare(drawn), {}
    for ending, repeats in (("", found), ("_held_out", compare(np.array(alike)) if alike else None)):
        for name in ("exact", "near"):
            metrics[f"repeats_{name}{ending}"] = None if repeats is None else getattr(repeats, name)
        metrics[f"repeats_equal_codes{ending}"] = None if repeats is None else float(repeats.equal.mean())
    name_nearest(setup, entries, found)
    note = (
        f"The codes that were drawn are compared with those of {found.num_training} training pictures at equal places, "
        f"beside those of {len(alike)} held-out pictures as the image tokenizer encodes them. Beside each stands, "
        f"decoded, the training picture with the most equal codes, and their share; {NEAREST} names it for all."
    )
    digest = hashlib.sha256("".join(one.digest for one in shards).encode()).hexdigest()
    return NearestTraining(metrics, draw_nearest(setup, entries, found), note, digest)


def stack_codes(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Codes of records, int64 `(records, h, w)`.

    Raises:
        ValueError: where they are of several sizes.
    """
    sizes = sorted({np.shape(entry["codes"]) for entry in entries})
    if len(sizes) > 1:
        grids = ", ".join("x".join(map(str, size)) for size in sizes)
        raise ValueError(
            f"memorisation: drawn pictures have grids of {grids} codes; only one is compared: leave it out"
        )
    return np.array([entry["codes"] for entry in entries])


def name_nearest(setup: Setup, entries: Sequence[Mapping[str, Any]], found: Repeats) -> None:
    """Writes which training document is nearest to each record."""
    lines = [
        json.dumps({"key": entry["key"], "sample": entry["sample"], "training": key, "equal_codes": float(equal)})
        for entry, key, equal in zip(entries, found.keys, found.equal, strict=True)
    ]
    write_whole(setup.folder / NEAREST, "".join(f"{line}\n" for line in lines).encode())


def draw_nearest(setup: Setup, entries: Sequence[Mapping[str, Any]], found: Repeats) -> dict[str, dict[str, str]]:
    """PNG files of the training pictures nearest to the first records, each with its words, by key of the record."""
    grid = np.shape(entries[0]["codes"])
    nearest = setup.load().codec.decode_images([Image(codes.reshape(grid)) for codes in found.codes[:SHOWN]])
    return {
        entry["key"]: {save(setup, picture, f"{entry['key']}.nearest"): f"trained on, {equal:.0%}"}
        for entry, picture, equal in zip(entries, nearest, found.equal)
    }


def _open(items: Iterable[Item], setup: Setup) -> Iterator[Picture]:
    """The pictures of samples that have one which is not broken."""
    for item in items:
        if item.sample.pictures:
            try:
                yield open_first(item, setup.limits)
            except PictureError:
                continue
