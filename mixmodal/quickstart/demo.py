"""The demo pictures as the stages after training need them: all of both splits, with what they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor

from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SampleLimits
from mixmodal.quickstart.scoring import Label
from mixmodal.tokenization.preprocessing import Preprocess, resize_and_crop, to_tensor

LABEL_KEYS = ("concept", "style", "category")


class Demo(NamedTuple):
    """Labels of N pictures and the pictures, float32 `(N, 3, H, W)` in [-1, 1]; training pairs come first."""

    labels: list[Label]
    images: Tensor

    def indices(self, heldout: bool) -> list[int]:
        """Places of one split, in the order of the shards."""
        return [index for index, label in enumerate(self.labels) if label.heldout == heldout]

    def counts(self) -> dict[str, Any]:
        """How many pictures, concepts and held-out pairs there are, and the styles."""
        return {
            "pictures": len(self.labels),
            "concepts": len({label.concept for label in self.labels}),
            "styles": sorted({label.style for label in self.labels}),
            "heldout": len(self.indices(heldout=True)),
        }


def load_demo(train: Path | Sequence[Path], heldout: Path, image_size: int, preprocess: Preprocess = "meta") -> Demo:
    """All demo pictures as the image tokenizer wants them.

    Args:
        train: folder of shards, or several, of what was trained on.
        heldout: of what was not.
        image_size, preprocess: of the image tokenizer.

    Raises:
        ValueError: for a sample without concept, style or category, or with anything but one text and one picture.
    """
    labels: list[Label] = []
    images: list[Tensor] = []
    limits = SampleLimits()
    for folder, is_heldout in ((train, False), (heldout, True)):
        for sample in read_samples(folder):
            missing = [key for key in LABEL_KEYS if not isinstance(sample.metadata.get(key), str)]
            if missing or len(sample.texts) != 1 or len(sample.pictures) != 1:
                raise ValueError(f"{sample.source}: no demo picture, it lacks {missing or 'one text and one picture'}")
            known = {key: sample.metadata[key] for key in LABEL_KEYS}
            labels.append(Label(key=sample.key, caption=sample.texts[0], heldout=is_heldout, **known))
            picture = sample.pictures[0].open(limits.max_pixels)
            images.append(to_tensor(resize_and_crop(picture, image_size, preprocess)))
    return Demo(labels, torch.stack(images))


def choose(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the indices (or all, where there are fewer), drawn once and for all by `seed`, in a fixed order."""
    order = np.random.default_rng(seed).permutation(len(indices))
    return [indices[place] for place in order[:count]]


def save_picture(picture: Picture.Image, run: Path, name: str) -> str:
    """Saves a PNG as `run/name` and returns `name`, which is how results refer to it."""
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")
    return name
