"""The report page: self-contained, escaped, held-out figures first, and honest where nothing was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmodal.quickstart.charts import Curve, heat_table, line_chart
from mixmodal.quickstart.report import median_of, read_metrics, write_report
from mixmodal.quickstart.scoring import split_rate

NASTY = '<script>alert("1")</script> & apple'


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)


def label(concept: str, heldout: bool) -> dict[str, Any]:
    caption = f"{concept}, flat style"
    words = {"concept": concept, "style": "flat", "category": "Food", "caption": caption}
    return {"key": concept, **words, "heldout": heldout}


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the stages leave behind, with two samples of each kind."""
    save_picture(tmp_path / "samples" / "a.png", 0)
    labels = [label(NASTY, True), label("pear", False)]
    samples = {
        "distance": "distance of this test",
        "text_to_image": [
            {
                "prompt": item["caption"],
                "label": item,
                "image": "samples/a.png",
                "nearest": {"label": labels[1], "image": "samples/a.png", "distance": 0.25},
                "concept_right": not item["heldout"],
                "style_right": True,
                "both_right": not item["heldout"],
            }
            for item in labels
        ],
        "image_to_text": [
            {
                "label": item,
                "image": "samples/a.png",
                "caption": NASTY,
                "concept_right": item["heldout"],
                "style_right": True,
            }
            for item in labels
        ],
        "mixed": {"prompt": "pear", "parts": [{"image": "samples/a.png"}, {"text": NASTY}]},
    }
    method = {
        "hits": 1,
        "trials": 2,
        "confusion": {"names": ["Animals", "Food"], "counts": [[1, 0], [1, 0]]},
        "top_confusions": [["dog", NASTY, 1]],
    }
    write_json(tmp_path / "samples" / "results.json", samples)
    examples = [{"image": "samples/a.png", "caption": "pear", "methods": {"log p": {"chosen": NASTY, "right": False}}}]
    results = {"num_candidates": 10, "image_given_text": method, "text_given_image": method, "examples": examples}
    write_json(tmp_path / "classification" / "results.json", results)
    pictures = [{"original": "samples/a.png", "reconstruction": "samples/a.png", "caption": "pear", "psnr": 19.5}]
    write_json(tmp_path / "image_tokenizer" / "reconstructions.json", pictures)
    documents = [
        {"key": "a", "caption": NASTY, "score": 0.9, "image": "samples/a.png", "right": True},
        {"key": "b", "caption": "plum, flat style", "score": 0.8, "image": "samples/a.png", "right": False},
    ]
    found = {"label": labels[0], "image": "samples/a.png", "found": {"text": documents, "image": documents[1:]}}
    rates = {"by_text": {"1": [1, 2], "5": [2, 2]}, "by_image": {"1": [0, 2], "5": [1, 2]}}
    results = {"num_documents": 394, "chance": {"1": 0.0025, "5": 0.0127}, **rates, "items": [found]}
    write_json(tmp_path / "retrieval" / "results.json", results)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(
        '{"step": 1, "loss_text": 3.0, "loss_image": 5.5}\n{"step": 2, "loss_text": 2.0}\n{"step": 3, "lo'
    )
    return tmp_path


RATES = {"concept_accuracy_heldout": 0.41, "style_accuracy_heldout": 0.83, "both_accuracy_heldout": 0.37}
SUMMARY: dict[str, Any] = {
    "text_to_image_original": RATES,
    "text_to_image_redrawn": {**RATES, "style_accuracy_heldout": 0.94},
    "seconds": 480.0,
    "peak_memory_bytes": 3 * 1024**3,
    "counts": {"pictures": 1234, "concepts": 600, "heldout": 60, "styles": ["flat", "outline"]},
    "tokenizer": {
        "psnr_heldout": 19.25,
        "ssim_heldout": 0.81,
        "codebook_usage": 0.95,
        "codebook_usage_heldout": 0.72,
        "codebook_usage_heldout_if_uniform": 0.86,
        "num_codes": 16,
    },
    "classification": {"image_given_text_heldout": 0.4, "text_given_image_heldout": 0.3, "num_candidates": 10},
    "tokens_per_second_train": 12345.0,
    "tokens_per_second_generate": 678.0,
    "versions": {"torch": "2.13.0", "device": "cpu"},
    "commit": "abc123",
}
STAGES = [{"name": "data", "seconds": 3.0, "peak_memory_bytes": 10**9, "command": "mixmodal prepare --config <x>"}]


class Page(HTMLParser):
    """Collects what a page points to, its tags and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def html(run: Path) -> str:
    return write_report(run, SUMMARY, STAGES).read_text()


def test_the_page_needs_no_other_file(html: str) -> None:
    page = Page(html)
    assert page.tags.count("img") == 14
    pictures = [link for link in page.links if not link.startswith("https://creativecommons.org/")]
    assert all(link.startswith("data:image/png;base64,") for link in pictures)
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert not re.findall(r"@import|url\(", html)


def test_texts_of_users_and_models_stay_text(html: str) -> None:
    assert "<script" not in html
    assert NASTY in Page(html).text


def test_heldout_figures_come_first(html: str) -> None:
    text = Page(html).text
    assert text.index("Held-out pairs") < text.index("Training pairs, for comparison") < text.index("Text to image\n")
    assert text.index("0 %text to image: right concept0 of 1") < text.index("100 %text to image: right concept1 of 1")


def test_figures_time_versions_and_attribution_are_on_the_page(html: str) -> None:
    text = Page(html).text
    for wanted in (
        "8.0 minutes",
        "19.25 dB",
        "95 %",
        "12,345 tokens",
        "torch 2.13.0",
        "abc123",
        "Twemoji",
        "CC BY-SA 4.0",
    ):
        assert wanted in text, wanted
    assert "mixmodal prepare --config <x>" in text
    assert "distance of this test" in text
    assert "as they are: 41 % right concept, 83 % right style, 37 % both" in text
    assert "redraws them: 41 % right concept, 94 % right style" in text


def test_figures_say_what_they_count(html: str) -> None:
    text = Page(html).text
    assert "95 %of the codes are usedby all demo pictures" in text
    assert "72 %of the codes are usedby held-out pictures alone; equally likely codes would give 86 %" in text
    assert "of the right style or of the right concept in 1 of 1 cases; in 0 of 1 (0 %) it is right in both" in text
    assert "Solid and dashed curves measure different things" in text


def test_what_is_found_is_shown_and_marked_not_by_colour_alone(html: str) -> None:
    part = html[html.index("What is found") : html.index("<h2>Image tokenizer")]
    assert part.count('<li class="right">') == part.count("&#10003; right") == 1
    assert part.count("<li>") == 2
    text = Page(part).text
    assert "the memory of 394 training documents" in text
    assert "right document first in 50 % (1 of 2) of the cases and among the first five in 100 % (2 of 2)" in text
    assert "by its picture, in 0 % (0 of 2) and 50 % (1 of 2). Chance: 0.2 % and 1.3 %" in text


def test_a_line_of_metrics_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    path = run / "pretrain" / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1"):
        read_metrics(path)


def test_curves_leave_out_what_is_not_finite_and_say_when_nothing_was_logged() -> None:
    chart = line_chart("loss", [Curve("text", [1, 2, 3], [1.0, float("nan"), 3.0], "text")])
    assert "nan" not in chart
    assert len(re.findall(r"points=\"(.*?)\"", chart)[0].split()) == 2
    assert "nothing was logged" in line_chart("loss", [Curve("text", [], [], "text")])


def test_long_curves_are_averaged_not_cut() -> None:
    steps = np.arange(9_600)
    chart = line_chart("loss", [Curve("text", steps.tolist(), (steps % 2).tolist(), "text")])
    points = re.findall(r"points=\"(.*?)\"", chart)[0].split()
    assert len(points) == 240
    heights = [float(point.split(",")[1]) for point in points]
    assert max(heights) - min(heights) < 10  # the mean of 0 and 1 in each bin; each by itself spans 140


def test_a_constant_curve_can_be_drawn() -> None:
    assert "<polyline" in line_chart("loss", [Curve("text", [0], [2.0], "text")])


def test_heat_table_shades_by_share_of_the_row() -> None:
    table = heat_table(["a", "b"], np.array([[3, 1], [0, 0]]), "true", "chosen")
    assert "0.56)" in table  # 0.75 * 3 / 4
    assert ">0<" not in table


def test_split_rates_keep_the_splits_apart() -> None:
    items = [
        {"label": label("a", heldout), "concept_right": right} for heldout, right in ((True, False), (False, True))
    ]
    assert split_rate(items, "concept_right", heldout=True) == (0, 1)
    assert split_rate(items, "concept_right", heldout=False) == (1, 1)


def test_medians_skip_lines_without_the_metric() -> None:
    assert median_of([{"a": 1.0}, {"a": 9.0}, {}, {"a": 2.0}], "a") == 2
    assert np.isnan(median_of([{}], "a"))
