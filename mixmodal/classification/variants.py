"""One picture as several documents: crops, its mirror image, and codes of perturbed latents.

A classifier takes the mean of log p over them, which smooths what the quantizer makes of invisible differences: of the
codes of a picture most change under noise that nobody sees (arXiv 2510.12060).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.classification.keyed import keyed_generator
from mixmodal.document import Document, Image
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.preprocessing import open_picture

NUM_CROPS = 5


@dataclass(frozen=True, kw_only=True)
class VariantsConfig:
    """In how many ways a picture is tokenized.

    Args:
        crop_share: side of square crops as a share of the short side of the picture, above 0 and at most 1. Below 1
            there are five crops in place of the central square: the middle and the corners of the central square.
        flip: take the mirror image of each crop, too. Captions that tell left from right are not true of it.
        num_samples: perturbed tokenizations of each; each is used in place of the plain one.
        noise: standard deviation of the Gaussian noise on the latents before the quantizer, in their unit; 0.1 in
            arXiv 2510.12060, whose latents have another scale.
        seed: of the noise, with the key of the picture.

    Raises:
        ValueError: for a value out of range, or samples that noise does not tell apart.
    """

    crop_share: float = 1.0
    flip: bool = False
    num_samples: int = 1
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share is {self.crop_share}; it must be above 0 and at most 1")
        if self.num_samples < 1 or self.noise < 0:
            raise ValueError(
                f"num_samples is {self.num_samples} (at least 1) and noise is {self.noise} (at least 0, in latents)"
            )
        if self.seed and not self.noise:
            raise ValueError(f"seed is {self.seed}, but without noise nothing is drawn; give noise, or leave it out")
        if self.num_samples > 1 and not self.noise:
            raise ValueError(f"num_samples is {self.num_samples}, but without noise they are all the same; give noise")

    @property
    def number(self) -> int:
        """Documents of one picture."""
        return (NUM_CROPS if self.crop_share < 1 else 1) * (2 if self.flip else 1) * self.num_samples


def encode_variants(
    codec: Codec, pictures: Sequence[Picture], keys: Sequence[str], config: VariantsConfig
) -> list[list[Document]]:
    """Documents of one image, `config.number` for each picture; they do not depend on what else is encoded.

    Args:
        keys: name the pictures; equal keys have the same noise.

    Raises:
        PictureError: for a picture that can not be used.
    """
    views = (
        (view, key, number)
        for picture, key in zip(pictures, keys, strict=True)
        for number, view in enumerate(_views(open_picture(picture, key), config))
    )
    documents: list[Document] = []
    while batch := list(islice(views, max(1, codec.batch_size // config.num_samples))):
        images = codec.to_images([view for view, _, _ in batch])
        codes = encode_noised(codec, images, [(key, number) for _, key, number in batch], config)
        documents += [Document([Image(one)]) for one in codes]
    return [documents[start : start + config.number] for start in range(0, len(documents), config.number)]


@torch.inference_mode()
def encode_noised(codec: Codec, images: Tensor, names: Sequence[tuple[str, int]], config: VariantsConfig) -> np.ndarray:
    """Codes, int64 `(B * num_samples, h, w)`, of images `(B, 3, H, W)`, the samples of an image side by side."""
    tokenizer = codec.image_tokenizer
    if not config.noise:
        return tokenizer.encode(images).cpu().numpy()
    latents = tokenizer.encode_to_latents(images).float()  # (B, C, h', w')
    noise = torch.stack(
        [
            torch.randn(config.num_samples, *latents.shape[1:], generator=keyed_generator(config.seed, key, number))
            for key, number in names
        ]
    )
    noised = latents[:, None] + config.noise * noise.to(latents.device)
    return tokenizer.quantizer.latents_to_codes(noised.flatten(0, 1)).cpu().numpy()


def _views(picture: Picture, config: VariantsConfig) -> Iterator[Picture]:
    """Crops of an RGB picture, each with its mirror image where that is asked for."""
    for crop in _crops(picture, config.crop_share):
        yield crop
        if config.flip:
            yield ImageOps.mirror(crop)


def _crops(picture: Picture, share: float) -> Iterator[Picture]:
    if share == 1:
        yield picture
        return
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    side = max(1, round(share * short))
    rest = short - side
    for x, y in ((rest // 2, rest // 2), (0, 0), (rest, 0), (0, rest), (rest, rest)):
        yield picture.crop((left + x, top + y, left + x + side, top + y + side))
