"""Pictures that a diffusion model's weights and times are fitted on, and that none is learned from and judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image as Picture

from mixmodal.classification.datasets import LabelledPicture, NamedClass
from mixmodal.classification.keyed import digest_of
from mixmodal.classification.known_sets import read_set
from mixmodal.data.skipping import SampleError, SkipCounter
from mixmodal.pipeline.classify_config import ClassifyConfig
from mixmodal.tokenization.preprocessing import PictureError

MEASURED = "measured.json"


class Chosen(NamedTuple):
    """Pictures to measure on.

    Args:
        pictures: decoded.
        labels: the class of each; None where labels are not looked at.
        digests: of each, see `digest_of`.
    """

    pictures: list[Picture]
    labels: list[int] | None
    digests: list[str]

    def describe(self) -> dict[str, Any]:
        """How many, and a hash of pixels and labels, as plain data."""
        digest = hashlib.sha256(json.dumps([self.digests, self.labels]).encode()).hexdigest()
        return {"num_pictures": len(self.pictures), "pictures_sha256": digest, "are_labelled": self.labels is not None}


def choose_pictures(config: ClassifyConfig, classes: Sequence[NamedClass]) -> Chosen | None:
    """Those of `diffusion.fit`, or for a density alone the first of the data; the same in every process.

    None where nothing is to be measured.

    Raises:
        ValueError: where there are none, or too few of them.
        TooManySkipped: above the share of broken pictures that the config allows.
    """
    options = config.diffusion
    if not options.is_measured:
        return None
    counter = SkipCounter(config.max_skipped_share)
    if options.fit is None:
        opened = _open(read_set(config.data, classes, counter), counter)
        found = [one for _, one in zip(range(options.num_pilot), opened)]
        if not found:
            raise ValueError(f"diffusion.times importance: {config.data} holds no picture that can be opened")
        return Chosen([picture for _, picture in found], None, [digest_of(picture) for _, picture in found])
    found = _choose_labelled(options.fit, classes, options.num_fitted, config.seed, counter)
    counter.finish()
    if not found:
        raise ValueError(f"diffusion.fit: {options.fit} holds no labelled pictures that can be opened")
    places = {one.label: place for place, one in enumerate(classes)}
    pictures = [picture for _, picture in found]
    return Chosen(pictures, [places[label] for label, _ in found], [digest_of(picture) for picture in pictures])


def _choose_labelled(
    path: Path, classes: Sequence[NamedClass], number: int, seed: int, counter: SkipCounter
) -> list[tuple[str, Picture]]:
    """Up to `number` pictures of each class: the first in an order that is drawn from the seed and their keys."""
    best: dict[str, list[tuple[str, LabelledPicture]]] = {one.label: [] for one in classes}
    for one in read_set(path, classes, counter, "diffusion.fit"):
        if one.label is not None:
            kept = best[one.label]
            kept.append((hashlib.sha256(f"{seed} {one.key}".encode()).hexdigest(), one))
            kept.sort(key=lambda pair: pair[0])
            del kept[number:]
    return [(label, picture) for label, kept in best.items() for _, picture in _open((one for _, one in kept), counter)]


def _open(pictures: Iterable[LabelledPicture], counter: SkipCounter) -> Iterator[tuple[LabelledPicture, Picture]]:
    """Those that can be opened; others are counted."""
    for one in pictures:
        try:
            picture = one.open()
        except PictureError as error:
            counter.skip(SampleError("broken picture", str(error)))
            continue
        counter.use()
        yield one, picture


def check_apart(chosen: Chosen, name: str, path: Path, pictures: Iterable[LabelledPicture]) -> None:
    """Whether none of the pictures that labels were read of is among those to be judged, by their pixels.

    Raises:
        ValueError: with their number and the key of the first.
    """
    if chosen.labels is None:
        return
    known = set(chosen.digests)
    both = [one.key for one, picture in _open(pictures, SkipCounter(1.0)) if digest_of(picture) in known]
    if both:
        raise ValueError(
            f"diffusion.fit: {len(both)} of its pictures, as {both[0]}, are in {name} ({path}), too: what is learned "
            "from labels would be judged by the same; give pictures that are apart"
        )
