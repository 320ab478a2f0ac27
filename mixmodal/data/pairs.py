"""Captioned pictures: the stream that trains encoders of text and pictures, and the pairs that they are judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmodal.data.pictures import Decoded, PictureDataConfig, RowLoader, decode_each
from mixmodal.data.shards import PictureFile, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.tokenization.preprocessing import Preprocess


@dataclass(frozen=True, kw_only=True)
class PairDataConfig(PictureDataConfig):
    """Captioned pictures of shards: samples of one text and one picture, in either order.

    Args:
        max_tokenizer_captions: so many of the captions, from the first, teach the text tokenizer.
        caption_until: captions end before the first of these words or signs: `", "` leaves `red apple` of `red apple,
            flat style`. What stands behind it is then nothing that a text or a picture is found by; the text tokenizer
            still learns from it, since texts that are asked by have it. Null takes all.
    """

    max_tokenizer_captions: int = 1_000_000
    caption_until: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokenizer_captions < 1:
            raise ValueError(f"data.max_tokenizer_captions is {self.max_tokenizer_captions}; it must be at least 1")
        if self.caption_until == "":
            raise ValueError("data.caption_until is empty; give what captions end before, or null")

    def cut(self, caption: str) -> str:
        """A caption up to `caption_until`; all of it where nothing would be left."""
        before = caption.partition(self.caption_until)[0] if self.caption_until else ""
        return before.strip() or caption


Encode = Callable[[list[str]], Tensor]
"""Captions to ids, int64 `(B, T)`."""


class PairBatch(NamedTuple):
    """Pairs of one micro-batch.

    Args:
        tokens: ids of the captions, int64 `(B, T)`.
        caption_ids: int64 `(B,)`, the same where the tokens are the same, over all batches and ranks.
        pixels: uint8 `(B, 3, H, W)`; `to_images` makes images of them.
        draws: float32 `(B, NUM_DRAWS)`, what decides how each picture is augmented.
        keys: names them in messages.
    """

    tokens: Tensor
    caption_ids: Tensor
    pixels: Tensor
    draws: Tensor
    keys: list[str]


def read_pairs(paths: Sequence[Path], counter: SkipCounter, limits: SampleLimits) -> Iterator[tuple[PictureFile, str]]:
    """The picture, still encoded, and the caption of every sample; one that is no pair is counted as bad."""
    for sample in read_samples(paths, counter, limits):
        if len(sample.texts) == len(sample.pictures) == 1:
            counter.use()
            yield sample.pictures[0], sample.texts[0]
        else:
            found = f"{len(sample.texts)} texts and {len(sample.pictures)} pictures instead of one of each"
            counter.skip(SampleError("no pair", f"{sample.source}: {found}"))


def read_captions(config: PairDataConfig) -> list[str]:
    """The captions that the text tokenizer learns from, whole ones.

    Raises:
        ValueError: where the training shards hold none.
        TooManySkipped: above the allowed share of bad samples.
    """
    counter = SkipCounter(config.limits.max_skipped_share)
    pairs = read_pairs(config.train, counter, config.limits)
    captions = [caption for _, caption in islice(pairs, config.max_tokenizer_captions)]
    counter.finish()
    if not captions:
        raise ValueError(
            f"data.train {', '.join(map(str, config.train))}: the shards hold no captioned pictures; "
            "`mixmodal prepare` makes them of a folder with captions"
        )
    return captions


def decode_first_pairs(
    paths: Sequence[Path], image_size: int, limits: SampleLimits, max_pairs: int, preprocess: Preprocess
) -> list[Decoded]:
    """The first `max_pairs` good pairs, or as many as there are.

    Raises:
        ValueError, TooManySkipped: as `decode_each`.
    """
    return list(islice(decode_each(paths, image_size, limits, preprocess, read_pairs), max_pairs))


def identify(tokens: Tensor) -> Tensor:
    """A number for each row of ids, int64 `(B,)`; rows that differ have the same one in 1 of 2^63 cases."""
    digests = (hashlib.sha256(row.tobytes()).digest() for row in tokens.numpy())
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.int64)


class PairLoader(RowLoader[PairBatch]):
    """Micro-batches of captioned pictures without end, in an order like that of `PictureLoader`.

    Args:
        config: which shards.
        encode: the text tokenizer.
        spelling: settings of the tokenizer, plain data; a run only goes on with the same ones.
        options: of `RowLoader`.
    """

    def __init__(self, config: PairDataConfig, encode: Encode, spelling: Mapping[str, Any], **options: Any) -> None:
        self.encode, self.cut = encode, config.cut
        self.spelling = {**spelling, "caption_until": config.caption_until}
        super().__init__(config, read=read_pairs, **options)

    def _join(self, pictures: list[Decoded], draws: Tensor) -> PairBatch:
        tokens = self.encode([self.cut(picture.caption) for picture in pictures])
        pixels = torch.stack([picture.pixels for picture in pictures])
        return PairBatch(tokens, identify(tokens), pixels, draws, [picture.key for picture in pictures])

    def state_dict(self) -> dict[str, Any]:
        return {**self.spelling, **super().state_dict()}
