"""Small random changes of pictures: flips, crops, shifts, scales and turns of the hue.

Each picture's change follows from its own random generator, so that it does not depend on the batch it stands in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_DRAWS = 12
"""Uniform numbers that decide one picture's change: flip, whether to move, two shifts, scale, whether to turn, hue,
whether to crop, area, aspect, two places. New ones go to the end, so that the others stay what they are."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far pictures are changed; with the defaults they are left alone.

    Pictures are changed after they have been resized to image_size, so a crop magnifies them, up to
    `1 / sqrt(min_crop_area)` (1.25 with 0.64), and a move resamples them: both are softer than untouched pictures. What
    trains on such pictures to the end learns to draw softly; a share below 1 and an end before the last step
    (`augment_until` of a training config) leave it sharp ones.

    Args:
        flip_share: probability of a left-right flip, 0 .. 1.
        move_share: probability of a shift and a scale, 0 .. 1.
        max_shift: of a shift along each axis, as a share of the side.
        max_scale: of a scale, as a share: 0.1 is between 0.9 and 1.1.
        hue_share: probability of a turn of the hue, 0 .. 1.
        max_hue: of a turn of the hue about the grey axis, degrees; 180 is any.
        crop_share: probability that a random part is cut out and magnified to the whole, 0 .. 1.
        min_crop_area: of the part, as a share of the picture; all areas between it and 1 are equally likely.
        max_crop_aspect: of the part's longer to its shorter side, at least 1; the part never leaves the picture, so
            large parts are nearly square.
    """

    flip_share: float = 0.0
    move_share: float = 0.0
    max_shift: float = 0.0625
    max_scale: float = 0.1
    hue_share: float = 0.0
    max_hue: float = 180.0
    crop_share: float = 0.0
    min_crop_area: float = 0.64
    max_crop_aspect: float = 4 / 3

    def __post_init__(self) -> None:
        for name in ("flip_share", "move_share", "hue_share", "crop_share", "max_shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must lie in 0 .. 1")
        if not 0 <= self.max_scale < 1:
            raise ValueError(f"augment.max_scale is {self.max_scale}; it must be at least 0 and below 1")
        if not 0 <= self.max_hue <= 180:
            raise ValueError(f"augment.max_hue is {self.max_hue}; it must lie in 0 .. 180 degrees")
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"augment.min_crop_area is {self.min_crop_area}; it must be above 0 and at most 1")
        if not 1 <= self.max_crop_aspect < float("inf"):
            raise ValueError(f"augment.max_crop_aspect is {self.max_crop_aspect}; it must be at least 1 and finite")

    @property
    def changes_pictures(self) -> bool:
        """Whether any picture can come out other than it went in."""
        return any((self.flip_share, self.move_share, self.hue_share, self.crop_share))


def draw_changes(*seed: int) -> np.ndarray:
    """What decides one picture's change, float32 `(NUM_DRAWS,)` in [0, 1): a pure function of the numbers `seed`."""
    return np.random.default_rng(seed).random(NUM_DRAWS, dtype=np.float32)


def augment(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Images `(B, 3, H, W)` in [-1, 1], changed as `draws`, float32 `(B, NUM_DRAWS)`, say."""
    if config.flip_share:
        flipped = draws[:, 0] < config.flip_share
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    if config.crop_share:
        images = crop(images, draws[:, 7:12], config)
    if config.move_share:
        images = move(images, draws[:, 1:5], config)
    if config.hue_share:
        turned = (draws[:, 5] < config.hue_share).float()
        images = turn_hue(images, turned * (2 * draws[:, 6] - 1) * math.radians(config.max_hue))
    return images


def move(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Shifts and scales; what comes in from outside repeats the border."""
    moved = (draws[:, 0] < config.move_share).float()
    signed = 2 * draws[:, 1:4] - 1
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + moved * signed[:, 2] * config.max_scale
    theta[:, :, 2] = moved[:, None] * signed[:, :2] * 2 * config.max_shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def crop(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Cuts a part out of a picture and resizes it to the whole, bilinear.

    The part is never larger than the picture, so resizing magnifies and needs no antialiasing.
    """
    cropped = draws[:, 0] < config.crop_share
    area = 1 - draws[:, 1] * (1 - config.min_crop_area)
    # log-uniform as in torchvision's RandomResizedCrop, between the aspects with which this area fits inside
    limit = torch.minimum(-area.log(), area.new_tensor(math.log(config.max_crop_aspect)))
    aspect = ((2 * draws[:, 2] - 1) * limit).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).clamp(max=1.0)  # width, height
    centres = (2 * draws[:, 3:5] - 1) * (1 - sides)  # the picture reaches from -1 to 1
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = sides[:, 0], sides[:, 1]
    theta[:, :, 2] = centres
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    parts = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(cropped[:, None, None, None], parts, images)


def turn_hue(images: Tensor, angles: Tensor) -> Tensor:
    """Turns colours about the grey axis by `angles`, radians `(B,)`; greys stay."""
    cos, sin = angles.cos(), angles.sin()
    grey, left, right = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / math.sqrt(3), (1 - cos) / 3 + sin / math.sqrt(3)
    rows = [torch.stack(row, dim=-1) for row in ((grey, left, right), (right, grey, left), (left, right, grey))]
    turned = torch.einsum("bij,bjhw->bihw", torch.stack(rows, dim=1).to(images.dtype), images)
    return turned.clamp(-1, 1)
