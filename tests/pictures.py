"""Pictures for tests: a coloured disc or box on a coloured ground."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mixmodal.data.shards import PictureFile, Sample, write_shards


def draw_shape(seed: int, size: int) -> Image.Image:
    rng = np.random.default_rng((seed, 7))
    ground, ink = (tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(2))
    picture = Image.new("RGB", (size, size), ground)
    left, top = rng.integers(0, size // 2, 2)
    width, height = rng.integers(size // 4, size // 2, 2)
    box = (int(left), int(top), int(left + width), int(top + height))
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=ink)
    return picture


def draw_shapes(count: int, size: int, first: int = 0) -> torch.Tensor:
    """uint8 `(count, 3, size, size)`."""
    pictures = [np.asarray(draw_shape(seed, size)) for seed in range(first, first + count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def write_shape_shards(folder: Path, count: int, size: int, first: int = 0, shard_size: int = 1000) -> None:
    def samples() -> Iterator[Sample]:
        for seed in range(first, first + count):
            data = io.BytesIO()
            draw_shape(seed, size).save(data, "png")
            yield Sample(f"{seed:05d}", ("a shape", PictureFile(data.getvalue(), "png", f"{seed:05d}.png")))

    write_shards(samples(), folder, shard_size)
