"""The match command: pictures with captions of the same words, each line recorded, and what they add up to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL.Image import Image as Picture
from rich.progress import track

from mixmodal.classification.compositional import (
    Composition,
    checked_scores,
    judge,
    read_compositions,
    summarise,
)
from mixmodal.classification.evaluate import BROKEN, check_share
from mixmodal.classification.summary import Rate
from mixmodal.data.skipping import SampleError, SkipCounter
from mixmodal.files import sha256_of
from mixmodal.pipeline.classifiers import hash_model
from mixmodal.pipeline.match_config import MatchConfig
from mixmodal.pipeline.matchers import Matcher, build_matcher
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
from mixmodal.tokenization.preprocessing import PictureError, open_picture

LESS_PRIOR = "less_image_prior"
"""Judgements with log p(image) taken from log p(image | text) where pictures are compared."""


def match(config: MatchConfig) -> None:
    """Scores every line of the task that has no record yet, and once all have one writes the summary.

    Raises:
        ValueError: for a bad task or model, records of other settings, or too many lines with broken pictures.
    """
    task = read_compositions(config.task, config.images)
    settings = json.loads(json.dumps(describe(config)))
    shard = Shard.choose(config.shard)
    check_settings(sorted(config.out.glob(f"{SETTINGS}*.json")), settings)
    lines = RecordLines(config.out / shard.name(RECORDS, "jsonl"), "line")

    @cache
    def build() -> Matcher:
        """A model that can not be loaded leaves no settings behind, which would refuse the next."""
        matcher = build_matcher(config)
        write_json(config.out / shard.name(SETTINGS, "json"), settings)
        return matcher

    counter = SkipCounter(config.max_skipped_share)
    for _ in track(record(task, lines, shard, counter, build), "task", total=None, disable=shard.index > 0):
        pass
    lines = RecordLines(lines.path, lines.item)  # with what other processes have written meanwhile
    found = [entry for one in task if (entry := lines.find(one.key)) is not None]
    if len(found) < len(task):
        print(shard.describe_end(config.out))
        return
    results = sum_up(found)
    examples = counter.examples or [f"see {lines.path}"]
    check_share(config.max_skipped_share, results["num_lines"], results["skipped"], examples)
    head = {"model": config.model, "task": str(config.task), "settings": settings}
    with own_folder(config.out, shard) as folder:
        write_json(folder / SUMMARY, {**head, "settings_sha256": hash_settings(settings), **results})
    print(f"{report(results)}; summary in {config.out / SUMMARY}")


def describe(config: MatchConfig) -> dict[str, Any]:
    """What scores depend on, as plain data."""
    blind = config.blind_model
    return {
        **config.describe(),
        "model_sha256": hash_model(config.method, config.model),
        "blind_sha256": None if blind is None else hash_model("image_given_text", blind),
        "task_sha256": sha256_of(config.task),
        "images": None if config.images is None else str(config.images),
    }


def record(
    task: Sequence[Composition], lines: RecordLines, shard: Shard, counter: SkipCounter, build: Callable[[], Matcher]
) -> Iterator[dict[str, Any]]:
    """Scores the lines of a shard that have no record; those that were skipped are tried again.

    Yields:
        Each record after it is written.

    Raises:
        TooManySkipped: above the share of broken lines that the counter allows.
        ValueError: naming the line, for captions that the model can not tell apart, or scores that can not be.
    """
    for number, one in enumerate(task):
        if not shard.holds(number):
            continue
        before = lines.find(one.key)
        if before is not None and "skipped" not in before:
            counter.use()
            continue
        head = {"key": one.key, "kind": one.kind, "true": list(one.true)}
        try:
            pictures = [open_picture(path, f"{one.key}: {path}") for path in one.images]
        except PictureError as error:
            counter.skip(SampleError(BROKEN, str(error)))
            entry = {**head, "skipped": BROKEN, "error": str(error)}
        else:
            counter.use()
            entry = {**head, **score(build(), one, pictures)}
        lines.append(entry)
        yield entry


def score(matcher: Matcher, one: Composition, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What is found of a line, as plain data."""

    def find(scores: np.ndarray) -> np.ndarray:
        return checked_scores(scores, (len(pictures), len(one.captions)), one.key)

    try:
        scores = find(matcher.pairs(pictures, one.captions))
    except ValueError as error:
        raise ValueError(f"line {one.key}: {error}") from error
    found = {"scores": scores.tolist(), **judge(scores, one.true)._asdict()}
    if matcher.pictures is not None:
        alone = checked_scores(matcher.pictures(pictures), (len(pictures),), one.key)
        found["picture_scores"] = alone.tolist()
        if one.is_grid:
            less = judge(scores, one.true, scores - alone[:, None])
            found[LESS_PRIOR] = {"image": less.image, "group": less.group}
    if matcher.blind is not None:
        blind = find(matcher.blind(pictures, one.captions))
        found["blind"] = {"scores": blind[0].tolist(), **judge(blind, one.true)._asdict()}
    return found


def sum_up(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Plain data: `num_lines`, `skipped` (by reason), `all`, `kinds`, and of a blind reader `blind` with both."""
    skipped = Counter(entry["skipped"] for entry in entries if "skipped" in entry)
    scored = [entry for entry in entries if "skipped" not in entry]
    found = {"num_lines": len(scored), "skipped": dict(sorted(skipped.items()))}
    if not scored:
        return found
    found |= by_kind(scored)
    if "blind" in scored[0]:
        found["blind"] = by_kind([{"kind": entry["kind"], **entry["blind"]} for entry in scored])
    return found


def by_kind(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates of all lines, and of those of each kind."""
    kinds = sorted({entry["kind"] for entry in entries})
    parts = {kind: rates([entry for entry in entries if entry["kind"] == kind]) for kind in kinds}
    return {"all": rates(entries), "kinds": parts}


def rates(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of pictures, and text, image and group scores of grids, with 95 % Wilson intervals; None without any."""
    found = summarise(entries)
    total = found["num_grids"]
    shown: dict[str, Any] = {name: found[name] for name in ("num_pictures", "num_ties", "num_grids")}
    shown["accuracy"] = Rate(found["num_correct"], found["num_pictures"]).to_dict()
    shown |= {name: Rate(found[name], total).to_dict() for name in ("text", "image", "group")}
    less = [entry[LESS_PRIOR] for entry in entries if LESS_PRIOR in entry]
    if less:
        shown[LESS_PRIOR] = {
            name: Rate(sum(one[name] for one in less), len(less)).to_dict() for name in ("image", "group")
        }
    return shown


def report(results: dict[str, Any]) -> str:
    """The summary in a line."""
    found = [f"{results['num_lines']} lines"]
    for name in ("accuracy", "text", "image", "group"):
        if (rate := results.get("all", {}).get(name)) is not None:
            found.append(f"{name} {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})")
    if "blind" in results:
        found.append(f"blind accuracy {results['blind']['all']['accuracy']['value']:.3f}")
    return ", ".join(found)
