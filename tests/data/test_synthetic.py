"""Drawn pictures show what their captions say."""

from __future__ import annotations

import numpy as np
import pytest

from mixmodal.data.synthetic import (
    BACKGROUND,
    COLORS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    draw,
    synthetic_pairs,
)


def where(scene: Scene, thing: Thing, size: int = 32) -> tuple[float, float, int]:
    """Mean x and y, and number, of the pixels that have the thing's colour."""
    pixels = np.asarray(draw(scene, size, np.random.default_rng(0))).astype(int)
    y, x = np.nonzero(np.abs(pixels - COLORS[thing.color]).sum(-1) < 30)
    return float(x.mean()), float(y.mean()), len(x)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_in_the_picture(relation: str) -> None:
    first, second = Thing("red", "triangle"), Thing("blue", "cross")
    scene = Scene(first, relation, second)
    x1, y1, _ = where(scene, first)
    x2, y2, _ = where(scene, second)
    holds = {"left of": x1 + 8 < x2, "right of": x1 > x2 + 8, "above": y1 + 8 < y2, "below": y1 > y2 + 8}
    assert [name for name, true in holds.items() if true] == [relation]
    assert scene.caption == f"a red triangle {relation} a blue cross"


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_has_its_colour_and_stands_on_the_background(color: str, shape: str) -> None:
    scene = Scene(Thing(color, shape))
    assert where(scene, scene.first)[2] > 40
    picture = draw(scene, 32, np.random.default_rng(1))
    assert picture.mode == "RGB"
    assert all(picture.getpixel(corner) == BACKGROUND for corner in ((0, 0), (31, 0), (0, 31), (31, 31)))


def test_shapes_can_be_told_apart() -> None:
    pictures = [
        np.asarray(draw(Scene(Thing("black", shape)), 32, np.random.default_rng(0))).astype(float) for shape in SHAPES
    ]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one - other).mean() > 8  # of 255; measured 12.1


def test_the_corpus_depends_on_its_arguments_only() -> None:
    short, long = list(synthetic_pairs(5, 16, seed=1)), list(synthetic_pairs(8, 16, seed=1))
    assert [(s.key, s.caption, s.picture.tobytes()) for s in short] == [
        (s.key, s.caption, s.picture.tobytes()) for s in long[:5]
    ]
    assert [s.caption for s in long] != [s.caption for s in synthetic_pairs(8, 16, seed=2)]
    assert len({s.key for s in long}) == 8
    assert all(s.picture.size == (16, 16) for s in long)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_scenes_has_two_things(share: float) -> None:
    captions = [sample.caption for sample in synthetic_pairs(100, 4, two_things_share=share)]
    two = sum(any(relation in caption for relation in RELATIONS) for caption in captions)
    assert two / 100 == pytest.approx(share, abs=0.2 if share == 0.5 else 0)  # 4 standard deviations; measured 0.01


def test_captions_name_one_scene_each() -> None:
    for number in (1, 2):
        captions = [scene.caption for scene in all_scenes(number)]
        assert len(set(captions)) == len(captions)
    assert len(all_scenes(1)) == 30
    with pytest.raises(ValueError, match="not 3"):
        all_scenes(3)
