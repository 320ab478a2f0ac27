"""Samples and classes of the demo: what they are compared with, what they count, and that they can be repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.evaluation.concepts import rest_of
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.classes import ClassesConfig, best_class, classify_heldout, summarise
from mixmodal.quickstart.demo import Demo, choose, load_demo
from mixmodal.quickstart.samples import (
    SamplesConfig,
    judge_pictures,
    sample_demo,
    summarise_samples,
)
from mixmodal.tokenization.preprocessing import to_pictures

CONFIG = SamplesConfig(prompts_per_split=2, guidance_scale=2.0, max_caption_tokens=6, batch_size=3)


def test_the_demo_knows_what_was_held_out(demo: Demo) -> None:
    assert demo.counts() == {"pictures": 12, "concepts": 6, "styles": ["flat", "outline"], "heldout": 2}
    assert {demo.labels[index].caption for index in demo.indices(heldout=True)} == {
        "red square, flat style",
        "green square, outline style",
    }
    assert demo.images.shape == (12, 3, 16, 16)
    assert demo.images.min() >= -1


def test_a_sample_that_does_not_say_what_it_shows_is_named(data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    part = PictureFile(picture.read_bytes(), "png", "a")
    write_shards([Sample("a", ("a", part), {"concept": "a", "style": "flat"})], tmp_path / "shards")
    with pytest.raises(ValueError, match=r"00000.tar:a: no demo picture, it lacks \['category'\]"):
        load_demo(tmp_path / "shards", data / "data" / "heldout", 8)


def test_choices_are_fixed_by_the_seed() -> None:
    assert choose(range(100), 5, seed=1) == choose(range(100), 5, seed=1)
    assert choose(range(100), 5, seed=1) != choose(range(100), 5, seed=2)
    assert sorted(choose([3, 5], 9, seed=0)) == [3, 5]


@pytest.fixture
def results(tmp_path: Path, model: MixedModal, demo: Demo) -> dict[str, Any]:
    return sample_demo(tmp_path, model, demo, CONFIG)


def test_half_of_the_prompts_is_held_out_and_every_picture_is_saved(tmp_path: Path, results: dict[str, Any]) -> None:
    for direction in ("text_to_image", "image_to_text"):
        assert [item["label"]["heldout"] for item in results[direction]] == [True, True, False, False]
        assert all((tmp_path / item["image"]).is_file() for item in results[direction])
    assert all((tmp_path / item["nearest"]["image"]).is_file() for item in results["text_to_image"])
    assert results["tokens_per_second"] > 0


def test_samples_can_be_repeated(tmp_path: Path, model: MixedModal, demo: Demo, results: dict[str, Any]) -> None:
    again = sample_demo(tmp_path / "again", model, demo, replace(CONFIG, batch_size=4))
    for direction in ("text_to_image", "image_to_text"):
        assert again[direction] == results[direction]
    assert again["mixed"] == results["mixed"]


def test_the_mixed_document_has_the_parts_asked_for(results: dict[str, Any]) -> None:
    kinds = [key for part in results["mixed"]["parts"] for key in part]
    assert kinds == ["image", "text", "image"][: len(kinds)]
    assert kinds[0] == "image"


def test_demo_pictures_themselves_are_judged_right(tmp_path: Path, model: MixedModal, demo: Demo) -> None:
    chosen = [0, 5, 11]
    items = judge_pictures(tmp_path, model, demo, chosen, to_pictures(demo.images[chosen]), CONFIG)
    assert all(item["concept_right"] and item["style_right"] and item["both_right"] for item in items)
    assert max(item["nearest"]["distance"] for item in items) < 1e-6
    swapped = judge_pictures(tmp_path, model, demo, [0], to_pictures(demo.images[[1]]), CONFIG)[0]
    assert (swapped["concept_right"], swapped["style_right"]) == (
        demo.labels[0].concept == demo.labels[1].concept,
        demo.labels[0].style == demo.labels[1].style,
    )


def test_all_demo_pictures_are_redrawn_for_that_comparison(tmp_path: Path, model: MixedModal, demo: Demo) -> None:
    config = replace(CONFIG, compare_with="redrawn")
    tokenizer = model.codec.image_tokenizer
    drawn = to_pictures(tokenizer.decode(tokenizer.encode(demo.images)))
    items = judge_pictures(tmp_path, model, demo, range(12), drawn, config)
    assert max(item["nearest"]["distance"] for item in items) < 0.01  # rounding to 8 bits
    original = judge_pictures(tmp_path, model, demo, range(12), drawn, CONFIG)
    for item, other in zip(items, original, strict=True):  # both comparisons are kept
        assert item["by_reference"] == other["by_reference"]
        assert all(item[key] == right for key, right in item["by_reference"]["redrawn"].items())
        assert all(other[key] == right for key, right in item["by_reference"]["original"].items())
    assert max(item["nearest"]["distance"] for item in original) > 0.05


def test_the_word_for_a_style_is_not_sought_in_a_concept() -> None:
    assert rest_of("flat iron, outline style", ["flat iron", "iron"]) == ", outline style"
    assert rest_of("nothing known", ["iron"]) == "nothing known"


def test_summary_rates_are_by_split() -> None:
    wrong = dict.fromkeys(("concept_right", "style_right", "both_right"), False)
    items = [
        {
            "label": {"heldout": heldout},
            "concept_right": right,
            "style_right": True,
            "both_right": right,
            "by_reference": {"original": wrong, "redrawn": wrong | {"style_right": right}},
        }
        for heldout, right in ((True, False), (True, True), (False, True))
    ]
    rates = summarise_samples({"text_to_image": items, "image_to_text": items})
    assert rates["text_to_image"]["concept_accuracy_heldout"] == 0.5
    assert rates["image_to_text"]["concept_accuracy_trained"] == 1.0
    assert rates["text_to_image"]["style_accuracy_heldout"] == 1.0
    assert rates["text_to_image_original"]["style_accuracy_heldout"] == 0.0
    assert rates["text_to_image_redrawn"]["style_accuracy_heldout"] == 0.5
    heldout = [item for item in items if item["label"]["heldout"]]
    rates = summarise_samples({"text_to_image": heldout, "image_to_text": heldout})
    assert np.isnan(rates["text_to_image"]["concept_accuracy_trained"])  # nobody failed where nobody tried


def test_every_heldout_picture_is_classified_both_ways(tmp_path: Path, model: MixedModal, demo: Demo) -> None:
    results = classify_heldout(tmp_path, model, demo, ClassesConfig(num_candidates=4, debias=1.0))
    for method in ("image_given_text", "text_given_image"):
        assert results[method]["trials"] == 2
        assert sum(map(sum, results[method]["confusion"]["counts"])) == 2
    assert len(results["examples"]) == 2
    assert all((tmp_path / item["image"]).is_file() for item in results["examples"])


def test_a_tie_does_not_count_for_the_true_caption(model: MixedModal, demo: Demo) -> None:
    (image,) = model.codec.to_documents([to_pictures(demo.images[:1])])
    assert best_class(model, ["red square"] * 3, "image_given_text", 0.0, image) == 2


def test_hits_are_concepts_not_places(demo: Demo) -> None:
    labels = demo.labels
    other = next(label for label in labels if label.concept == labels[0].concept and label.style != labels[0].style)
    assert summarise([labels[0]], [other])["hits"] == 1
    assert summarise([labels[0]], [labels[-1]])["hits"] == 0
