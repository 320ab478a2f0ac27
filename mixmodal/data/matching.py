"""Samples of shards beside the documents that `pretokenize` made of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mixmodal.data.shards import Sample, find_shards, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.data.token_shards import TokenShards
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.tokenization.preprocessing import PictureError

T = TypeVar("T")
REPORT_EVERY_S = 10


class Matched(NamedTuple):
    """A sample and its documents.

    Args:
        number: of the sample among those of the token shards: its variants are the documents from
            `number * num_variants` on.
        sample: pictures are still encoded.
    """

    number: int
    sample: Sample


def read_matched(
    shards: Sequence[Path], tokens: TokenShards, counter: SkipCounter, limits: SampleLimits
) -> Iterator[Matched]:
    """Every sample of the token shards, in their order; samples that `pretokenize` passed by are counted as skipped.

    Args:
        shards: that the token shards were made of, in the same order.
        counter: takes the others; what it allows is judged in the end, too.
        limits: those of `pretokenize`.

    Raises:
        ValueError: where the shards are not those of the token shards, naming the first document without a sample.
        TooManySkipped: above the allowed share.
    """
    sources, entries = find_shards(shards), tokens.manifest["shards"]
    if len(sources) != len(entries):
        raise ValueError(
            f"{tokens.manifest_path} lists {len(entries)} token shards, one for each shard that they were made of, but "
            f"{', '.join(map(str, shards))} hold {len(sources)}; give the same shards, in the same order"
        )
    start = 0
    for source, entry in zip(sources, entries, strict=True):
        stop = start + entry["documents"]
        yield from _read_shard(source, tokens, range(start, stop, tokens.num_variants), counter, limits)
        start = stop
    counter.finish()


def _read_shard(
    source: Path, tokens: TokenShards, documents: range, counter: SkipCounter, limits: SampleLimits
) -> Iterator[Matched]:
    """The samples of one shard; `documents` are the first variants of its documents."""
    passed_by: list[SampleError] = []
    place = 0
    for sample in read_samples(source, counter, limits):
        if place < len(documents) and _is_of(tokens, documents[place], sample):
            yield Matched(documents[place] // tokens.num_variants, sample)
            counter.use()
            place += 1
        else:
            message = f"{sample.source}: {tokens.folder} has no document of it"
            passed_by.append(SampleError("not pretokenized", message))
    if place < len(documents):
        raise ValueError(
            f"{tokens.folder}: the document {tokens.keys[documents[place]]!r} has no sample in {source}, where it "
            "should come next; give the shards that were pretokenized, in the same order, or pretokenize again"
        )
    for error in passed_by:
        counter.skip(error)


def _is_of(tokens: TokenShards, document: int, sample: Sample) -> bool:
    """Whether the documents from this one on are the variants of a sample."""
    last = tokens.num_variants - 1
    return tokens.keys[document] == f"{sample.key}#0" and tokens.keys[document + last] == f"{sample.key}#{last}"


def open_parts(sample: Sample, limits: SampleLimits) -> DocumentParts:
    """Texts and decoded pictures of a sample, as an encoder takes them.

    Raises:
        ValueError: naming the picture, where it is broken or larger than allowed, though it was pretokenized.
    """
    try:
        return DocumentParts(sample.texts, [picture.open(limits.max_pixels) for picture in sample.pictures])
    except PictureError as error:
        raise ValueError(
            f"{error}; there are tokens of it, so give the limits that it was pretokenized with"
        ) from error


def report(items: Iterable[T], total: int) -> Iterator[T]:
    """The items; every ten seconds a line tells how many documents have come."""
    started = last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - last >= REPORT_EVERY_S:
            print(f"{number:,} of {total:,} documents, {number / (now - started):,.0f} a second", flush=True)
            last = now
        yield item
