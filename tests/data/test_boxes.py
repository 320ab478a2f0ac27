"""Boxes in pixels of a file come to lie where their objects do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmodal.data.corpora import CorpusConfig, PrepareConfig, prepare
from mixmodal.data.shards import Sample, read_samples
from mixmodal.data.skipping import SampleLimits
from mixmodal.tokenization.preprocessing import place_cropped, place_padded, resize_and_crop, resize_and_pad

WORDINGS = {
    "boxes": [[{"user": "{caption} There are {objects}."}, {"assistant": "{image}"}]],
    "found": [[{"user": "{image} What is where? {caption}"}, {"assistant": "{objects}"}]],
    "told": ["{objects} {caption} {image}"],
    "two": [[{"user": "{image1} {caption} {objects}"}, {"assistant": "{image2}"}]],
}
DOG = {"name": "dog", "box": [40, 10, 70, 20]}
BALL = {"name": "ball", "box": [0, 0, 9, 30]}


@given(
    width=st.integers(8, 400),
    height=st.integers(8, 400),
    target=st.tuples(st.integers(16, 64), st.integers(16, 64)),
    at=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    crop=st.booleans(),
    preprocess=st.sampled_from(["meta", "transformers"]),
)
@settings(max_examples=60, deadline=None)
def test_a_box_lies_where_its_pixels_come_to_lie(
    width: int, height: int, target: tuple[int, int], at: tuple[float, float], crop: bool, preprocess: Any
) -> None:
    left, top = int(at[0] * width), int(at[1] * height)
    box = (left, top, min(width, int((at[0] + 0.3) * width) + 1), min(height, int((at[1] + 0.3) * height) + 1))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2], 0] = 255  # red on black; borders are white
    picture = (resize_and_crop if crop else resize_and_pad)(Image.fromarray(pixels), target, preprocess)
    place = (place_cropped if crop else place_padded)((width, height), target, preprocess)
    moved = place.move(box, target)
    red = np.asarray(picture).astype(int)
    red = (red[..., 0] > 127) & (red[..., 1] < 64)
    if moved is None:
        assert not red.any()
        return
    found = np.zeros(2), np.array(target)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    if len(rows):
        found = np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])
        assert (moved[:2] - found[0]).max() <= 1.01  # what Lanczos blurs; worst of 110,000 seen: 0.8
        assert (found[1] - moved[2:]).max() <= 1.01
        if min(moved[2] - moved[0], moved[3] - moved[1]) >= 3:  # of thinner ones the red is lost; worst seen: 1.0
            assert np.abs(found[0] - moved[:2]).max() <= 1.01
            assert np.abs(found[1] - moved[2:]).max() <= 1.01
    else:
        assert min(moved[2] - moved[0], moved[3] - moved[1]) < 1


Build = Callable[..., tuple[dict[str, Any], list[Sample]]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Prepares records beside wide.png, of 100 x 50 pixels, for squares of 25."""
    Image.new("RGB", (100, 50)).save(tmp_path / "wide.png")
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": WORDINGS}))

    def build(*rows: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[Sample]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"caption": "A dog.", **row}) + "\n" for row in rows))
        given = {"templates": tmp_path / "tasks.yaml", "move_boxes": True, **options}
        config = PrepareConfig(
            corpora=(CorpusConfig(kind="tasks", path=path, **given),),
            out=tmp_path / "out",
            image_size=25,
            limits=SampleLimits(max_skipped_share=1.0),
        )
        return prepare(config)["shards"]["corpora"][0], list(read_samples(config.out / "shards"))

    return build


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("boxes", "(8, 5) -> (23, 10)"),  # half the pixels, without 12 on the left
        ("told", "(8, 5) -> (23, 10)"),
        ("found", "(10, 8) -> (18, 11)"),  # a quarter of the pixels, below 6 of the border
    ],
)
def test_boxes_follow_the_crop_of_answers_and_the_borders_of_prompts(build: Build, task: str, expected: str) -> None:
    _, (sample,) = build({"task": task, "image": "wide.png", "objects": [DOG]})
    assert f"dog at location {expected}" in " ".join(sample.texts)


def test_without_move_boxes_they_stay(build: Build) -> None:
    _, (sample,) = build({"task": "boxes", "image": "wide.png", "objects": [DOG]}, move_boxes=False)
    assert "dog at location (40, 10) -> (70, 20)" in sample.texts[0]


def test_objects_outside_are_dropped_and_counted(build: Build) -> None:
    rows = [{"task": "boxes", "image": "wide.png", "objects": objects} for objects in ([BALL, DOG], [BALL])]
    corpus, (sample,) = build(*rows)
    assert "There are dog at location (8, 5) -> (23, 10)." in sample.texts[0]
    assert corpus["altered"] == {"object outside": 2}
    assert corpus["skipped"] == {"broken box": 1}
    assert any("rows.jsonl:2: nothing of any object is in the square" in one for one in corpus["examples"])


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"task": "boxes", "image": "wide.png", "objects": [{"name": "a", "box": [5, 5, 5, 9]}]}, "broken box", "5, 5"),
        ({"task": "boxes", "image": "wide.png", "objects": "dog"}, "broken box", "is no list"),
        ({"task": "boxes", "image": "gone.png", "objects": [DOG]}, "no picture", "gone.png"),
        ({"task": "boxes", "image": "wide.png"}, "missing field", "objects is missing"),
        (
            {"task": "two", "image1": "wide.png", "image2": "./wide.png", "objects": [DOG]},
            "broken box",
            "boxes of one of 2 pictures can not be moved",
        ),
    ],
)
def test_what_can_not_be_moved_is_named(build: Build, row: dict[str, Any], reason: str, said: str) -> None:
    corpus, _ = build(row, {"task": "boxes", "image": "wide.png", "objects": [DOG]})
    assert corpus["skipped"] == {reason: 1}
    assert said in corpus["examples"][0]


def test_boxes_that_can_not_be_moved_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind jsonl has no boxes, so move_boxes can not act"):
        CorpusConfig(kind="jsonl", path=tmp_path, move_boxes=True)
    corpus = CorpusConfig(kind="tasks", path=tmp_path, templates=tmp_path / "t.yaml", move_boxes=True)
    with pytest.raises(ValueError, match="move_boxes needs image_size"):
        PrepareConfig(corpora=(corpus,), out=tmp_path / "out")
