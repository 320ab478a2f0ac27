"""The recipe: one YAML file a stage, completed with the paths of a run and kept in its `configs/` folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixmodal.config import load_config, read_yaml


class Entry(NamedTuple):
    """The config type of one file, the command that reads it, and its keys that are paths within the run."""

    module: str
    config: str
    command: str
    paths: Mapping[str, str | list[str]]


ENCODER, MEMORY = "encoder/export", "memory"
TOKENIZERS = {"text_tokenizer": "text_tokenizer/text_tokenizer.model", "image_tokenizer": "image_tokenizer/export"}
ENTRIES = {
    "corpus": Entry("mixmodal.quickstart.corpus", "DemoCorpusConfig", "", {}),
    "text_tokenizer": Entry(
        "mixmodal.training.text_tokenizer",
        "TextTokenizerTrainingConfig",
        "train-text-tokenizer",
        {"shards": ["data/train"], "out": TOKENIZERS["text_tokenizer"]},
    ),
    "image_tokenizer": Entry(
        "mixmodal.training.image_tokenizer",
        "ImageTokenizerTrainingConfig",
        "train-image-tokenizer",
        {
            "data.train": ["data/train", "data/tokenizer_extra"],
            "data.held_out": ["data/heldout"],
            "trainer.run_dir": "image_tokenizer",
        },
    ),
    "tokens": Entry(
        "mixmodal.data.pretokenize",
        "PretokenizeConfig",
        "",
        {"shards": ["data/train"], "out": "tokens/train", **TOKENIZERS},
    ),
    "encoder": Entry(
        "mixmodal.training.contrastive",
        "EncoderTrainingConfig",
        "train-encoder",
        {"data.train": ["data/train"], "data.held_out": ["data/heldout"], "trainer.run_dir": "encoder"},
    ),
    "memory": Entry(
        "mixmodal.data.indexing",
        "MemoryConfig",
        "index",
        {"shards": ["data/train"], "tokens": "tokens/train", "encoder": ENCODER, "out": MEMORY},
    ),
    "retrieval": Entry("mixmodal.quickstart.finding", "FindingConfig", "", {}),
    "pretrain": Entry(
        "mixmodal.training.pretrain",
        "PretrainConfig",
        "pretrain",
        {
            "data.tokens": "tokens/train",
            "data.held_out_tokens": "tokens/heldout",
            "trainer.run_dir": "pretrain",
            "trainer.deepspeed": "configs/deepspeed.json",
            **TOKENIZERS,
        },
    ),
    "samples": Entry("mixmodal.quickstart.samples", "SamplesConfig", "", {}),
    "classes": Entry("mixmodal.quickstart.classes", "ClassesConfig", "", {}),
}
TUNED, RECORDS = "finetune/tuned", "finetune/records"
GROUPS_OF_TASKS = ("edits", "drawings", "texts")
"""Of the demo tasks: a file of records and a folder of token shards each."""
EXPORTED = {"tokens.text_tokenizer": "export/text_tokenizer.model", "tokens.image_tokenizer": "export/image_tokenizer"}
TUNING = {
    "tasks": Entry("mixmodal.quickstart.demo_tasks", "DemoTasksConfig", "", {}),
    "templates": Entry("mixmodal.data.tasks", "TasksConfig", "", {}),
    **{
        group: Entry(
            "mixmodal.data.corpora",
            "PrepareConfig",
            "prepare",
            {
                "corpora.0.path": f"{RECORDS}/train_{group}.jsonl",
                "corpora.0.templates": "configs/templates.yaml",
                "out": f"finetune/data/{group}",
                **EXPORTED,
            },
        )
        for group in GROUPS_OF_TASKS
    },
    "finetune": Entry(
        "mixmodal.training.finetune",
        "FinetuneConfig",
        "finetune",
        {
            "init_from": "export",
            **{f"data.sources.{group}.tokens": f"finetune/data/{group}/tokens" for group in GROUPS_OF_TASKS},
            "trainer.run_dir": TUNED,
            "trainer.deepspeed": "configs/deepspeed.json",
        },
    ),
    "answers": Entry("mixmodal.quickstart.answers", "AnswersConfig", "", {}),
}
"""Of the tuning, which goes on from what the other files make."""
LAUNCHED = {"pretrain", "finetune"}
"""What the deepspeed launcher runs."""
DEEPSPEED = "deepspeed.json"


class Recipe(NamedTuple):
    """What a run is made by.

    Args:
        settings: by file, what the recipe says, without the paths of the run.
        configs: by file, the config with them.
    """

    settings: dict[str, Any]
    configs: dict[str, Any]


def load_recipe(
    run: Path, folder: Path | None = None, num_processes: int = 1, entries: Mapping[str, Entry] = ENTRIES
) -> Recipe:
    """Writes `run/configs/*.yaml` and loads them; nothing is trained before all of them are right.

    Args:
        run: folder of the run.
        folder: holds files that take the place of those of the package, as `pretrain.yaml`.
        num_processes: of what the deepspeed launcher runs, for the command that heads its file.
        entries: the files, `ENTRIES` or `TUNING`.

    Raises:
        ValueError: for a file that is not part of the recipe or can not be read, or a key that its config type does
            not have.
    """
    own = {path.name: path for path in sorted(folder.iterdir())} if folder else {}
    names = {f"{name}.yaml" for name in entries} | {DEEPSPEED}
    if unknown := sorted(set(own) - names):
        raise ValueError(f"{folder}: {unknown[0]} is not part of the recipe; its files are {', '.join(sorted(names))}")
    configs = run / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    deepspeed = own[DEEPSPEED].read_text(encoding="utf-8") if DEEPSPEED in own else read_packaged(DEEPSPEED)
    (configs / DEEPSPEED).write_text(deepspeed, encoding="utf-8")
    settings: dict[str, Any] = {DEEPSPEED: deepspeed}
    loaded: dict[str, Any] = {}
    for name, entry in entries.items():
        file = f"{name}.yaml"
        settings[name] = read_yaml(own[file]) if file in own else yaml.safe_load(read_packaged(file)) or {}
        mixed = name in ("tokens", "memory") and settings["corpus"].get("mixed")
        path = write_config(run, name, with_mixed(entry) if mixed else entry, settings[name], num_processes)
        loaded[name] = load_config(getattr(importlib.import_module(entry.module), entry.config), path)
    return Recipe(settings, loaded)


def read_packaged(name: str) -> str:
    return resources.files("mixmodal.quickstart").joinpath(f"recipe/{name}").read_text(encoding="utf-8")


def with_mixed(entry: Entry) -> Entry:
    """The entry of the token shards, or of the memory of them, where the corpus has documents of both styles, too."""
    return entry._replace(paths={**entry.paths, "shards": ["data/train", "data/train_mixed"]})


def write_config(run: Path, name: str, entry: Entry, settings: Mapping[str, Any], num_processes: int = 1) -> Path:
    """The settings with the paths of the run as `run/configs/NAME.yaml`, headed by the command that reads it."""
    resolved = yaml.safe_load(yaml.safe_dump(dict(settings)))
    for key, value in entry.paths.items():
        *parents, last = key.split(".")
        place = resolved
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[last] = [str(run / part) for part in value] if isinstance(value, list) else str(run / value)
    path = config_path(run, name)
    head = f"# {command_of(run, name, num_processes)}\n" if entry.command else ""
    path.write_text(head + yaml.safe_dump(resolved, sort_keys=False, width=110), encoding="utf-8")
    return path


def config_path(run: Path, name: str) -> Path:
    return run / "configs" / f"{name}.yaml"


def command_of(run: Path, name: str, num_processes: int = 1) -> str:
    """What a person types to do the stage of this file again; empty where only the quickstart does it."""
    entry = {**ENTRIES, **TUNING}[name]
    if not entry.command:
        return ""
    arguments = f"{entry.command} --config {config_path(run, name)}"
    launched = f"deepspeed --num_gpus {num_processes} --module mixmodal.cli {arguments}"
    return launched if name in LAUNCHED else f"mixmodal {arguments}"
