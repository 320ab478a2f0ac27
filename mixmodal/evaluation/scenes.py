"""Scenes of coloured shapes with questions of attribute, count and relation whose answers are known from the drawing.

One to five things stand in different cells of a grid of three by three. A question never has two answers, and relations
are asked so that yes and no are equally frequent. For a baseline that sees no picture take `training` questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.data.synthetic import COLORS, RELATIONS, SHAPES, Thing, draw_things
from mixmodal.files import write_whole

Kind = Literal["attribute", "count", "relation"]
Split = Literal["training", "held_out"]
KINDS: tuple[Kind, ...] = ("attribute", "count", "relation")
SPLITS: tuple[Split, ...] = ("training", "held_out")
SIDE = 3
MOST_THINGS = 5
Choice = TypeVar("Choice")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Placed(NamedTuple):
    """A thing in its cell; row 0 is the upper one."""

    thing: Thing
    row: int
    column: int


class SceneQuestion(NamedTuple):
    """A picture with a question and its one answer.

    Args:
        key: of the question, unique over splits.
        things: what the picture shows.
        picture: RGB, square.
        kind: of the question.
        question: its text.
        answer: in lower case; numbers as digits; yes or no to relations.
    """

    key: str
    things: tuple[Placed, ...]
    picture: Picture
    kind: Kind
    question: str
    answer: str


def scene_questions(num_questions: int, size: int, seed: int = 0, split: Split = "held_out") -> Iterator[SceneQuestion]:
    """Questions that depend on the arguments only, kinds in turn; the first of a longer run are the same.

    Args:
        num_questions: one picture each.
        size: side of the pictures in pixels.
        seed: not negative.
        split: which of two runs that draw from different streams of random numbers; a scene of a single thing can come
            in both.

    Raises:
        ValueError: for an unknown split or numbers out of range.
    """
    if split not in SPLITS or num_questions < 0 or size < 1 or seed < 0:
        raise ValueError(
            f"scenes: split must be one of {', '.join(SPLITS)}, num_questions and seed 0 or more, size 1 or more; "
            f"given are {split!r}, {num_questions}, {seed} and {size}"
        )
    for index in range(num_questions):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        kind = KINDS[index % len(KINDS)]
        things, question, answer = _ask(kind, rng)
        centers = [((2 * one.column + 1) / (2 * SIDE), (2 * one.row + 1) / (2 * SIDE)) for one in things]
        picture = draw_things([one.thing for one in things], centers, 0.9 / (2 * SIDE), 0.1 / (2 * SIDE), size, rng)
        yield SceneQuestion(f"{split}-{seed}-{index:06d}", things, picture, kind, question, answer)


def write_scenes(
    folder: Path | str, num_training: int = 12000, num_held_out: int = 300, size: int = 64, seed: int = 0
) -> None:
    """Writes questions of both splits as conversations, to tune on the one and evaluate on the other.

    `training.jsonl` and `held_out.jsonl` have a line for each, its kind as `task` and the `objects` in the picture,
    which is a PNG file in the folder `training` or `held_out`. `mixmodal prepare` (kind `conversations`) and the task
    `questions` of `mixmodal evaluate` read them.

    Args:
        folder: made where it is missing.
        num_training: questions to tune on.
        num_held_out: questions to evaluate on.
        size: side of the pictures in pixels.
        seed: not negative.

    Raises:
        ValueError: for numbers out of range.
    """
    folder = Path(folder)
    numbers: dict[Split, int] = {"training": num_training, "held_out": num_held_out}
    for split, number in numbers.items():
        lines: list[str] = []
        (folder / split).mkdir(parents=True, exist_ok=True)
        for place, one in enumerate(scene_questions(number, size, seed, split)):
            name = f"{split}/{place:06d}.png"
            one.picture.save(folder / name)
            messages = [
                {"role": "user", "parts": [{"image": name}, {"text": one.question}]},
                {"role": "assistant", "content": one.answer},
            ]
            objects = sorted({str(placed.thing) for placed in one.things})
            lines.append(json.dumps({"key": one.key, "task": one.kind, "objects": objects, "messages": messages}))
        write_whole(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in lines).encode())


def _ask(kind: Kind, rng: np.random.Generator) -> tuple[tuple[Placed, ...], str, str]:
    """A scene that a question of the kind can be asked of, the question and the answer."""
    while True:
        things = _scene(rng)
        asked = {"attribute": _attribute, "count": _count, "relation": _relation}[kind](things, rng)
        if asked is not None:
            return (things, *asked)


def _scene(rng: np.random.Generator) -> tuple[Placed, ...]:
    cells = rng.choice(SIDE * SIDE, size=int(rng.integers(1, MOST_THINGS + 1)), replace=False)
    return tuple(
        Placed(Thing(_pick(list(COLORS), rng), _pick(SHAPES, rng)), *divmod(int(cell), SIDE)) for cell in cells
    )


def _attribute(things: Sequence[Placed], rng: np.random.Generator) -> tuple[str, str] | None:
    """The color of the only thing of a shape, or the shape of the only thing of a color."""
    shapes, colors = Counter(one.thing.shape for one in things), Counter(one.thing.color for one in things)
    choices = [(f"what color is the {t.shape}?", t.color) for t, _, _ in things if shapes[t.shape] == 1]
    choices += [(f"what shape is the {t.color} thing?", t.shape) for t, _, _ in things if colors[t.color] == 1]
    return _pick(choices, rng) if choices else None


def _count(things: Sequence[Placed], rng: np.random.Generator) -> tuple[str, str]:
    """How many things there are of a shape or a color, which is mostly one of those shown, or in all."""
    one = _pick(things, rng).thing
    word = _pick([_plural(one.shape), f"{one.color} things", "things", _plural(_pick(SHAPES, rng))], rng)
    counts = Counter(f"{placed.thing.color} things" for placed in things)
    counts += Counter(_plural(placed.thing.shape) for placed in things)
    counts["things"] = len(things)
    return f"how many {word} are there?", str(counts[word])


def _relation(things: Sequence[Placed], rng: np.random.Generator) -> tuple[str, str] | None:
    """Whether one thing stands in a relation to another that it has, or its opposite; None where there is no such pair.

    Both are the only ones of their color and shape.
    """
    names = Counter(str(one.thing) for one in things)
    alone = [one for one in things if names[str(one.thing)] == 1]
    if len(alone) < 2:
        return None
    first, second = (alone[int(index)] for index in rng.choice(len(alone), size=2, replace=False))
    true = [relation for relation in RELATIONS if holds(first, relation, second)]
    relation, answer = _pick(true, rng), bool(rng.integers(2))
    relation = relation if answer else OPPOSITES[relation]
    return f"is the {first.thing} {relation} the {second.thing}?", "yes" if answer else "no"


def holds(first: Placed, relation: str, second: Placed) -> bool:
    """Whether `first` stands in the relation to `second`, by columns or by rows alone."""
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _pick(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return choices[int(rng.integers(len(choices)))]
