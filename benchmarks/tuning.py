"""Instruction tuning of the quickstart's model: what it learns, LoRA against full tuning, and preference tuning.

    python benchmarks/tuning.py [--run runs/quickstart] [--parts tasks adapters preference]

Needs a quickstart and its second command (`mixmodal quickstart --stage finetune`). `tasks` records the figures of that
run. `adapters` tunes the same model on the same rows with LoRA, and asks it the same. `preference` draws eight pictures
for each caption of the training pairs, makes pairs of the best and the worst by a judge (how well the model reads the
caption from the picture; or the distance to the true picture), tunes the tuned model on these by DPO, and lets both
judges compare both models on captions of held-out pairs, whose pictures no model was trained on. What is trained goes
to RUN/finetune and is taken from there if it is whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import append, record

from mixmodal.config import load_config, save_config
from mixmodal.data.corpora import CorpusConfig, PrepareConfig, prepare
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.source import SourceConfig
from mixmodal.data.tasks import TaskTemplates
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.judging import JudgeName, build_judge, read_questions
from mixmodal.pipeline.prefer import PreferConfig, prefer
from mixmodal.pipeline.win_rate import measure_win_rate
from mixmodal.quickstart.answers import AnswersConfig, Asker, Judge, summarise
from mixmodal.quickstart.demo import load_demo
from mixmodal.quickstart.recipe import RECORDS, TUNED, config_path
from mixmodal.quickstart.report import read_metrics
from mixmodal.quickstart.tuning import read_records
from mixmodal.quickstart.tuning_report import in_order, title_of
from mixmodal.training.adapter import AdapterConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.preference import PreferenceTuningConfig

EDITS = ("style", "skin_tone", "gender")
NUM_ANSWERS, SEEDS = 8, 2
"""Pictures drawn for a caption, of which a pair is made, and pairs for each."""
MEMORY_STEPS = 60
"""After which memory is at its peak."""
JUDGES: tuple[JudgeName, ...] = ("likelihood", "reference")
DPO_STEPS, DPO_LR = 200, 2e-4


def percent(hits: int, trials: int) -> float:
    return 100 * hits / trials


def record_tasks(run: Path) -> None:
    """The figures of the quickstart's tuning: held-out pairs, before and after."""
    summary = json.loads((run / "finetune.json").read_text())
    before, after = (summary["tasks"][when]["heldout"] for when in ("before", "after"))
    versions = dict(summary["versions"])
    device = versions.pop("device")
    known = {"device": device, "device_kind": "cpu" if "cores" in device else "cuda", "commit": summary["commit"]}

    def note(subject: str, value: float, unit: str, config: dict[str, Any]) -> None:
        where = {"versions": versions, "command": "mixmodal quickstart --stage finetune", **known}
        append(benchmark="tuning_tasks", subject=subject, repeats=[value], unit=unit, config=config, **where)

    for task in in_order(after):
        rates = after[task]
        for name, found in rates.items():
            if not isinstance(found, list):
                continue
            what = title_of(task).rstrip("?") + ("" if name == "right" else f", {name}")
            settings = {"hits": found[0], "trials": found[1], "split": "heldout"}
            note(f"{what}: before, %", percent(*before[task][name]), "%", settings)
            note(f"{what}: tuned, %", percent(*found), "%", settings)
            note(f"{what}: held-out pairs", found[1], "", settings)
        if task == "which":
            note(f"{title_of(task).rstrip('?')}: chance, %", 50, "%", {})
        if "majority" in rates:
            kinds = {"kinds": rates["kinds"]}
            for figure, value in (("chance, %", 100 / rates["kinds"]), ("commonest kind, %", 100 * rates["majority"])):
                note(f"{title_of(task).rstrip('?')}: {figure}", value, "%", kinds)
    minutes = summary["seconds"] / 60
    note("All of it: minutes", minutes, "min", {"stages": summary["stages"]})


class Exam:
    """Asks models what the quickstart's tuning asks, of held-out pairs."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._config = load_config(AnswersConfig, config_path(run, "answers"))
        self._asker = Asker(TaskTemplates.load(config_path(run, "templates")), run / RECORDS)
        self._records = self._asker.choose(read_records(run / RECORDS, "heldout"), self._config)

    def rates(self, export: Path) -> dict[str, float]:
        """Shares in per cent: of all edits concept and style, of questions the right kind, of captions the picture."""
        model = MixedModal.from_pretrained(export)
        pictures = model.codec.image_tokenizer.config
        folders = (self._run / "data" / "train", self._run / "data" / "heldout")
        judge = Judge(model, load_demo(*folders, pictures.image_size, pictures.preprocess))
        answers = self._asker.ask(model, self._records, self._config, export.parent.name)
        items = judge.items(self._records, answers, True, self._run, f"finetune/exam/{export.parent.name}")
        return shares_of(summarise(items))


def shares_of(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    def together(name: str) -> float:
        return percent(*(sum(found[task][name][place] for task in EDITS if task in found) for place in (0, 1)))

    return {
        "edits, concept, %": together("concept"),
        "edits, style, %": together("style"),
        "drawings, concept, %": percent(*found["drawing"]["concept"]),
        "right kind, %": percent(*found["category"]["right"]),
    }


def record_adapters(run: Path) -> None:
    """LoRA beside full tuning: the same data and steps."""
    full = load_config(FinetuneConfig, config_path(run, "finetune"))
    arms = {"full": full}
    for rank in (16,):
        trainer = replace(full.trainer, run_dir=run / "finetune" / f"lora{rank}")
        adapter = AdapterConfig(rank=rank, alpha=2 * rank, rows=["image", "control"])
        arms[f"LoRA, rank {rank}"] = replace(full, trainer=trainer, adapter=adapter)
    exam = Exam(run)
    for arm, config in arms.items():
        folder = config.trainer.run_dir
        if not (folder / "export" / "config.json").is_file():
            finetune(config)
        resources = measure_resources(config)
        seconds = next(
            line["wall_time_s"] for line in read_metrics(folder / "metrics.jsonl")[::-1] if "wall_time_s" in line
        )
        settings = {
            "steps": config.trainer.max_steps,
            "rows": config.trainer.micro_batch_size,
            "lr": config.optimizer.lr,
        }
        figures = {
            "trained parameters": resources["trained_parameters"],
            "peak memory, GB": resources["peak_memory_bytes"] / 1e9,
            "minutes": seconds / 60,
            **exam.rates(folder / "export"),
        }
        for name, value in figures.items():
            record("tuning_adapters", f"{arm}: {name}", [value], "", "cpu", settings)


def measure_resources(config: FinetuneConfig) -> dict[str, Any]:
    """`resources.json` of a few steps of the same training in a process of its own, which holds nothing else."""
    with tempfile.TemporaryDirectory() as name:
        trainer = replace(config.trainer, run_dir=Path(name) / "run", max_steps=MEMORY_STEPS)
        save_config(replace(config, trainer=trainer), Path(name) / "few.yaml")
        command = [sys.executable, "-m", "mixmodal.cli", "finetune", "--config", f"{name}/few.yaml"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((trainer.run_dir / "resources.json").read_text())


def record_preference(run: Path) -> None:
    """DPO on best-of-N by two judges, each judged by both on the captions of held-out pairs."""
    base, root = run / TUNED / "export", run / "finetune" / "preference"
    corpus = CorpusConfig(
        kind="tasks", path=run / RECORDS / "heldout_drawings.jsonl", templates=config_path(run, "templates")
    )
    if not (root / "heldout" / "report.json").is_file():
        prepare(PrepareConfig(corpora=(corpus,), out=root / "heldout", image_size=32))
    reference = MixedModal.from_pretrained(base)
    counter = SkipCounter(0.0)
    questions = list(read_questions(root / "heldout" / "shards", reference.codec, "image", counter, SampleLimits()))
    judges = {judge: build_judge(judge, reference) for judge in JUDGES}
    for judge in JUDGES:
        folder = tune_on_pairs(run, base, root / judge, judge)
        model = MixedModal.from_pretrained(folder / "export")
        last = [line for line in read_metrics(folder / "metrics.jsonl") if "kl_estimate" in line][-1]
        figures = {
            "accuracy on its pairs, %": 100 * last["accuracy"],
            "divergence, nats a token": last["kl_estimate"],
        }
        for other, found in judges.items():
            options: Any = {"guidance_scale": 1.0}
            won = measure_win_rate(
                model, reference, questions, found, "image", num=NUM_ANSWERS, seed=1000, options=options
            )
            figures[f"wins by {other}, %"] = 100 * won.share
            figures |= {f"from ({other})": 100 * won.low, f"to ({other})": 100 * won.high}
        settings = {
            "questions": len(questions),
            "answers": NUM_ANSWERS,
            "steps": DPO_STEPS,
            "beta": 0.3,
            "sft_weight": 0.3,
            "lr": DPO_LR,
        }
        for name, value in figures.items():
            record("tuning_preference", f"pairs by {judge}: {name}", [value], "", "cpu", settings)


def tune_on_pairs(run: Path, base: Path, root: Path, judge: JudgeName) -> Path:
    """The run folder of DPO on pairs that this judge makes of the captions of training pairs."""
    sources: dict[str, SourceConfig] = {}
    for seed in range(SEEDS):
        folder = root / f"pairs{seed}"
        settings = {"num": NUM_ANSWERS, "guidance_scale": 1.0, "seed": seed, "judge": judge}
        prefer(PreferConfig(model=str(base), prompts=run / "finetune/data/drawings/shards", out=folder, **settings))
        sources[f"pairs{seed}"] = SourceConfig(tokens=folder / "tokens")
    config = FinetuneConfig(
        init_from=base,
        data=FinetuneDataConfig(sources=sources, seq_len=128),
        preference=PreferenceTuningConfig(beta=0.3, sft_weight=0.3),
        optimizer=OptimizerConfig(lr=DPO_LR, betas=(0.9, 0.98), weight_decay=0.0, warmup_steps=20),
        trainer=TrainerConfig(run_dir=root / "tuned", max_steps=DPO_STEPS, micro_batch_size=8, log_every=20),
        z_loss_weight=0.0,
    )
    if not (config.trainer.run_dir / "export" / "config.json").is_file():
        finetune(config)
    return config.trainer.run_dir


PARTS = {"tasks": record_tasks, "adapters": record_adapters, "preference": record_preference}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a quickstart")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.run)
