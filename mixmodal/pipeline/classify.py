"""The classify command: pictures among captions, each recorded as it is finished, and what they add up to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.progress import track

from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.classification.classifier import PictureClassifier
from mixmodal.classification.datasets import (
    NamedClass,
    Read,
    check_templates,
    read_classes,
    read_cues,
    read_pictures,
    read_templates,
)
from mixmodal.classification.evaluate import BROKEN, Recorder
from mixmodal.classification.summary import describe_drop, draw_figures, summarise, summarise_cues
from mixmodal.data.skipping import SkipCounter
from mixmodal.pipeline.classifiers import build_classifier, check_method, hash_model
from mixmodal.pipeline.reading import ReadingConfig
from mixmodal.records import RecordLines, Shard, check_settings, write_json

RECORDS, SETTINGS, SUMMARY = "records", "settings", "summary.json"
PLAIN = ["{}"]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(ReadingConfig):
    """Classifies pictures among captions, by the likelihood that a model gives, and says how well.

    `out` gets a line for each picture in `records.jsonl` as it is finished, and when all are, `summary.json`,
    `confusion.png` and `reliability.png`. The same command goes on where it broke off; `--shard 0/4` to `3/4` in four
    processes, or a launcher, share the pictures, and the last to end writes the summary. `--template TEXT` may be given
    several times.

    With `--memory DIR --retrieve N` the model reads the documents of a memory that are nearest to the picture, the same
    before every class. A memory that holds the pictures themselves, with their captions, gives the answers away.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        data: folder of pictures, in subfolders named by their label where that is known, or of shards; or a CSV file
            with the columns path and label.
        classes: text file with one class a line: its caption, or its label, a tab and its caption.
        out: folder for records and summary; made where it is missing.
        method: `image_given_text` scores log p(image | text), `text_given_image` scores log p(text | image).
        templates: texts around the caption, as `a photo of {}`; scores are means over several, as log-likelihoods.
        templates_file: text file with one of them a line, in place of `templates`.
        shift: pictures of the same classes from elsewhere, as `data`: both accuracies, and how much is lost.
        cues: pictures with the shape of one class and the texture of another: a folder of files with names such as
            cat1-clock3.png, first the shape, or a CSV file with the columns path, shape and texture. Which of the two
            decides is the shape bias.
        seed: of what a method draws; for methods that draw nothing it stays 0.
        debias: alpha in log p(text | image) - alpha log p(text); for `text_given_image` only.
        length_normalise: divide scores by the number of tokens; for `text_given_image` only.
        shard: `INDEX/COUNT` takes every COUNT-th picture; null takes all, and under a launcher what its RANK and
            WORLD_SIZE say.
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
    templates: list[str] = field(default_factory=lambda: list(PLAIN))
    templates_file: Path | None = None
    shift: Path | None = None
    cues: Path | None = None
    seed: int = 0
    debias: float = 0.0
    length_normalise: bool = False
    shard: str | None = None
    max_skipped_share: float = 0.05
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix == ".json" or self.out.is_file():
            raise ValueError(f"out is {self.out}; it must be a folder, which gets records.jsonl and summary.json")
        if self.templates_file is not None and self.templates != PLAIN:
            raise ValueError("give either templates or templates_file")
        if self.shard is not None:
            Shard.parse(self.shard)
        if self.seed and self.method in AUTOREGRESSIVE:
            raise ValueError(f"seed can not act on {self.method}, which draws nothing; leave it out")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        """Gathers `--template TEXT` into `--templates`.

        Raises:
            ValueError: for one without a value, or beside `--templates`.
        """
        rest, found, words = [], [], iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if name != "--template":
                rest.append(word)
                continue
            if not equals and (value := next(words, None)) is None:
                raise ValueError("--template needs a value, as 'a photo of {}'")
            found.append(value)
        if not found:
            return rest
        if any(word.partition("=")[0] == "--templates" for word in rest):
            raise ValueError("give templates either by --template or by --templates")
        return [*rest, f"--templates={json.dumps(found)}"]

    def read_templates(self) -> list[str]:
        """Those that are given, or in the file that is.

        Raises:
            ValueError: for a text that is none.
        """
        found = self.templates if self.templates_file is None else read_templates(self.templates_file)
        check_templates(found)
        return list(found)


class PictureSet(NamedTuple):
    """One of the sets of pictures that a call is about: what reads it, and the folder for its records."""

    name: str
    path: Path
    read: Read
    folder: Path


def list_sets(config: ClassifyConfig) -> list[PictureSet]:
    """The pictures in `out` itself, others in folders of their own."""
    found = [PictureSet("data", config.data, read_pictures, config.out)]
    if config.shift is not None:
        found.append(PictureSet("shift", config.shift, read_pictures, config.out / "shift"))
    if config.cues is not None:
        found.append(PictureSet("cues", config.cues, read_cues, config.out / "cues"))
    return found


def classify(config: ClassifyConfig) -> None:
    """Scores every picture that has no record yet, and once all have one writes the summary.

    Raises:
        ValueError: for an unknown method, bad classes, templates or data, records of other settings, or too many broken
            pictures.
    """
    check_method(config.method)
    classes, templates = read_classes(config.classes), config.read_templates()
    sets = list_sets(config)
    for one in sets:  # before the model is loaded
        if next(one.read(one.path, classes, SkipCounter(1.0)), None) is None:
            raise ValueError(f"{one.name}: {one.path} holds no pictures that can be read")
    settings = describe(config, classes, templates)
    captions = [[template.replace("{}", one.caption) for one in classes] for template in templates]
    build = cache(lambda: build_classifier(config, captions))
    shard, labels = Shard.choose(config.shard), [one.label for one in classes]
    recorded = [(one, record(config, one, classes, settings, shard, build)) for one in sets]
    if not all(recorder.is_complete() for _, recorder in recorded):
        print(f"shard {shard.index}/{shard.count} is finished, the records are in {config.out}; the last shard sums up")
        return
    results = {one.name: sum_up(config, one, recorder, labels) for one, recorder in recorded}
    if "shift" in results:
        results["shift"]["drop"] = describe_drop(results["data"], results["shift"])
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    summary = {"model": config.model, "settings": settings, "settings_sha256": digest, **results}
    for one, _ in recorded:
        if one.name != "cues":
            with own_folder(one.folder, shard) as folder:
                draw_figures(results[one.name], labels, folder)
    with own_folder(config.out, shard) as folder:
        write_json(folder / SUMMARY, summary)
    print(report(results, len(classes), config.out / SUMMARY))


def describe(config: ClassifyConfig, classes: Sequence[NamedClass], templates: Sequence[str]) -> dict[str, Any]:
    """What scores depend on, as plain data."""
    return {
        "method": config.method,
        "model_sha256": hash_model(config.model),
        "dtype": config.dtype,
        "seed": config.seed,
        "debias": config.debias,
        "length_normalise": config.length_normalise,
        "templates": list(templates),
        "classes": [one._asdict() for one in classes],
        **config.describe(),
    }


def record(
    config: ClassifyConfig,
    pictures: PictureSet,
    classes: Sequence[NamedClass],
    settings: dict[str, Any],
    shard: Shard,
    build: Callable[[], PictureClassifier],
) -> Recorder:
    """Scores the pictures of a set and a shard that have no record.

    Raises:
        ValueError: for records of other settings, naming what differs.
    """
    own = json.loads(json.dumps({pictures.name: str(pictures.path), **settings}))
    check_settings(sorted(pictures.folder.glob(f"{SETTINGS}*.json")), own)
    write_json(pictures.folder / shard.name(SETTINGS, "json"), own)
    lines = RecordLines(pictures.folder / shard.name(RECORDS, "jsonl"), "picture")
    counter = SkipCounter(config.max_skipped_share)
    labels = [one.label for one in classes]
    recorder = Recorder(lines, labels, shard, counter, max(1, -(-config.batch_size // len(classes))))
    stream = recorder.record(pictures.read(pictures.path, classes, counter), build)
    for _ in track(stream, pictures.name, total=None, disable=shard.index > 0):
        pass
    return recorder


def sum_up(config: ClassifyConfig, pictures: PictureSet, recorder: Recorder, labels: Sequence[str]) -> dict[str, Any]:
    """The summary of a set, with what its shards have lost.

    Raises:
        TooManySkipped: where more is skipped than the config allows.
    """
    lines = recorder.entries()
    found = summarise_cues(lines) if pictures.name == "cues" else summarise(lines, labels)
    lost = {reason: count for reason, count in recorder.counter.skipped.items() if reason != BROKEN}
    found["skipped"] = dict(sorted({**found["skipped"], **lost}.items()))
    counter = SkipCounter(config.max_skipped_share)
    examples = recorder.counter.examples or [f"see {recorder.lines.path}"]
    counts = {"used": found["num_pictures"], "skipped": found["skipped"], "altered": {}, "examples": examples}
    counter.merge(counts)
    counter.finish()
    return {"path": str(pictures.path), **found}


@contextmanager
def own_folder(folder: Path, shard: Shard) -> Iterator[Path]:
    """A folder of the shard's own, whose files go to `folder` at the end: several shards may be the last at once."""
    own = folder / f".{shard.index}-of-{shard.count}"
    own.mkdir(parents=True, exist_ok=True)
    yield own
    for path in own.iterdir():
        os.replace(path, folder / path.name)
    own.rmdir()


def report(results: dict[str, Any], num_classes: int, path: Path) -> str:
    """The summary in a line."""
    found = [f"{results['data']['num_pictures']} pictures among {num_classes} classes"]
    if (rate := results["data"]["accuracy"]) is not None:
        found.append(f"accuracy {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})")
    if drop := results.get("shift", {}).get("drop"):
        found.append(f"{drop['value']:.3f} less under shift ({drop['low']:.3f} to {drop['high']:.3f})")
    if bias := results.get("cues", {}).get("shape_bias"):
        found.append(f"shape bias {bias['value']:.3f} ({bias['low']:.3f} to {bias['high']:.3f})")
    return f"{', '.join(found)}; summary in {path}"
