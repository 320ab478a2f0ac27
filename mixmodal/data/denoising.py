"""Pictures with their classes or captions, and the noise that is laid over them: the stream that trains denoisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.data.pairs import read_pairs
from mixmodal.data.pictures import Decoded, PictureDataConfig, Reader, RowLoader, decode_each
from mixmodal.data.shards import PictureFile, Sample, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.tokenization.conditions import ClassNames

BY_DRAWS, BY_PLACE = 0, 1
"""What the generator of a picture's noise is seeded by; in training the draws, which are new in every epoch."""


@dataclass(frozen=True, kw_only=True)
class DenoisingDataConfig(PictureDataConfig):
    """Pictures of shards with what a denoiser is told of them: a class, or the caption. Give one of the two.

    Args:
        classes: file with a class on each line: a label, or a label, a tab and a caption. The class of a sample is the
            `label` of its JSON, or its text where that is a label or a caption here.
        text_tokenizer: file of the text tokenizer that captions are spelled with (`mixmodal train-text-tokenizer`).
    """

    classes: Path | None = None
    text_tokenizer: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.classes is None) == (self.text_tokenizer is None):
            raise ValueError(
                "data: give either data.classes, a file with a class on each line, or data.text_tokenizer, a file of "
                "`mixmodal train-text-tokenizer`: a denoiser is told classes or texts"
            )


class DenoisingBatch(NamedTuple):
    """Pictures of one micro-batch and what is laid over them.

    Args:
        pixels: uint8 `(B, 3, H, W)`; `to_images` makes images of them.
        conditions: int64 `(B,)` classes or `(B, T)` tokens.
        draws: float32 `(B, NUM_DRAWS)`, what decides how each picture is augmented.
        times: float64 `(B,)` in [0, 1), share of the noise schedule.
        drops: float64 `(B,)` in [0, 1); the condition of a picture is dropped where this is below a share.
        noise: float32 `(B, 3, H, W)`, standard normal.
        keys: names them in messages.
    """

    pixels: Tensor
    conditions: Tensor
    draws: Tensor
    times: Tensor
    drops: Tensor
    noise: Tensor
    keys: list[str]


def build_reader(classes: ClassNames | None) -> Reader:
    """Reads each picture with its condition: its class by label where there are classes, its caption otherwise."""
    if classes is None:
        return read_pairs

    def read_labelled(
        paths: Sequence[Path], counter: SkipCounter, limits: SampleLimits
    ) -> Iterator[tuple[PictureFile, str]]:
        for sample in read_samples(paths, counter, limits):
            try:
                yield _labelled(sample, classes)
                counter.use()
            except SampleError as error:
                counter.skip(error)

    return read_labelled


def _labelled(sample: Sample, classes: ClassNames) -> tuple[PictureFile, str]:
    if len(sample.pictures) != 1:
        found = f"{len(sample.pictures)} pictures instead of one"
        raise SampleError("no single picture", f"{sample.source}: {found}")
    told = sample.metadata.get("label")
    label = " ".join(sample.texts) if told is None else str(told)
    if not label or label not in classes:
        raise SampleError("no class", f"{sample.source}: {label[:80]!r} is none of the classes")
    return sample.pictures[0], label


def draw_noise(count: int, image_size: int, seeds: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Times, drops and noise of `count` pictures, each a pure function of its own seed; see `DenoisingBatch`."""
    times, drops = (np.empty(count) for _ in range(2))
    noise = np.empty((count, 3, image_size, image_size), dtype=np.float32)
    for row, seed in enumerate(seeds):
        generator = np.random.default_rng(seed)
        times[row], drops[row] = generator.random(2)
        generator.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(times), torch.from_numpy(drops), torch.from_numpy(noise)


class DenoisingLoader(RowLoader[DenoisingBatch]):
    """Micro-batches without end, in an order like that of `PictureLoader`.

    What is laid over a picture follows from the draws of its row, and so from seed, epoch and row alone: it is the same
    for any number of ranks and micro-batches.

    Args:
        config: which shards.
        encode: strings of conditions to what the denoiser is called with.
        read: of `build_reader`.
        spelling: what `encode` depends on, plain data; a run only goes on with the same.
        options: of `RowLoader`.
    """

    def __init__(
        self,
        config: DenoisingDataConfig,
        encode: Callable[[Sequence[str]], Tensor],
        read: Reader,
        spelling: Mapping[str, Any],
        **options: Any,
    ) -> None:
        self.encode, self.spelling = encode, dict(spelling)
        super().__init__(config, read=read, **options)

    def _join(self, pictures: list[Decoded], draws: Tensor) -> DenoisingBatch:
        seeds = [[BY_DRAWS, *row] for row in draws.numpy().view(np.uint32).tolist()]
        return join(pictures, self.encode, draws, *draw_noise(len(pictures), self.image_size, seeds))

    def state_dict(self) -> dict[str, Any]:
        return {**self.spelling, **super().state_dict()}


def join(
    pictures: Sequence[Decoded],
    encode: Callable[[Sequence[str]], Tensor],
    draws: Tensor,
    times: Tensor,
    drops: Tensor,
    noise: Tensor,
) -> DenoisingBatch:
    """A batch of decoded pictures."""
    pixels = torch.stack([picture.pixels for picture in pictures])
    conditions = encode([picture.caption for picture in pictures])
    return DenoisingBatch(pixels, conditions, draws, times, drops, noise, [picture.key for picture in pictures])


def decode_held_out(
    config: DenoisingDataConfig, image_size: int, encode: Callable[[Sequence[str]], Tensor], read: Reader
) -> DenoisingBatch:
    """The first held-out pictures, with times that are spread evenly and noise that is the same in every run.

    Raises:
        ValueError, TooManySkipped: as `decode_each`.
    """
    found = decode_each(config.held_out, image_size, config.limits, "meta", read)
    pictures = list(islice(found, config.max_held_out_pictures))
    count = len(pictures)
    _, drops, noise = draw_noise(count, image_size, [(BY_PLACE, place) for place in range(count)])
    order = np.random.default_rng(0).permutation(count)
    times = torch.from_numpy((order + 0.5) / count)
    return join(pictures, encode, torch.zeros(count, 0), times, drops, noise)
