"""What the tasks of an evaluation have in common: samples of shards, a record for each, and what they add up to."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.data.shards import PictureFile, Sample, read_samples
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.files import replacing
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.tokenization.preprocessing import PictureError

SHOWN = 24
"""Samples of a task that the page shows."""
LABELS = ("concept", "style")
"""Metadata that say what a picture shows, as the demo corpus has them."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task is about.

    Args:
        data: folders of shards, held out from training.
        max_samples: of more samples than these, so many are chosen by the seed.
    """

    data: tuple[Path, ...]
    max_samples: int = 1000

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; give at least one folder of shards")
        if self.max_samples < 1:
            raise ValueError(f"max_samples is {self.max_samples}; it must be at least 1")


OptionsT = TypeVar("OptionsT", bound=TaskOptions)


class Item(NamedTuple):
    """A sample and its place among those that are asked for."""

    place: int
    sample: Sample

    @property
    def key(self) -> str:
        """Names it in records and files; keys of samples may come twice in several folders."""
        return f"{self.place:06d}"

    @property
    def labels(self) -> dict[str, str]:
        """What its metadata say that it shows."""
        found = {name: self.sample.metadata.get(name) for name in LABELS}
        return {name: value for name, value in found.items() if isinstance(value, str)}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a task works with.

    Args:
        load: the model, loaded once.
        folder: of the task, for its files.
        device: where networks that judge compute.
        seed: of choices and samples.
        batch_size: records that are measured together; they do not depend on it.
        limits: of samples.
    """

    load: Callable[[], MixedModal]
    folder: Path
    device: str
    seed: int
    batch_size: int
    limits: SampleLimits

    def seed_of(self, item: Item) -> int:
        """Of what is drawn for an item."""
        return self.seed + item.place


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample on the page.

    Args:
        pictures: files of the task's folder, each with the words below it.
        text: below all of them.
        wanted: what people say to it, where that is something else.
        right: the verdict, where there is one.
    """

    pictures: dict[str, str]
    text: str
    wanted: str = ""
    right: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the records of a task add up to, as plain data.

    Args:
        metrics: by name; None where nothing was there to measure.
        notes: what limits the numbers.
        reference_sha256: digest of the pictures that those of the model are compared with.
        training_sha256: digest of what of training it is compared with.
        shown: the first samples.
    """

    metrics: dict[str, float | None]
    notes: list[str] = field(default_factory=list)
    reference_sha256: str | None = None
    training_sha256: str | None = None
    shown: list[Shown] = field(default_factory=list)


class Task(ABC, Generic[OptionsT]):
    """One thing that a model is evaluated by.

    Args:
        options: of the task.
    """

    title: ClassVar[str]
    introduction: ClassVar[str]
    judged_by: ClassVar[tuple[str, ...]] = ()
    """Options on which no record depends, only what records add up to."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def read(self, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
        """All samples of the data."""
        return read_samples(self.options.data, counter, limits)

    @abstractmethod
    def takes(self, sample: Sample) -> bool:
        """Whether a sample is one of those that the task is about."""

    @abstractmethod
    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        """The record of each item, in any order; one of a broken picture has `skipped` and `error`."""

    @abstractmethod
    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        """What the records of all items that were not skipped add up to, in the order of items."""


class ChosenSamples:
    """The samples of a task: all that it takes, or a choice that the seed makes of them.

    Args:
        task: takes them.
        limits: of samples, and the share of broken ones that fails the job.
        seed: of the choice.

    Attributes:
        sha256: digest of the samples, whatever files they are in.
        count: of them.

    Raises:
        ValueError: where there is none.
        TooManySkipped: above the allowed share of broken ones.
    """

    def __init__(self, task: Task[Any], limits: SampleLimits, seed: int) -> None:
        self._task, self._limits = task, limits
        counter = SkipCounter(limits.max_skipped_share)
        digests: list[bytes] = []
        for sample in self._read(counter):
            counter.use()
            digests.append(_digest(sample))
        counter.finish()
        if not digests:
            paths = ", ".join(map(str, task.options.data))
            raise ValueError(f"data: {paths} holds no sample that the task can take")
        most, self._chosen = task.options.max_samples, np.arange(len(digests))
        if len(digests) > most:
            self._chosen = np.sort(np.random.default_rng(seed).choice(len(digests), most, replace=False))
        self.count = len(self._chosen)
        self.sha256 = hashlib.sha256(b"".join(digests[number] for number in self._chosen)).hexdigest()

    def __iter__(self) -> Iterator[Item]:
        places = {int(number): place for place, number in enumerate(self._chosen)}
        for number, sample in enumerate(self._read(SkipCounter(1.0))):
            if number in places:
                yield Item(places[number], sample)

    def _read(self, counter: SkipCounter) -> Iterator[Sample]:
        return (sample for sample in self._task.read(counter, self._limits) if self._task.takes(sample))


def _digest(sample: Sample) -> bytes:
    parts = [part if isinstance(part, str) else hashlib.sha256(part.data).hexdigest() for part in sample.parts]
    known = {"parts": parts, "metadata": dict(sample.metadata), "roles": [one.role for one in sample.messages]}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).digest()


def open_first(item: Item, limits: SampleLimits) -> Picture:
    """The first picture of a sample, RGB.

    Raises:
        PictureError: where it is broken or too large.
    """
    part = next(part for part in item.sample.parts if isinstance(part, PictureFile))
    return part.open(limits.max_pixels)


def objects_of(sample: Sample) -> list[str]:
    """What the metadata of a sample say that its picture shows."""
    found = sample.metadata.get("objects")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def save(setup: Setup, picture: Picture, name: str) -> str:
    """Writes a PNG file into the task's folder; gives its name."""
    setup.folder.mkdir(parents=True, exist_ok=True)
    with replacing(setup.folder / f"{name}.png") as part:
        picture.save(part, "png")
    return f"{name}.png"


def skipped(error: Exception) -> dict[str, str]:
    """The record of what could not be measured."""
    reason = "broken picture" if isinstance(error, PictureError) else "not askable"
    return {"skipped": reason, "error": str(error)}


T = TypeVar("T")


def batches(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, and of what is left."""
    stream = iter(stream)
    while batch := list(islice(stream, size)):
        yield batch


def mean(values: Iterable[float]) -> float | None:
    """None without values."""
    values = list(values)
    return float(np.mean(values)) if values else None


def rate_labels(entries: Sequence[Mapping[str, Any]], prefix: str = "right_") -> dict[str, float | None]:
    """Shares of the entries that have a verdict `concept_right`, `style_right`: of those, how many are right."""
    found: dict[str, float | None] = {}
    for name in LABELS:
        verdicts = [bool(entry[f"{name}_right"]) for entry in entries if f"{name}_right" in entry]
        if verdicts:
            found[f"{prefix}{name}"] = mean(verdicts)
    return found
