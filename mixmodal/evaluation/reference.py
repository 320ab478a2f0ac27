"""The pictures that scores are taken on: a seeded choice out of shards, and a digest that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixmodal.data.pictures import decode, read_pictures
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.tokenization.preprocessing import Preprocess


class ReferencePictures:
    """Pictures of shards in batches, decoded as they are asked for; all of them, or a choice that the seed makes.

    Args:
        paths: folders of shards.
        image_size: pixels a side.
        limits: what a picture may be, and the share of bad ones that fails the job.
        preprocess: whose rules make images of pictures (see `ImageTokenizerConfig`).
        max_pictures: of more than so many, so many are chosen, each equally likely; bad ones among them are left out.
        seed: of the choice.
        batch_size: pictures of a batch.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: int,
        limits: SampleLimits,
        *,
        preprocess: Preprocess = "meta",
        max_pictures: int,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.paths, self.image_size, self.limits = paths, image_size, limits
        self.preprocess: Preprocess = preprocess
        self.max_pictures, self.seed, self.batch_size = max_pictures, seed, batch_size
        self.digests: list[bytes] = []

    def __iter__(self) -> Iterator[Tensor]:
        """Pixels, uint8 `(B, 3, image_size, image_size)`, in the order of the shards.

        Raises:
            ValueError: where there is no good picture.
            TooManySkipped: above the allowed share of bad ones.
        """
        self.digests = []
        counter = SkipCounter(self.limits.max_skipped_share)
        chosen = self._choice()
        batch: list[Tensor] = []
        for number, picture in enumerate(read_pictures(self.paths, counter, self.limits)):
            if chosen is not None and number not in chosen:
                continue
            pixels = decode(picture, self.image_size, counter, self.limits, self.preprocess)
            if pixels is None:
                continue
            self.digests.append(hashlib.sha256(pixels.numpy().tobytes()).digest())
            batch.append(pixels)
            if len(batch) == self.batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
        counter.finish()
        if not self.digests:
            raise ValueError(f"{', '.join(map(str, self.paths))}: the shards hold no pictures")

    def sha256(self) -> str:
        """Hex digest of the pixels that came out: of the sorted digests of the pictures, whatever their order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()

    def _choice(self) -> set[int] | None:
        """Numbers of the pictures to take, in the order of the shards; None for all."""
        counter = SkipCounter(max_share=1.0)  # judged when the pictures are read again
        count = sum(1 for _ in read_pictures(self.paths, counter, self.limits))
        if count <= self.max_pictures:
            return None
        return set(np.random.default_rng(self.seed).choice(count, self.max_pictures, replace=False).tolist())
