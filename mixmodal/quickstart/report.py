"""The report page of a quickstart run, made from what the stages have written: held-out figures first."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mixmodal.evaluation.concepts import Rate
from mixmodal.evaluation.page import (
    Answer,
    code,
    figure,
    figure_of,
    figures,
    findings,
    folded,
    page,
    paragraph,
    percent,
    picture,
    section,
    table,
    tile,
    tiles,
    verdict,
)
from mixmodal.quickstart.charts import Curve, heat_table, line_chart
from mixmodal.quickstart.scoring import split_rate

ART = (
    ("Twemoji", "Twitter, Inc. and other contributors", "CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    ("OpenMoji", "the OpenMoji project", "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
)
SHOWN = 16
FOUND, FOUND_SHOWN = 24, 8
"""Held-out pairs of which the page shows what they find, and those that are not folded away; they take much room."""
GIB = 1024**3
Results = Mapping[str, Any]


def write_report(run: Path, summary: Results, stages: Sequence[Results]) -> Path:
    """Writes `run/report.html`, one self-contained page.

    Args:
        run: the quickstart's folder; the stages before the report have written into it.
        summary: what `summary.json` holds.
        stages: a mapping for each stage: `name`, `seconds`, `peak_memory_bytes`, `command`.
    """
    samples = read_json(run / "samples" / "results.json")
    speed = (
        f"Training: {summary['tokens_per_second_train']:,.0f} tokens a second; "
        f"generating: {summary['tokens_per_second_generate']:,.0f} tokens a second."
    )
    body = [
        *_head(summary),
        _first_figures(summary, samples),
        _text_to_image(run, samples),
        _image_to_text(run, samples),
        _mixed(run, samples["mixed"]),
        _classification(run, read_json(run / "classification" / "results.json")),
        _found(run, read_json(run / "retrieval" / "results.json")),
        _tokenizer(run, summary),
        _curves(run),
        made_by(summary, stages, speed),
    ]
    path = run / "report.html"
    path.write_text(page("mixmodal quickstart", body), encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """What a stage has written.

    Raises:
        ValueError: naming the file, where it is broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete its folder, and the stage is done again") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where the file is absent. A last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON") from error
    return metrics


def _head(summary: Results) -> Iterator[str]:
    counts = summary["counts"]
    yield "<header><h1>One model that draws and describes</h1>"
    yield paragraph(
        f"Trained from nothing on {counts['pictures']:,} demo pictures of {counts['concepts']:,} concepts in "
        f"{len(counts['styles'])} styles ({' and '.join(counts['styles'])}) in {summary['seconds'] / 60:.1f} minutes. "
        f"{counts['heldout']:,} pairs of concept and style were held out: the model has seen these concepts "
        "in the other style only. What it makes of them is shown first; what it was trained on it may simply remember."
    )
    device = summary["versions"].get("device", "unknown device")
    yield paragraph(f"Commit {summary['commit']}, {device}.", "note")
    yield "</header>"


def _first_figures(summary: Results, samples: Results) -> str:
    pictures, captions = samples["text_to_image"], samples["image_to_text"]
    classified = summary["classification"]
    chance = f"chance {100 / classified['num_candidates']:.0f} %"

    def cards(heldout: bool) -> list[str]:
        return [
            figure_of(
                split_rate(pictures, "concept_right", heldout), "text to image: right concept", "nearest picture"
            ),
            figure_of(split_rate(pictures, "style_right", heldout), "text to image: right style", "nearest picture"),
            figure_of(split_rate(pictures, "both_right", heldout), "text to image: both right", "the very picture"),
            figure_of(split_rate(captions, "concept_right", heldout), "image to text: right concept"),
        ]

    first = [
        *cards(heldout=True),
        figure(percent(classified["image_given_text_heldout"]), "classified by p(image | text)", chance),
        figure(percent(classified["text_given_image_heldout"]), "classified by p(text | image)", chance),
        figure(f"{summary['tokenizer']['psnr_heldout']:.1f} dB", "image tokenizer: PSNR of held-out pictures"),
    ]
    return section(
        "Held-out pairs",
        f"Pairs of concept and style that were not in the training data. The nearest picture is sought among all "
        f"{summary['counts']['pictures']:,} demo pictures; the distance is the {samples['distance']}.",
        figures(first, first=True),
        paragraph(_shared_with_training(pictures), "note"),
        paragraph(_by_reference(summary), "note"),
        "<h3>Training pairs, for comparison</h3>",
        figures(cards(heldout=False)),
    )


def _shared_with_training(pictures: Sequence[Results]) -> str:
    """What the two separate figures hide, in numbers: how often one and the same picture has both right."""
    heldout = [item for item in pictures if item["label"]["heldout"]]
    familiar = [
        item
        for item in heldout
        if not item["nearest"]["label"]["heldout"] and (item["concept_right"] or item["style_right"])
    ]
    both = split_rate(pictures, "both_right", heldout=True)
    return (
        "Right concept and right style are counted apart. For held-out pairs the picture nearest to what the model "
        f"draws is a training picture of the right style or of the right concept in {len(familiar)} of {len(heldout)} "
        f"cases; in {both.hits} of {both.trials} ({percent(both.share)}) it is right in both."
    )


def _by_reference(summary: Results) -> str:
    """What the rates are by either comparison: with the pictures as they are, or with the blur of the tokenizer."""
    names = {
        "original": "the demo pictures as they are",
        "redrawn": "the demo pictures as the image tokenizer redraws them",
    }
    rates = {name: summary[f"text_to_image_{name}"] for name in names}
    shown = [
        f"{said}: {percent(rates[name]['concept_accuracy_heldout'])} right concept, "
        f"{percent(rates[name]['style_accuracy_heldout'])} right style, "
        f"{percent(rates[name]['both_accuracy_heldout'])} both"
        for name, said in names.items()
    ]
    return f"Text to image of held-out pairs, the nearest sought among {'; among '.join(shown)}."


def _text_to_image(run: Path, samples: Results) -> str:
    def show(item: Results) -> str:
        nearest = item["nearest"]
        pair = [
            (picture(run / item["image"], item["prompt"]), "generated"),
            (picture(run / nearest["image"], nearest["label"]["caption"]), f"nearest, {nearest['distance']:.2f}"),
        ]
        label = nearest["label"]
        signs = f"{verdict(item['concept_right'], label['concept'])}<br>{verdict(item['style_right'], label['style'])}"
        return tile(pair, f"<b>{escape(item['prompt'])}</b><br>{signs}")

    return section(
        "Text to image",
        "Each prompt with the picture that the model drew for it, and the demo picture nearest to that.",
        *_by_split(samples["text_to_image"], show),
    )


def _image_to_text(run: Path, samples: Results) -> str:
    def show(item: Results) -> str:
        words = verdict(item["concept_right"], item["caption"] or "(nothing)")
        truth = "" if item["concept_right"] else f"<br><small>it is: {escape(item['label']['caption'])}</small>"
        return tile([(picture(run / item["image"], item["label"]["caption"]), "given")], f"{words}{truth}")

    return section(
        "Image to text",
        "Each picture with the caption that the model wrote. A caption is right when it names the concept exactly.",
        *_by_split(samples["image_to_text"], show, small=True),
    )


def _by_split(items: Sequence[Results], show: Callable[[Results], str], small: bool = False) -> Iterator[str]:
    for heldout, title in ((True, "Held-out pairs"), (False, "Training pairs")):
        chosen = [show(item) for item in items if item["label"]["heldout"] == heldout]
        yield f"<h3>{title}</h3>{tiles(chosen, SHOWN, 'all the others', small)}"


def _mixed(run: Path, mixed: Results) -> str:
    parts = [f'<p class="prompt">{escape(mixed["prompt"])}</p>']
    for part in mixed["parts"]:
        parts.append(picture(run / part["image"], "generated") if "image" in part else f"<p>{escape(part['text'])}</p>")
    return section(
        "A mixed document",
        "One prompt (underlined); the model continued with pictures and text by itself, in one sequence.",
        f'<div class="mixed">{"".join(parts)}</div>',
    )


def _classification(run: Path, results: Results) -> str:
    parts = []
    for method, words in (
        ("image_given_text", "log p(image | caption)"),
        ("text_given_image", "log p(caption | image)"),
    ):
        result = results[method]
        confusion = result["confusion"]
        parts.append(f"<h3>By {escape(words)}</h3>")
        parts.append(heat_table(confusion["names"], np.array(confusion["counts"]), "true", "chosen"))
        if result["top_confusions"]:
            rows = [[true, chosen, times] for true, chosen, times in result["top_confusions"]]
            mistakes = table(["true", "chosen", "times"], rows)
            parts.append(f"<details><summary>most frequent mistakes</summary>{mistakes}</details>")
    examples = []
    for item in results["examples"]:
        chosen = "<br>".join(
            f"{verdict(method['right'], method['chosen'])} <small>by {escape(name)}</small>"
            for name, method in item["methods"].items()
        )
        examples.append(tile([(picture(run / item["image"], item["caption"]), item["caption"])], chosen))
    return section(
        "Classification of held-out pictures",
        f"Each held-out picture against its true caption and {results['num_candidates'] - 1} captions of other "
        "concepts in the same style. The tables count categories: rows are true, columns chosen.",
        *parts,
        tiles(examples, SHOWN // 2, "more pictures with the captions chosen", small=True),
    )


def _found(run: Path, results: Results) -> str:
    names = {"text": "found by its caption", "image": "found by its picture"}

    def answers(found: Sequence[Results]) -> list[Answer]:
        return [Answer(picture(run / one["image"], one["caption"]), one["caption"], one["right"]) for one in found]

    def show(item: Results) -> str:
        label = item["label"]
        strips = {words: answers(item["found"][name]) for name, words in names.items()}
        return findings(picture(run / item["image"], label["caption"]), label["caption"], strips)

    def recall(name: str, k: str) -> str:
        found = Rate(*results[f"by_{name}"][k])
        return f"{percent(found.share)} ({found.hits} of {found.trials})"

    first, five = (f"{100 * results['chance'][k]:.1f} %" for k in ("1", "5"))
    rates = (
        f"By its caption, a pair finds the right document first in {recall('text', '1')} of the cases and among the "
        f"first five in {recall('text', '5')}; by its picture, in {recall('image', '1')} and {recall('image', '5')}. "
        f"Chance: {first} and {five}."
    )
    return section(
        "What is found",
        f"Each held-out pair asks the memory of {results['num_documents']:,} training documents, where its "
        "concept stands in the other style only: that document is right. Shown are the nearest ones, the nearest "
        "first. A small encoder compares them, which was trained on captions without their style; a caption finds it "
        "above all by the words that both captions share. The transformer has drawn and described without all this.",
        paragraph(rates),
        folded([show(item) for item in results["items"][:FOUND]], FOUND_SHOWN, "more pairs, drawn at random as these"),
    )


def _tokenizer(run: Path, summary: Results) -> str:
    figures_of_it = summary["tokenizer"]
    cards = [
        figure(f"{figures_of_it['psnr_heldout']:.2f} dB", "PSNR, held-out pictures"),
        figure(f"{figures_of_it['ssim_heldout']:.3f}", "SSIM, held-out pictures"),
        figure(percent(figures_of_it["codebook_usage"]), "of the codes are used", "by all demo pictures, both splits"),
        figure(
            percent(figures_of_it["codebook_usage_heldout"]),
            "of the codes are used",
            "by held-out pictures alone; equally likely codes would give "
            + percent(figures_of_it["codebook_usage_heldout_if_uniform"]),
        ),
    ]
    items = [
        tile(
            [
                (picture(run / item["original"], item["caption"]), "original"),
                (
                    picture(run / item["reconstruction"], f"{item['caption']}, redrawn"),
                    f"redrawn, {item['psnr']:.1f} dB",
                ),
            ],
            escape(item["caption"]),
        )
        for item in read_json(run / "image_tokenizer" / "reconstructions.json")
    ]
    return section(
        "Image tokenizer",
        f"Held-out pictures beside what is left of them after {figures_of_it['num_codes']} codes a picture.",
        figures(cards),
        tiles(items, SHOWN, "more pictures"),
    )


def _curves(run: Path) -> str:
    pretrain = read_metrics(run / "pretrain" / "metrics.jsonl")
    tokenizer = read_metrics(run / "image_tokenizer" / "metrics.jsonl")
    names = {"text": "text", "image": "image"}
    curves = [curve(pretrain, f"loss_{key}", name, name) for key, name in names.items()]
    curves += [curve(pretrain, f"eval_loss_{key}", f"{name}, h.o.", name, dashed=True) for key, name in names.items()]
    charts = [
        line_chart("Transformer: nats per token; dashed on held-out pairs", curves),
        line_chart("Image tokenizer: loss", [curve(tokenizer, "loss", "loss", "total")]),
    ]
    return section(
        "Loss curves",
        "The loss of each modality, mean over the tokens of a step. Solid and dashed curves measure different things: "
        "in training both orders occur, with masks, dropout and less weight on a document's first part; held-out "
        "documents are read as stored, text first.",
        f'<div class="charts">{"".join(charts)}</div>',
    )


def curve(metrics: Sequence[Results], key: str, name: str, color: str, dashed: bool = False) -> Curve:
    """A metric over the steps of the lines that have it."""
    lines = [line for line in metrics if line.get(key) is not None]
    return Curve(name, [line["step"] for line in lines], [float(line[key]) for line in lines], color, dashed)


def made_by(summary: Results, stages: Sequence[Results], speed: str) -> str:
    """How a run was made, and from whose pictures.

    Args:
        summary: with `seconds`, `peak_memory_bytes` and `versions`.
        stages: a mapping for each stage.
        speed: a sentence.
    """
    rows = [
        [stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / GIB:.2f}", stage["command"]]
        for stage in stages
    ]
    rows.append(["all", f"{summary['seconds']:.1f}", f"{summary['peak_memory_bytes'] / GIB:.2f}", ""])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    art = "".join(
        f'<p>{escape(name)} by {escape(maker)}, <a href="{escape(link)}">{escape(licence)}</a>, scaled down and, where '
        "shown as redrawn or generated, changed by the model.</p>"
        for name, maker, licence, link in ART
    )
    return section(
        "How it was made",
        "These commands have done the stages, from the project's folder. Their configs are written anew at each start: "
        "to change one, copy it from configs/ to a folder of your own, edit the copy and run mixmodal quickstart "
        f"--recipe FOLDER. {speed}",
        table(["stage", "seconds", "peak memory, GiB", "command"], rows, numbers=(1, 2)),
        f"<p>Versions: {code(versions)}</p>",
        f"<footer><p>The pictures are from these works:</p>{art}</footer>",
    )


def median_of(metrics: Sequence[Results], key: str) -> float:
    """The median of a metric over the lines that have it; nan where none has."""
    values = [float(line[key]) for line in metrics if line.get(key) is not None]
    return statistics.median(values) if values else float("nan")
