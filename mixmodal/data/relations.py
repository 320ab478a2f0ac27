"""Pictures of two coloured shapes and captions that swap them: training shards, and a task of held-out combinations.

Both captions of a test line have the same words: things change places (`order`), or colours change shapes (`colors`).
Whoever reads captions as bags of words is at chance.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mixmodal.data.shards import INDEX_NAME, PictureFile, Sample, write_shards
from mixmodal.data.synthetic import COLORS, SHAPES, Scene, Thing, draw
from mixmodal.files import write_whole

AXES = (("left of", "right of"), ("above", "below"))
TASK_NAME = "swaps.jsonl"
Kind = Literal["order", "colors"]
KINDS: tuple[Kind, ...] = ("order", "colors")


@dataclass(frozen=True, kw_only=True)
class RelationsConfig:
    """What is drawn.

    Args:
        out: folder: training shards go to `train`, held-out ones to `heldout`, the task to `swaps.jsonl` with its
            pictures beside it.
        num_train: training pictures.
        num_held_out: pictures of held-out combinations, as shards.
        num_lines: lines of the task, half of each kind.
        size: side of the pictures, pixels.
        held_out_share: share of the combinations that training never shows.
        seed: of all.
        shard_size: samples a shard.

    Raises:
        ValueError: for a number below 1, or a share that leaves one side empty.
    """

    out: Path
    num_train: int = 8000
    num_held_out: int = 200
    num_lines: int = 400
    size: int = 32
    held_out_share: float = 0.2
    seed: int = 0
    shard_size: int = 1000

    def __post_init__(self) -> None:
        for name in ("num_train", "num_held_out", "num_lines", "size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"relations: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"relations: held_out_share is {self.held_out_share}; it must lie between 0 and 1")


class Combination(NamedTuple):
    """Two colours, two shapes and an axis: eight scenes that are one another's swaps, so one split has all of them."""

    colors: tuple[str, str]
    shapes: tuple[str, str]
    axis: int

    def scenes(self) -> list[Scene]:
        """Either colour on either shape, in either order, in either wording of the axis."""
        found = []
        for colors in (self.colors, self.colors[::-1]):
            first, second = (Thing(color, shape) for color, shape in zip(colors, self.shapes))
            for relation in AXES[self.axis]:
                found += [Scene(first, relation, second), Scene(second, relation, first)]
        return found


class Split(NamedTuple):
    """Combinations that training shows, and those that it does not."""

    train: list[Combination]
    held_out: list[Combination]


def split_combinations(held_out_share: float, seed: int) -> Split:
    """All combinations, drawn apart.

    Raises:
        ValueError: for a share that leaves one side empty.
    """
    pairs = [
        Combination(colors, shapes, axis)
        for colors in combinations(COLORS, 2)
        for shapes in combinations(SHAPES, 2)
        for axis in range(len(AXES))
    ]
    order = np.random.default_rng([seed, 0]).permutation(len(pairs))
    number = round(held_out_share * len(pairs))
    if not 0 < number < len(pairs):
        raise ValueError(f"relations: held_out_share {held_out_share} of {len(pairs)} combinations leaves a side empty")
    return Split([pairs[place] for place in order[number:]], [pairs[place] for place in order[:number]])


def swap(scene: Scene, kind: Kind) -> Scene:
    """The scene whose caption has the same words: its things, or their colours, have changed places."""
    assert scene.second is not None
    if kind == "order":
        return Scene(scene.second, scene.relation, scene.first)
    first, second = scene.first, scene.second
    return Scene(Thing(second.color, first.shape), scene.relation, Thing(first.color, second.shape))


def draw_samples(found: list[Combination], number: int, size: int, seed: tuple[int, ...]) -> Iterator[Sample]:
    """Captioned pictures of scenes of the combinations, each drawn from seed and place alone."""
    for index in range(number):
        rng = np.random.default_rng([*seed, index])
        scenes = found[int(rng.integers(len(found)))].scenes()
        scene = scenes[int(rng.integers(len(scenes)))]
        key = f"{index:06d}"
        yield Sample(key, (scene.caption, PictureFile(_png(scene, size, rng), "png", f"{key}.png")))


def write_relations(config: RelationsConfig) -> Split:
    """Writes shards and task, and says what is held out.

    Raises:
        ValueError: where the folder has shards already.
    """
    for name in ("train", "heldout"):
        if (config.out / name / INDEX_NAME).exists():
            raise ValueError(f"relations: {config.out / name} has shards already; give another folder")
    split = split_combinations(config.held_out_share, config.seed)
    parts = {"train": (split.train, config.num_train), "heldout": (split.held_out, config.num_held_out)}
    for number, (name, (found, count)) in enumerate(parts.items(), 1):
        samples = draw_samples(found, count, config.size, (config.seed, number))
        write_shards(samples, config.out / name, config.shard_size)
    _write_task(split.held_out, config)
    return split


def _write_task(found: list[Combination], config: RelationsConfig) -> None:
    (config.out / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(config.num_lines):
        kind = KINDS[index % len(KINDS)]
        rng = np.random.default_rng([config.seed, 3, index])
        scenes = found[int(rng.integers(len(found)))].scenes()
        scene = scenes[int(rng.integers(len(scenes)))]
        pair = (scene, swap(scene, kind))
        images = [f"pictures/{index:06d}_{place}.png" for place in range(2)]
        for one, name in zip(pair, images):
            write_whole(config.out / name, _png(one, config.size, rng))
        captions = [one.caption for one in pair]
        lines.append({"key": f"{index:06d}", "kind": kind, "images": images, "captions": captions, "true": [0, 1]})
    write_whole(config.out / TASK_NAME, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _png(scene: Scene, size: int, rng: np.random.Generator) -> bytes:
    data = io.BytesIO()
    draw(scene, size, rng).save(data, "png")
    return data.getvalue()
