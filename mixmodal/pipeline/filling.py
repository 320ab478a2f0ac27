"""Any number of prompts with holes through one model: regions of pictures, and texts that masks stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.document import Grid, Image, Mask
from mixmodal.pipeline.drawing import Plan, Sample
from mixmodal.pipeline.holes import Holes, PartialPicture
from mixmodal.pipeline.infilling import Order, cells_of, fill_region, merge_region
from mixmodal.pipeline.masked_text import MaskedText
from mixmodal.pipeline.options import SamplingOptions, is_guided, refuse_size
from mixmodal.pipeline.queue import Ask, Drawn, Queue, open_parts
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.tokenization.codec import Codec, Content


class Filling(Protocol):
    """A sample: it says what is to be drawn for it, until it has all."""

    def request(self) -> Request:
        """What is to be drawn next."""
        ...

    def take(self, drawn: np.ndarray) -> Sample | None:
        """Reads what was drawn for the last request, ids `(n,)`; gives the whole sample, or None before its last."""
        ...


class FilledRegion:
    """A picture with its region drawn anew, by one request.

    Args:
        codec: decodes.
        image: the known codes `(h, w)`.
        cells: of the region, bool `(h, w)`.
        request: for these; see `fill_region`.
    """

    def __init__(self, codec: Codec, image: Image, cells: np.ndarray, request: Request) -> None:
        self.codec, self.image, self.cells, self._request = codec, image, cells, request

    def request(self) -> Request:
        """The only one."""
        return self._request

    def take(self, drawn: np.ndarray) -> Picture:
        """The picture; it is decoded alone, since how a decoder rounds depends on how many pictures it decodes."""
        merged = merge_region(self.codec.format, self.image, self.cells, self._request, drawn)
        (picture,) = self.codec.decode_images([merged])
        return picture


class FillingJob(NamedTuple):
    """A request of the sample `number` of the prompt `key`."""

    key: str
    number: int
    filling: Filling
    request: Request


class FillingQueue(Queue[FillingJob]):
    """Fills the holes of prompts.

    Args:
        generator: draws.
        codec: encodes and decodes.
        options: how tokens are drawn.
        plan: requests of an ask for a picture, of a grid, behind a prompt.
        order: of the codes of a region.
        max_new_tokens: most tokens of each text of a mask; see `MaskedText`.
        retrieve: documents that `plan` finds for every ask.

    Raises:
        ValueError: for settings that can not act on any prompt.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        codec: Codec,
        options: SamplingOptions,
        plan: Callable[[Ask, Sequence[Content], Grid | None], Plan],
        order: Order,
        max_new_tokens: int | None,
        retrieve: int,
    ) -> None:
        refuse_size(options, "holes, of which a region has its picture's")
        super().__init__(generator, codec, options, follows_text=True)
        self.is_guided = is_guided(options)
        self.order: Order = order
        self._requests, self.max_new_tokens, self.retrieve = plan, max_new_tokens, retrieve

    def plan(self, number: int, ask: Ask) -> list[FillingJob]:
        """The first request of each sample."""
        parts = open_parts(ask)
        reads = bool(self.retrieve or ask.before)
        Holes.of(parts).check(order=self.order, is_guided=self.is_guided, reads=reads)
        last, known = parts[-1], [part for part in parts if not isinstance(part, PartialPicture)]
        fillings = self._regions(ask, known, last) if isinstance(last, PartialPicture) else self._texts(ask, known)
        return [FillingJob(ask.key, sample, one, one.request()) for sample, one in enumerate(fillings)]

    def _regions(self, ask: Ask, before: Sequence[Content], partial: PartialPicture) -> list[FilledRegion]:
        (image,) = self.codec.encode_pictures([partial.picture])
        grid = image.codes.shape
        cells = cells_of(partial.region, partial.picture.size, self.codec.image_tokenizer.config, grid)
        requests = fill_region(self.codec.format, self._requests(ask, before, grid).requests, image, cells, self.order)
        return [FilledRegion(self.codec, image, cells, request) for request in requests]

    def _texts(self, ask: Ask, parts: Sequence[Content]) -> list[MaskedText]:
        document, most = self.codec.to_document(parts), self.codec.format.vocabulary.config.num_sentinels
        if unknown := [part.index for part in document.parts if isinstance(part, Mask) and part.index >= most]:
            raise ValueError(f"there is no mask {unknown[0]}; the model has {most}, from 0 to {most - 1}")
        return [
            MaskedText(self.generator, self.codec, document, ask.seed, sample, self.max_new_tokens)
            for sample in range(ask.num)
        ]

    def finish(self, ended: Sequence[tuple[FillingJob, np.ndarray]]) -> Iterator[Drawn | FillingJob]:
        """The samples that have all of their requests, and the next requests of the others."""
        for job, ids in ended:
            sample = job.filling.take(ids)
            yield job._replace(request=job.filling.request()) if sample is None else Drawn(job.key, job.number, sample)
