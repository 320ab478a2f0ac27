"""The classify command: pictures among captions, each recorded as it is finished, and what they add up to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from mixmodal.classification.classifier import PictureClassifier
from mixmodal.classification.datasets import NamedClass, Read, read_classes, read_cues
from mixmodal.classification.evaluate import BROKEN, Recorder, check_share
from mixmodal.classification.known_sets import KnownSet, choose_classes, find_set, read_set
from mixmodal.classification.measured import Wanted, read_measured, read_or_measure
from mixmodal.classification.summary import describe_drop, draw_figures, summarise, summarise_cues
from mixmodal.data.skipping import SkipCounter
from mixmodal.pipeline.classifiers import METHODS, DiffusionPictures, hash_model
from mixmodal.pipeline.classify_config import ClassifyConfig
from mixmodal.pipeline.measuring import MEASURED, Chosen, check_apart, choose_pictures
from mixmodal.records import (
    RECORDS,
    SETTINGS,
    SUMMARY,
    RecordLines,
    Shard,
    check_settings,
    hash_settings,
    own_folder,
    write_json,
)

RACING = 8
"""Pictures whose classes race together: more fill batches better, and are lost together where a job is killed."""


class PictureSet(NamedTuple):
    """One of the sets of pictures that a call is about: what reads it, its layout, and the folder for its records."""

    name: str
    path: Path
    read: Read
    known: KnownSet | None
    folder: Path


def list_sets(config: ClassifyConfig) -> list[PictureSet]:
    """The pictures in `out` itself, others in folders of their own."""
    found = [PictureSet("data", config.data, read_set, find_set(config.data), config.out)]
    if config.shift is not None:
        read, folder = partial(read_set, option="shift"), config.out / "shift"
        found.append(PictureSet("shift", config.shift, read, find_set(config.shift), folder))
    if config.cues is not None:
        found.append(PictureSet("cues", config.cues, read_cues, None, config.out / "cues"))
    return found


def classify(config: ClassifyConfig) -> None:
    """Scores every picture that has no record yet, and once all have one writes the summary.

    Raises:
        ValueError: for an unknown method, bad classes, templates or data, records of other settings, or too many broken
            pictures.
    """
    sets, templates = list_sets(config), config.read_templates()
    for one in sets:
        if one.known:
            print(f"{one.name}: found {one.known.layout}")
    own = config.classes
    classes = choose_classes(config.data, sets[0].known) if own is None else read_classes(own)
    for one in sets:  # before the model is loaded
        if next(one.read(one.path, classes, SkipCounter(1.0)), None) is None:
            raise ValueError(f"{one.name}: {one.path} holds no pictures that can be read")
    chosen = choose_pictures(config, classes)
    settings = describe(config, classes, templates, chosen)
    build = cache(lambda: build_classifier(config, classes, templates, sets, chosen, settings))
    shard, labels = Shard.choose(config.shard), [one.label for one in classes]
    recorded = [(one, record(config, one, classes, settings, shard, build)) for one in sets]
    if not all(recorder.is_complete() for _, recorder in recorded):
        print(shard.describe_end(config.out))
        return
    results = {one.name: sum_up(config, one, recorder, labels) for one, recorder in recorded}
    if "shift" in results:
        results["shift"]["drop"] = describe_drop(results["data"], results["shift"])
    summary = {"model": config.model, "settings": settings, "settings_sha256": hash_settings(settings), **results}
    if chosen is not None and (config.out / MEASURED).exists():  # not there where every picture is broken
        found = read_measured(config.out / MEASURED, settings)
        summary["measured"] = {"pictures": found.num_pictures, "evaluations": found.num_evaluations}
    for one, _ in recorded:
        if one.name != "cues":
            with own_folder(one.folder, shard) as folder:
                draw_figures(results[one.name], labels, folder)
    with own_folder(config.out, shard) as folder:
        write_json(folder / SUMMARY, summary)
    print(report(results, len(classes), config.out / SUMMARY))


def build_classifier(
    config: ClassifyConfig,
    classes: Sequence[NamedClass],
    templates: Sequence[str],
    sets: Sequence[PictureSet],
    chosen: Chosen | None,
    settings: dict[str, Any],
) -> PictureClassifier:
    """The classifier, with what is measured on pictures before: now, or by whoever came first.

    Raises:
        ValueError: for pictures that are both learned from and judged.
    """
    if chosen is not None:
        for one in sets:
            check_apart(chosen, one.name, one.path, one.read(one.path, classes, SkipCounter(1.0)))
    classifier = METHODS[config.method].build(config, [one.caption for one in classes], templates)
    if chosen is not None:
        assert isinstance(classifier, DiffusionPictures)
        wanted = Wanted(config.diffusion.weighting == "learned", config.diffusion.times == "importance")
        found = read_or_measure(config.out / MEASURED, settings, lambda: classifier.measure(chosen, wanted))
        classifier.use(found)
    return classifier


def describe(
    config: ClassifyConfig, classes: Sequence[NamedClass], templates: Sequence[str], chosen: Chosen | None
) -> dict[str, Any]:
    """What scores depend on, as plain data."""
    adapted = {}
    if config.adapt.denoiser is not None:  # records without one stay valid
        adapted = {"adapt": config.adapt.describe(hash_model("diffusion", config.adapt.denoiser))}
    return {
        "method": config.method,
        "model_sha256": hash_model(config.method, config.model),
        "dtype": config.dtype,
        "seed": config.seed,
        "debias": config.debias,
        "length_normalise": config.length_normalise,
        "variants": vars(config.variants),
        "diffusion": config.diffusion.describe(),
        "templates": list(templates),
        "classes": [one._asdict() for one in classes],
        **config.describe(),
        **adapted,
        **({} if chosen is None else {"measured": chosen.describe()}),
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
    lines = RecordLines(pictures.folder / shard.name(RECORDS, "jsonl"), "picture")
    counter = SkipCounter(config.max_skipped_share)
    labels = [one.label for one in classes]
    together = max(1, -(-config.batch_size // len(classes)))
    if config.method == "diffusion":  # races of late classes fill batches with those of other pictures
        together = max(RACING, together)
    elif config.is_adapted:  # one by one: nothing is lost where a job is killed
        together = 1
    recorder = Recorder(lines, labels, shard, counter, together)

    def build_noted() -> PictureClassifier:
        """A model that can not be loaded leaves no settings behind, which would refuse the next."""
        classifier = build()
        write_json(pictures.folder / shard.name(SETTINGS, "json"), own)
        return classifier

    stream = recorder.record(pictures.read(pictures.path, classes, counter), build_noted)
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
    examples = recorder.counter.examples or [f"see {recorder.lines.path}"]
    check_share(config.max_skipped_share, found["num_pictures"], found["skipped"], examples)
    layout = {} if pictures.known is None else {"layout": pictures.known.layout}
    return {"path": str(pictures.path), **found, **layout}


def report(results: dict[str, Any], num_classes: int, path: Path) -> str:
    """The summary in a line."""
    found = [f"{results['data']['num_pictures']} pictures among {num_classes} classes"]
    if (rate := results["data"]["accuracy"]) is not None:
        found.append(f"accuracy {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})")
    if before := results["data"].get("accuracy_before"):
        found.append(f"{before['value']:.3f} ({before['low']:.3f} to {before['high']:.3f}) before it was adapted")
    if drop := results.get("shift", {}).get("drop"):
        found.append(f"{drop['value']:.3f} less under shift ({drop['low']:.3f} to {drop['high']:.3f})")
    if bias := results.get("cues", {}).get("shape_bias"):
        found.append(f"shape bias {bias['value']:.3f} ({bias['low']:.3f} to {bias['high']:.3f})")
    return f"{', '.join(found)}; summary in {path}"
