"""Questions about generated scenes: true by the drawing, without a giveaway, and the same from the same seed."""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mixmodal.data.converters import read_conversations
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.synthetic import COLORS, Thing
from mixmodal.evaluation.answering import BlindBaseline, answer_accuracy
from mixmodal.evaluation.scenes import KINDS, SIDE, Placed, SceneQuestion, Split, holds, scene_questions, write_scenes

SIZE = 24


@cache
def asked(num: int, split: Split = "held_out") -> tuple[SceneQuestion, ...]:
    return tuple(scene_questions(num, SIZE, split=split))


def answers_of(question: SceneQuestion) -> set[str]:
    """All true answers, found by the words of the question."""
    things, words = question.things, question.question.rstrip("?").split()
    if words[:2] == ["what", "color"]:
        return {t.color for t, _, _ in things if t.shape == words[-1]}
    if words[:2] == ["what", "shape"]:
        return {t.shape for t, _, _ in things if t.color == words[-2]}
    if words[0] == "how":
        name = words[2]
        return {str(sum(name == "things" or name in (t.color, f"{t.shape}s", f"{t.shape}es") for t, _, _ in things))}
    first, second = Thing(*words[2:4]), Thing(*words[-2:])  # "is the C S <relation> the C S"
    relation = " ".join(words[4:-3])
    pairs = [(a, b) for a in things for b in things if (a.thing, b.thing) == (first, second)]
    return {"yes" if holds(a, relation, b) else "no" for a, b in pairs}


def test_each_question_has_one_answer_and_it_is_the_one_given() -> None:
    for question in asked(300):
        assert answers_of(question) == {question.answer}, question


def test_kinds_come_in_turn_and_relations_are_balanced() -> None:
    questions = asked(300)
    assert Counter(one.kind for one in questions) == dict.fromkeys(KINDS, 100)
    said = Counter(one.answer for one in questions if one.kind == "relation")
    assert said["yes"] + said["no"] == 100
    assert 35 <= said["yes"] <= 65  # three standard deviations of a fair coin


def test_the_picture_shows_each_thing_in_its_cell() -> None:
    for question in asked(30):
        pixels = np.asarray(question.picture).astype(int)
        step = SIZE / SIDE
        for thing, row, column in question.things:
            middle = pixels[round((row + 0.5) * step), round((column + 0.5) * step)]
            assert abs(middle - COLORS[thing.color]).max() < 60
        empty = {divmod(cell, SIDE) for cell in range(SIDE * SIDE)} - {one[1:] for one in question.things}
        for row, column in empty:
            assert pixels[round((row + 0.5) * step), round((column + 0.5) * step)].min() > 235


def test_questions_depend_on_seed_split_and_place_alone() -> None:
    first, longer = list(scene_questions(4, SIZE)), asked(300)
    assert [one[:2] + one[3:] for one in first] == [one[:2] + one[3:] for one in longer[:4]]
    assert [one.picture.tobytes() for one in first] == [one.picture.tobytes() for one in longer[:4]]
    others = [*scene_questions(4, SIZE, seed=1), *scene_questions(4, SIZE, split="training")]
    assert not {one.key for one in others} & {one.key for one in first}
    assert [one.things for one in others[:4]] != [one.things for one in first] != [one.things for one in others[4:]]


def test_the_blind_baseline_is_far_from_right() -> None:
    training, held_out = asked(600, "training"), asked(300)
    baseline = BlindBaseline(*zip(*[(one.question, one.answer, one.kind) for one in training], strict=True))
    truths, kinds = [[one.answer] for one in held_out], [one.kind for one in held_out]
    assert answer_accuracy([one.answer for one in held_out], truths, kinds).accuracy == 1
    found = answer_accuracy([baseline.answer(one.question, one.kind) for one in held_out], truths, kinds)
    assert found.accuracy < 0.5
    assert found.by_kind["attribute"][0] < 0.35  # five shapes, six colors
    assert found.by_kind["relation"][0] < 0.65


def test_a_relation_is_by_columns_or_rows() -> None:
    first, second = Placed(Thing("red", "circle"), 0, 1), Placed(Thing("blue", "cross"), 0, 2)
    assert holds(first, "left of", second)
    assert not any(holds(first, relation, second) for relation in ("right of", "above", "below"))


def test_numbers_out_of_range_are_refused() -> None:
    for arguments in ({"split": "test"}, {"size": 0}, {"seed": -1}, {"num_questions": -1}):
        with pytest.raises(ValueError, match="split must be one of training, held_out"):
            next(scene_questions(**{"num_questions": 1, "size": 8, **arguments}))


def test_written_scenes_are_read_as_conversations(tmp_path: Path) -> None:
    write_scenes(tmp_path, num_training=3, num_held_out=6, size=16, seed=1)
    counter = SkipCounter(0.0)
    for split, number in (("training", 3), ("held_out", 6)):
        samples = list(read_conversations(tmp_path / f"{split}.jsonl", counter, SampleLimits()))
        wanted = list(scene_questions(number, 16, 1, split))
        assert len(samples) == number
        for sample, one in zip(samples, wanted, strict=True):
            picture, *texts = sample.parts
            assert texts == [one.question, one.answer]
            assert picture.open(10000).tobytes() == one.picture.tobytes()
            assert [message.role for message in sample.messages] == ["user", "assistant"]
            assert sample.metadata["task"] == one.kind
            assert sample.metadata["objects"] == sorted({str(placed.thing) for placed in one.things})
