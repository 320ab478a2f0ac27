"""The stream of pictures that trains networks: endless, a pure function of the seed, exactly resumable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mixmodal.data.augment import NUM_DRAWS, draw_changes
from mixmodal.data.shards import PictureFile, find_shards, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.data.split import check_split
from mixmodal.tokenization.preprocessing import PictureError, Preprocess, resize_and_crop


@dataclass(frozen=True, kw_only=True)
class PictureDataConfig:
    """Pictures of shards; captions are not used.

    Args:
        train: folders of shards to train on.
        held_out: folders of shards to evaluate on; none means no evaluation.
        max_cached_pictures: up to so many pictures are decoded once and kept in memory, 3 bytes a pixel; more are
            streamed, and shuffled within windows. 0 always streams.
        shuffle_window: pictures that are shuffled together when streamed; they are kept encoded.
        max_held_out_pictures: so many of the held-out pictures, from the first, are evaluated on.
        limits: what a picture may be, and the share of bad ones that fails the job.
    """

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    max_cached_pictures: int = 20_000
    shuffle_window: int = 4096
    max_held_out_pictures: int = 1000
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train is empty; give folders of shards, `mixmodal prepare` writes them")
        for name, least in (("max_cached_pictures", 0), ("shuffle_window", 1), ("max_held_out_pictures", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")


class PictureBatch(NamedTuple):
    """Pictures of one micro-batch.

    Args:
        pixels: uint8 `(B, 3, H, W)`; `to_images` makes images of them.
        draws: float32 `(B, NUM_DRAWS)`, what decides how each is augmented.
        keys: names them in messages.
    """

    pixels: Tensor
    draws: Tensor
    keys: list[str]


class Row(NamedTuple):
    """One place of the stream: the `number`-th picture of an epoch, decoded or still encoded; None is a bad one.

    The caption is empty where captions are not read.
    """

    key: str
    epoch: int
    number: int
    picture: Tensor | PictureFile | None
    caption: str = ""


class Decoded(NamedTuple):
    """Pixels, uint8 `(3, H, W)`, with what names them and, where captions are read, their caption."""

    key: str
    pixels: Tensor
    caption: str = ""


Reader = Callable[[Sequence[Path], SkipCounter, SampleLimits], Iterator[tuple[PictureFile, str]]]
"""Reads shards: encoded pictures with their captions, in the order of the shards."""


class PictureSource(Protocol):
    """Pictures in the order of training, epoch after epoch without end."""

    def rows(self, start: int) -> Iterator[Row]: ...


def to_images(pixels: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to images in [-1, 1], float32; what `preprocessing.to_tensor` gives."""
    return pixels.float() / 127.5 - 1


def read_pictures(paths: Sequence[Path], counter: SkipCounter, limits: SampleLimits) -> Iterator[PictureFile]:
    """Every picture of every sample, still encoded, in the order of the shards; samples count as used when read."""
    for sample in read_samples(paths, counter, limits):
        counter.use()
        yield from sample.pictures


def read_uncaptioned(
    paths: Sequence[Path], counter: SkipCounter, limits: SampleLimits
) -> Iterator[tuple[PictureFile, str]]:
    """`read_pictures` as a `Reader`, without captions."""
    return ((picture, "") for picture in read_pictures(paths, counter, limits))


def decode(
    picture: PictureFile, image_size: int, counter: SkipCounter, limits: SampleLimits, preprocess: Preprocess = "meta"
) -> Tensor | None:
    """Pixels of one picture, uint8 `(3, image_size, image_size)`; a bad one is counted and gives None.

    Raises:
        TooManySkipped: when the counter has had enough.
    """
    try:
        pixels = np.asarray(resize_and_crop(picture.open(limits.max_pixels), image_size, preprocess))  # H W C
    except PictureError as error:
        counter.skip(SampleError("broken picture", str(error)))
        return None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def decode_each(
    paths: Sequence[Path],
    image_size: int,
    limits: SampleLimits,
    preprocess: Preprocess,
    read: Reader = read_uncaptioned,
) -> Iterator[Decoded]:
    """Every good picture, `image_size` pixels wide and high, in the order of the shards.

    Raises:
        ValueError: where there is no good picture.
        TooManySkipped: above the allowed share of bad ones; with few pictures, when the last one was read.
    """
    counter = SkipCounter(limits.max_skipped_share)
    found = False
    for picture, caption in read(paths, counter, limits):
        pixels = decode(picture, image_size, counter, limits, preprocess)
        if pixels is not None:
            found = True
            yield Decoded(picture.name, pixels, caption)
    counter.finish()
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: the shards hold no pictures")


def decode_all(
    paths: Sequence[Path],
    image_size: int,
    limits: SampleLimits,
    max_pictures: int,
    preprocess: Preprocess = "meta",
    read: Reader = read_uncaptioned,
) -> list[Decoded] | None:
    """All good pictures; None where there are more than `max_pictures`.

    Raises:
        ValueError, TooManySkipped: as `decode_each`.
    """
    decoded: list[Decoded] = []
    for picture in decode_each(paths, image_size, limits, preprocess, read):
        if len(decoded) == max_pictures:
            return None
        decoded.append(picture)
    return decoded


def decode_first(
    paths: Sequence[Path], image_size: int, limits: SampleLimits, max_pictures: int, preprocess: Preprocess = "meta"
) -> tuple[list[str], Tensor]:
    """Keys and pixels, uint8 `(N, 3, H, W)`, of the first `max_pictures` good pictures, or of as many as there are.

    Raises:
        ValueError, TooManySkipped: as `decode_each`.
    """
    found = list(islice(decode_each(paths, image_size, limits, preprocess), max_pictures))
    keys = [picture.key for picture in found]
    pixels = torch.empty((len(found), 3, image_size, image_size), dtype=torch.uint8)
    for index in reversed(range(len(found))):  # each goes when it is copied, so that the pictures are not held twice
        pixels[index] = found.pop().pixels
    return keys, pixels


class CachedPictures:
    """Decoded pictures in a new order in every epoch."""

    def __init__(self, pictures: Sequence[Decoded], seed: int) -> None:
        self.pictures, self.seed = pictures, seed

    def rows(self, start: int) -> Iterator[Row]:
        size = len(self.pictures)
        for epoch in count(start // size):
            order = np.random.default_rng((self.seed, epoch)).permutation(size)
            for number in range(start % size if epoch == start // size else 0, size):
                key, pixels, caption = self.pictures[int(order[number])]
                yield Row(key, epoch, number, pixels, caption)


class StreamedPictures:
    """Pictures of shards that stay encoded: shuffled shards, and shuffled pictures within windows.

    To resume, an epoch is read again up to the place, without decoding.
    """

    def __init__(
        self, config: PictureDataConfig, counter: SkipCounter, seed: int, read: Reader = read_uncaptioned
    ) -> None:
        self.shards = find_shards(config.train)
        self.config, self.counter, self.seed, self.read = config, counter, seed, read

    def rows(self, start: int) -> Iterator[Row]:
        place = 0
        for epoch in count():
            found = 0
            for number, (picture, caption) in self._epoch(epoch):
                found += 1
                place += 1
                if place > start:
                    yield Row(picture.name, epoch, number, picture, caption)
            if not found:
                raise ValueError(f"{', '.join(map(str, self.config.train))}: the shards hold no pictures")

    def _epoch(self, epoch: int) -> Iterator[tuple[int, tuple[PictureFile, str]]]:
        rng = np.random.default_rng((self.seed, epoch))
        shards = [self.shards[index] for index in rng.permutation(len(self.shards))]
        pictures = self.read(shards, self.counter, self.config.limits)
        first = 0
        while window := list(islice(pictures, self.config.shuffle_window)):
            for offset, index in enumerate(rng.permutation(len(window))):
                yield first + offset, window[index]
            first += len(window)


B = TypeVar("B")


class RowLoader(ABC, Generic[B]):
    """Micro-batches of pictures without end; what stands in a batch of rows is for subclasses to say.

    Optimizer step s trains on rows s * R .. (s + 1) * R - 1 of one stream, where R is `micro_batch_size *
    grad_accum_steps * world_size`, however they are spread. Where the streamed picture of row i turns out bad when it
    is decoded, the picture of row i + R stands in, or the first good one after it: what comes for a row does not
    depend on batches and ranks, and all ranks take equally many rows. That picture comes once more in its own row.
    """

    def __init__(
        self,
        config: PictureDataConfig,
        image_size: int,
        *,
        preprocess: Preprocess = "meta",
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        read: Reader = read_uncaptioned,
    ) -> None:
        check_split(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        self.config, self.seed, self.read = config, seed, read
        self.image_size = image_size
        self.preprocess: Preprocess = preprocess
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.rows_per_step = micro_batch_size * grad_accum_steps * world_size
        self.counter = SkipCounter(config.limits.max_skipped_share)
        self.source, self.num_pictures = self._open()
        self._place = 0  # rows that all ranks have taken
        self._rows = self.source.rows(0)
        self._ahead: list[Row] = []  # rows that follow `_place`, as far as they have been looked at

    def _open(self) -> tuple[PictureSource, int | None]:
        """The pictures, and how many there are where they are cached."""
        most = self.config.max_cached_pictures
        found = decode_all(self.config.train, self.image_size, self.config.limits, most, self.preprocess, self.read)
        if found:
            return CachedPictures(found, self.seed), len(found)
        return StreamedPictures(self.config, self.counter, self.seed, self.read), None

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        start, size = self.rank * self.micro_batch_size, self.micro_batch_size * self.world_size
        batch = self._build(range(start, start + self.micro_batch_size))
        self._look(size - 1)
        del self._ahead[:size]
        self._place += size
        return batch

    def _build(self, offsets: Sequence[int]) -> B:
        """The rows so far behind `_place`."""
        found = [self._find_good(offset) for offset in offsets]
        rows = [self._look(offset) for offset in offsets]  # a stand-in is changed as the bad one would have been
        draws = np.stack([draw_changes(self.seed, row.epoch, row.number, 1) for row in rows])  # 1: apart from the order
        return self._join(found, torch.from_numpy(draws).view(-1, NUM_DRAWS))

    @abstractmethod
    def _join(self, pictures: list[Decoded], draws: Tensor) -> B:
        """A micro-batch of these pictures."""

    def _find_good(self, offset: int) -> Decoded:
        """The picture of a row, or the first good one from a step later on."""
        for place in chain([offset], count(offset + self.rows_per_step)):
            picture = self._decode(place)
            if picture is not None:
                row = self._look(place)
                return Decoded(row.key, picture, row.caption)
        raise AssertionError("the stream has no end")

    def _decode(self, offset: int) -> Tensor | None:
        """The picture of a row, decoded and counted once."""
        row = self._look(offset)
        if isinstance(row.picture, PictureFile):
            picture = decode(row.picture, self.image_size, self.counter, self.config.limits, self.preprocess)
            row = self._ahead[offset] = row._replace(picture=picture)
        assert not isinstance(row.picture, PictureFile)
        return row.picture

    def _look(self, offset: int) -> Row:
        self._ahead += islice(self._rows, max(0, offset + 1 - len(self._ahead)))
        return self._ahead[offset]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, from which another loader goes on with exactly the batch that is next here."""
        state = {"seed": self.seed, "num_pictures": self.num_pictures, "rows_per_step": self.rows_per_step}
        return {**state, "place": self._place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: where seed, data or the pictures of a step are others.
        """
        for key, own in self.state_dict().items():
            before = state.get(key)  # a setting that a checkpoint is too old to know was not set
            if key != "place" and before != own:
                raise ValueError(
                    f"data {', '.join(map(str, self.config.train))}: {key} is {own}, but the checkpoint was written "
                    f"with {before}; resume with the same data and settings, or start a new run folder"
                )
        self._place = int(state["place"])
        self._rows = self.source.rows(self._place)
        self._ahead = []


class PictureLoader(RowLoader[PictureBatch]):
    """Micro-batches of pictures without captions."""

    def _join(self, pictures: list[Decoded], draws: Tensor) -> PictureBatch:
        pixels = torch.stack([picture.pixels for picture in pictures])
        return PictureBatch(pixels, draws, [picture.key for picture in pictures])
