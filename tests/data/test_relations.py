"""Swapped pairs use the same words, are drawn as they say, and training never shows what the task asks."""

from pathlib import Path

import numpy as np
import pytest

from mixmodal.classification.compositional import read_compositions
from mixmodal.data.relations import KINDS, RelationsConfig, split_combinations, swap, write_relations
from mixmodal.data.shards import read_samples
from mixmodal.data.synthetic import COLORS, Scene, Thing
from mixmodal.tokenization.preprocessing import open_picture


def test_swaps_have_the_same_words_and_other_meanings() -> None:
    scene = Scene(Thing("red", "circle"), "left of", Thing("blue", "square"))
    assert swap(scene, "order").caption == "a blue square left of a red circle"
    assert swap(scene, "colors").caption == "a blue circle left of a red square"
    assert swap(swap(scene, "colors"), "colors") == scene


def test_no_scene_is_on_both_sides_and_swaps_stay_on_theirs() -> None:
    split = split_combinations(0.2, seed=3)
    train, held_out = ({scene for one in part for scene in one.scenes()} for part in split)
    assert len(split.train) + len(split.held_out) == 300
    assert len(split.held_out) == 60
    assert len(train) + len(held_out) == 300 * 8
    assert not train & held_out
    for scene in held_out:
        assert all(swap(scene, kind) in held_out for kind in KINDS)
        assert scene.second is not None
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert Scene(scene.second, opposite[scene.relation or ""], scene.first) in held_out  # the same picture
    assert split_combinations(0.2, seed=3) == split
    assert split_combinations(0.2, seed=4) != split


def test_what_is_written_is_read_back_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_relations(RelationsConfig(out=tmp_path / name, num_train=12, num_held_out=4, num_lines=6, size=24))
    held_out = {scene.caption for one in split_combinations(0.2, 0).held_out for scene in one.scenes()}
    task = read_compositions(tmp_path / "one" / "swaps.jsonl")
    assert [one.kind for one in task] == ["order", "colors"] * 3
    for one in task:
        assert one.is_grid
        assert set(one.captions) <= held_out
        assert sorted(one.captions[0].split()) == sorted(one.captions[1].split())
        other = tmp_path / "two" / one.images[0].relative_to(tmp_path / "one")
        assert one.images[0].read_bytes() == other.read_bytes()
    samples = list(read_samples(tmp_path / "one" / "train"))
    assert len(samples) == 12
    assert not {" ".join(sample.texts) for sample in samples} & held_out
    assert {" ".join(sample.texts) for sample in read_samples(tmp_path / "one" / "heldout")} <= held_out
    with pytest.raises(ValueError, match="has shards already; give another folder"):
        write_relations(RelationsConfig(out=tmp_path / "one"))


def test_pictures_of_the_task_show_their_captions(tmp_path: Path) -> None:
    write_relations(RelationsConfig(out=tmp_path, num_train=1, num_held_out=1, num_lines=20))
    for one in read_compositions(tmp_path / "swaps.jsonl"):
        for path, caption in zip(one.images, one.captions):
            _, color, _, *relation, _, other, _ = caption.split()
            pixels = np.asarray(open_picture(path, caption)).astype(int)
            (y1, x1), (y2, x2) = (
                np.argwhere(np.abs(pixels - COLORS[name]).sum(-1) < 30).mean(axis=0) for name in (color, other)
            )
            holds = {"left": x1 < x2 - 4, "right": x1 > x2 + 4, "above": y1 < y2 - 4, "below": y1 > y2 + 4}
            assert [name for name, true in holds.items() if true] == [relation[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_lines": 0}, "num_lines is 0"), ({"held_out_share": 1.0}, "held_out_share is 1.0")],
)
def test_what_can_not_be_drawn_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelationsConfig(out=Path("x"), **options)
    with pytest.raises(ValueError, match="leaves a side empty"):
        split_combinations(0.001, 0)
