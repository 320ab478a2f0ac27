"""Captioned pictures of coloured shapes: drawn, not downloaded, so that the caption is exactly true.

For tests, the tiny config and evaluation: what a picture shows can be counted, and a caption can be checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image as Pictures
from PIL import ImageDraw
from PIL.Image import Image as Picture

COLORS = {
    "red": (214, 40, 40),
    "green": (56, 142, 60),
    "blue": (33, 97, 201),
    "yellow": (245, 200, 30),
    "purple": (126, 60, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (250, 250, 250)
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two different ones: `first` stands `relation` `second`."""

    first: Thing
    relation: str | None = None
    second: Thing | None = None

    @property
    def caption(self) -> str:
        return f"a {self.first}" if self.second is None else f"a {self.first} {self.relation} a {self.second}"


class CaptionedPicture(NamedTuple):
    """One sample: `key` is unique in its run; the caption is true of the picture, RGB and square."""

    key: str
    picture: Picture
    caption: str


def all_scenes(num_things: int) -> list[Scene]:
    """Every scene of one or two things, always in the same order.

    Raises:
        ValueError: for another number of things.
    """
    things = [Thing(color, shape) for color, shape in product(COLORS, SHAPES)]
    if num_things == 1:
        return [Scene(thing) for thing in things]
    if num_things == 2:
        return [Scene(a, relation, b) for a, relation, b in product(things, RELATIONS, things) if a != b]
    raise ValueError(f"synthetic: a scene has 1 or 2 things, not {num_things}")


def draw(scene: Scene, size: int, rng: np.random.Generator) -> Picture:
    """The scene as a picture of `size` x `size` pixels; `rng` moves and scales the things a little.

    Two things stand on opposite sides of the middle, so that the relation stays true.
    """
    things = [scene.first] if scene.second is None else [scene.first, scene.second]
    room = 0.3 if len(things) == 1 else 0.2
    return draw_things(things, _centers(scene.relation), room, 0.04, size, rng)


def draw_things(
    things: Sequence[Thing],
    centers: Sequence[tuple[float, float]],
    room: float,
    jitter: float,
    size: int,
    rng: np.random.Generator,
) -> Picture:
    """Things at their places, a little moved and scaled by `rng`, as a picture of `size` x `size` pixels.

    Args:
        things: later ones are drawn over earlier ones.
        centers: x and y of each, as shares of the side; y grows downwards.
        room: largest radius, as a share of the side; the smallest is three quarters of it.
        jitter: how far a center moves at most in x and in y, as a share of the side.
        size: side of the picture in pixels.
        rng: of radius and place.
    """
    canvas = Pictures.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), BACKGROUND)
    for thing, (x, y) in zip(things, centers, strict=True):
        radius = room * rng.uniform(0.75, 1.0)
        shift = rng.uniform(-jitter, jitter, size=2)
        center = (np.array([x, y]) + shift) * canvas.width
        _draw_thing(ImageDraw.Draw(canvas), thing, center, radius * canvas.width)
    return canvas.resize((size, size), Pictures.Resampling.LANCZOS)


def synthetic_pairs(
    num_pairs: int, size: int, seed: int = 0, two_things_share: float = 0.5
) -> Iterator[CaptionedPicture]:
    """A corpus that depends on its arguments only; the first pairs of a longer one are the same.

    Args:
        num_pairs: number of samples.
        size: side of the pictures in pixels.
        seed: not negative.
        two_things_share: share of the scenes that show a relation of two things.
    """
    one, two = all_scenes(1), all_scenes(2)
    for index in range(num_pairs):
        rng = np.random.default_rng((seed, index))
        scenes = two if rng.random() < two_things_share else one
        scene = scenes[int(rng.integers(len(scenes)))]
        yield CaptionedPicture(f"{index:06d}", draw(scene, size, rng), scene.caption)


def _centers(relation: str | None) -> tuple[tuple[float, float], ...]:
    """Where the first and the second thing stand, as shares of the side; y grows downwards."""
    near, far = 0.26, 0.74
    return {
        None: ((0.5, 0.5),),
        "left of": ((near, 0.5), (far, 0.5)),
        "right of": ((far, 0.5), (near, 0.5)),
        "above": ((0.5, near), (0.5, far)),
        "below": ((0.5, far), (0.5, near)),
    }[relation]


def _draw_thing(pencil: ImageDraw.ImageDraw, thing: Thing, center: np.ndarray, radius: float) -> None:
    """Draws a thing within the square of half side `radius` pixels round `center`."""
    color = COLORS[thing.color]
    if thing.shape == "circle":
        pencil.ellipse([*(center - radius), *(center + radius)], fill=color)
        return
    arm = 0.35
    outlines = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
        "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
        "cross": [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ],
    }  # fmt: skip
    pencil.polygon([tuple(center + radius * np.array(corner)) for corner in outlines[thing.shape]], fill=color)
