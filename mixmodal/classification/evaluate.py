"""Scores pictures with any classifier, and records each as it is finished: sharded, and gone on with where it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.classification.classifier import PictureClassifier, Scored
from mixmodal.classification.datasets import LabelledPicture
from mixmodal.data.skipping import SampleError, SkipCounter
from mixmodal.records import RecordLines, Shard
from mixmodal.tokenization.preprocessing import PictureError

BROKEN = "broken picture"


def check_share(max_share: float, num_used: int, skipped: Mapping[str, int], examples: Sequence[str]) -> None:
    """Whether no more was skipped than is allowed.

    Args:
        max_share: of all, 0 .. 1.
        num_used: that were not skipped.
        skipped: the others, by reason.
        examples: of messages.

    Raises:
        TooManySkipped: above the allowed share.
    """
    counter = SkipCounter(max_share)
    counter.merge({"used": num_used, "skipped": skipped, "altered": {}, "examples": list(examples)})
    counter.finish()


class _Known(NamedTuple):
    """A picture without what it holds."""

    key: str
    label: str | None
    texture: str | None

    def is_of(self, entry: Mapping[str, Any]) -> bool:
        """Whether a line is of this picture, as it is labelled now."""
        return (entry["label"], entry.get("texture")) == (self.label, self.texture)


class Recorder:
    """The lines of one set of pictures.

    A line of a picture has its `key`, `label` (and `texture`), and either `prediction` (of ties the first class),
    `tied` (labels), `scores` (null for a class without one), `probabilities` and `evaluations` of each class, and what
    the classifier tells beside; or `skipped`, the reason, and `error`.

    Args:
        lines: what earlier calls and other processes have recorded, and where the new lines go.
        labels: of the K classes.
        shard: the pictures of this process.
        counter: takes pictures that can not be opened.
        batch_size: pictures that the classifier is given at once.
    """

    def __init__(
        self, lines: RecordLines, labels: Sequence[str], shard: Shard, counter: SkipCounter, batch_size: int
    ) -> None:
        self.lines, self.labels, self.shard = lines, list(labels), shard
        self.counter, self.batch_size = counter, batch_size
        self._read: list[_Known] = []  # of all shards

    def record(
        self, pictures: Iterable[LabelledPicture], build: Callable[[], PictureClassifier]
    ) -> Iterator[dict[str, Any]]:
        """Scores the pictures of the shard that have no line yet; those that were skipped are tried again.

        Args:
            pictures: all, in the same order in every process.
            build: called once there is something to score.

        Yields:
            Each line after it is written.

        Raises:
            TooManySkipped: above the share of broken pictures that the counter allows.
            ValueError: naming the picture, for findings that can not be.
        """
        waiting: list[tuple[LabelledPicture, Picture]] = []
        for number, one in enumerate(pictures):
            self._read.append(known := _Known(one.key, one.label, one.texture))
            if not self.shard.holds(number):
                continue
            if self._is_scored(known):
                self.counter.use()
                continue
            try:
                waiting.append((one, one.open()))
            except PictureError as error:
                self.counter.skip(SampleError(BROKEN, str(error)))
                yield self._write(one, {"skipped": BROKEN, "error": str(error)})
                continue
            self.counter.use()
            if len(waiting) == self.batch_size:
                yield from self._score(waiting, build())
                waiting = []
        if waiting:
            yield from self._score(waiting, build())

    def is_complete(self) -> bool:
        """Whether all pictures have a line by now, those of other processes, too."""
        self.lines = RecordLines(self.lines.path, self.lines.item)
        return all(one.key in self.lines for one in self._read)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines of all pictures, in the order of pictures.

        Raises:
            ValueError: naming the picture, for a line of another shard that is of another label.
        """
        for one in self._read:
            entry = self.lines.find(one.key)
            if entry is None or not one.is_of(entry):
                where = self.lines.path.parent
                raise ValueError(f"{one.key} has another label than its record in {where}; run its shard again")
            yield entry

    def _is_scored(self, one: _Known) -> bool:
        entry = self.lines.find(one.key)
        return entry is not None and "skipped" not in entry and one.is_of(entry)

    def _score(
        self, waiting: Sequence[tuple[LabelledPicture, Picture]], classifier: PictureClassifier
    ) -> Iterator[dict[str, Any]]:
        found = classifier.score([picture for _, picture in waiting])
        for (one, _), scored in zip(waiting, found, strict=True):
            scored.check(len(self.labels), one.key)
            yield self._write(one, self._describe(scored))

    def _describe(self, scored: Scored) -> dict[str, Any]:
        tied = [self.labels[place] for place in np.flatnonzero(scored.tied)]
        return {
            "prediction": tied[0],
            "tied": tied,
            "scores": [float(score) if np.isfinite(score) else None for score in scored.scores],
            "probabilities": scored.probabilities.tolist(),
            "evaluations": scored.evaluations.tolist(),
            **scored.details,
        }

    def _write(self, one: LabelledPicture, found: dict[str, Any]) -> dict[str, Any]:
        cue = {} if one.texture is None else {"texture": one.texture}
        entry = {"key": one.key, "label": one.label, **cue, **found}
        self.lines.append(entry)
        return entry
