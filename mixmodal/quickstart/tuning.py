"""`mixmodal quickstart --stage finetune`: the quickstart's model, tuned on edits, questions and captions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mixmodal.quickstart.chain import ENVIRONMENT, Chain, QuickstartConfig, say
from mixmodal.quickstart.recipe import GROUPS_OF_TASKS, RECORDS, TUNED, Recipe, config_path
from mixmodal.quickstart.runner import Stage, largest_memory_bytes, write_json

ANSWERS = "finetune/answers"
NEEDED = ("export/config.json", "data/corpus.json", "stages/pretraining.json")


def check_chain(run: Path) -> None:
    """Whether the model is there that is tuned.

    Raises:
        ValueError: naming what is missing.
    """
    missing = [name for name in NEEDED if not (run / name).is_file()]
    if missing:
        raise ValueError(
            f"{run / missing[0]} is missing: the finetune stage tunes what the chain has made; run this first: "
            f"mixmodal quickstart --out {run}"
        )


class TuningChain(Chain):
    """From records of tasks to a tuned model and what it answers."""

    def __init__(self, config: QuickstartConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self.made = {
            "report": self.run / "finetune.html",
            "figures": self.run / "finetune.json",
            "model": self.run / TUNED / "export",
        }

    def _stages(self) -> list[Stage]:
        records, shards = "task records", "task shards"
        tuned, answered = "tuning", "answers"
        groups = list(GROUPS_OF_TASKS)
        return [
            self._stage(records, self.write_records, [RECORDS], ["tasks"], ("data",)),
            self._stage(shards, self.prepare, ["finetune/data"], ["templates", *groups], (records, "image tokenizer")),
            self._stage(tuned, self.tune, [TUNED], ["finetune"], (shards, "pretraining")),
            self._stage(answered, self.answer, [ANSWERS], ["answers"], (tuned,)),
            self._stage("tuning report", self.report, ["finetune.html", "finetune.json"], [], (answered,)),
        ]

    def write_records(self) -> None:
        """The tasks as files of records, with their pictures."""
        from mixmodal.quickstart.demo_tasks import write_tasks

        counts = write_tasks(self.run / "data", self.run / RECORDS, self.recipe.configs["tasks"])
        say("      " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    def prepare(self) -> None:
        """Token shards of each group of tasks, as `mixmodal prepare` writes them."""
        from mixmodal.data.corpora import prepare

        for group in GROUPS_OF_TASKS:
            prepare(self.recipe.configs[group])

    def tune(self) -> None:
        """Through the deepspeed launcher."""
        self._launch("finetune", f"{TUNED}/export", "the tuning")

    def answer(self) -> None:
        """What the model answers before and after the tuning."""
        from mixmodal.data.tasks import TaskTemplates
        from mixmodal.pipeline import MixedModal
        from mixmodal.quickstart.answers import Asker, Judge, name_of
        from mixmodal.quickstart.demo import load_demo
        from mixmodal.quickstart.demo_tasks import HELDOUT, TRAIN

        config = self.recipe.configs["answers"]
        asker = Asker(TaskTemplates.load(config_path(self.run, "templates")), self.run / RECORDS)
        tuned = MixedModal.from_pretrained(self.run / TUNED / "export")
        pictures = tuned.codec.image_tokenizer.config
        folders = (self.run / "data" / TRAIN, self.run / "data" / HELDOUT)
        judge = Judge(tuned, load_demo(*folders, pictures.image_size, pictures.preprocess))
        found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        for split in (HELDOUT, TRAIN):
            records = asker.choose(read_records(self.run / RECORDS, split), config)
            for when, model in (("before", MixedModal.from_pretrained(self.export)), ("after", tuned)):
                answers = asker.ask(model, records, config, f"{split}, {when}", only_pictures=when == "before")
                found[when] += judge.items(records, answers, split == HELDOUT, self.run, f"{ANSWERS}/{when}_{split}")
        say(f"      {len(found['after'])} answers to {len({name_of(item['record']) for item in found['after']})} tasks")
        write_json(self.run / ANSWERS / "results.json", found)

    def report(self) -> None:
        """`finetune.json` and `finetune.html`."""
        from mixmodal.quickstart.answers import summarise
        from mixmodal.quickstart.report import median_of, read_json, read_metrics
        from mixmodal.quickstart.tuning_report import say_summary, write_tuning_report

        started = time.monotonic()
        markers = self.runner.markers(skip=["tuning report"])
        answers = read_json(self.run / ANSWERS / "results.json")
        summary: dict[str, Any] = {
            "seconds": self.setup_seconds + sum(marker["seconds"] for marker in markers),
            "peak_memory_bytes": max(largest_memory_bytes(), *(marker["peak_memory_bytes"] for marker in markers)),
            "tasks": {
                when: {
                    split: summarise([item for item in items if item["heldout"] == heldout])
                    for split, heldout in (("heldout", True), ("trained", False))
                }
                for when, items in answers.items()
            },
            "tokens_per_second_train": median_of(read_metrics(self.run / TUNED / "metrics.jsonl"), "tokens_per_second"),
            **read_json(self.run / TUNED / ENVIRONMENT),
            "stages": {marker["name"]: marker["seconds"] for marker in markers},
        }
        write_tuning_report(self.run, summary, answers["after"], markers)
        summary["seconds"] += time.monotonic() - started
        write_json(self.run / "finetune.json", summary)
        say_summary(summary, say)


def read_records(folder: Path, split: str) -> list[dict[str, Any]]:
    """All records of one split."""
    lines = [line for path in sorted(folder.glob(f"{split}_*.jsonl")) for line in path.read_bytes().splitlines()]
    return [json.loads(line) for line in lines]
