"""Classifiers of the held-out demo pictures, all trained on the same pictures: accuracy among all held-out concepts.

    python benchmarks/demo_classifiers.py [--run runs/quickstart] [--denoiser runs/demo_diffusion/export]

Needs a quickstart (`make quickstart`: transformer, encoder, held-out pictures) and a denoiser
(`mixmodal train-diffusion --config configs/train/demo_diffusion.yaml`). Each picture is of a concept in a style in
which no model has seen it, though all have seen the concept in the other style. Its classes are all held-out concepts
in the picture's own style, so that the style gives nothing away. The blind arm reads the captions alone: log p(text).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from mixmodal import MixedModal
from mixmodal.classification.autoregressive import score_texts
from mixmodal.classification.summary import Rate, credit, top_credit
from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SkipCounter
from mixmodal.document import Document, Text
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.tokenization.preprocessing import MAX_PIXELS

ARMS: dict[str, dict[str, Any]] = {
    "log p(image given text)": {"method": "image_given_text"},
    "log p(text given image)": {"method": "text_given_image"},
    "log p(text given image) - log p(text)": {"method": "text_given_image", "debias": 1.0},
    "diffusion, adaptive": {"method": "diffusion"},
    "contrastive": {"method": "contrastive"},
}


def write_pictures(shards: Path, folder: Path) -> dict[str, list[str]]:
    """The pictures of each style in a folder for each concept, and a file of classes beside; concepts by style."""
    concepts: set[str] = set()
    found: dict[str, list[str]] = {}
    for sample in read_samples(shards, SkipCounter(0.0)):
        concept, style = str(sample.metadata["concept"]), str(sample.metadata["style"])
        place = folder / style / concept
        place.mkdir(parents=True, exist_ok=True)
        sample.pictures[0].open(MAX_PIXELS).save(place / f"{sample.key}.png")
        concepts.add(concept)
        found.setdefault(style, []).append(concept)
    for style in found:
        lines = [f"{concept}\t{concept}, {style} style" for concept in sorted(concepts)]
        (folder / f"{style}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def classify_style(folder: Path, style: str, arm: str, model: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the pictures of a style."""
    out = folder / "classified" / f"{list(ARMS).index(arm)}_{style}"
    classify(ClassifyConfig(model=str(model), data=folder / style, classes=folder / f"{style}.txt", out=out, **options))
    return [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def report(arm: str, entries: Sequence[dict[str, Any]], labels: Sequence[str], write: Any) -> None:
    """Records accuracy with its interval, the share among the best five, and evaluations of a picture."""
    places = {label: place for place, label in enumerate(labels)}
    rate = Rate(sum(credit(entry, entry["label"]) for entry in entries), len(entries))
    top = sum(top_credit(entry, places[entry["label"]]) for entry in entries) / len(entries)
    evaluations = float(np.mean([sum(entry["evaluations"]) for entry in entries]))
    figures = {"accuracy": rate.value, "from": rate.interval[0], "to": rate.interval[1], "among the best 5": top}
    for figure, value in {**figures, "evaluations a picture": evaluations}.items():
        shape = {"pictures": len(entries), "classes": len(labels)}
        write("demo_classifiers", f"{arm}: {figure}", [value], "share", "cpu", shape)


def blind(model: MixedModal, folder: Path, styles: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What the likeliest caption of each style gives: the same for every picture of it."""
    entries = []
    for style, shown in styles.items():
        rows = [line.split("\t") for line in (folder / f"{style}.txt").read_text(encoding="utf-8").splitlines()]
        scores = score_texts(model._scorer, [Document([Text(caption)]) for _, caption in rows]).totals
        labels = [label for label, _ in rows]
        best = labels[int(scores.argmax())]
        entries += [
            {"label": concept, "tied": [best], "scores": scores.tolist(), "evaluations": [1] * len(labels)}
            for concept in shown
        ]
    return entries


def main(options: argparse.Namespace) -> None:
    write = print if options.dry else record
    folder = options.work
    shutil.rmtree(folder, ignore_errors=True)
    styles = write_pictures(options.run / "data/heldout", folder)
    labels = sorted({concept for shown in styles.values() for concept in shown})
    models = {"diffusion": options.denoiser, "contrastive": options.run / "encoder/export"}
    for arm, settings in ARMS.items():
        model = models.get(settings["method"], options.run / "export")
        entries = [entry for style in styles for entry in classify_style(folder, style, arm, model, settings)]
        report(arm, entries, labels, write)
    report("blind", blind(MixedModal.from_pretrained(options.run / "export"), folder, styles), labels, write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a quickstart")
    parser.add_argument("--denoiser", type=Path, default=Path("runs/demo_diffusion/export"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/demo_classifiers"), help="folder for pictures and records"
    )
    parser.add_argument("--dry", action="store_true", help="print instead of recording")
    main(parser.parse_args())
