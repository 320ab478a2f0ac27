"""Any number of prompts through one model: planned as there is room for them, given back as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mixmodal.document import Document
from mixmodal.pipeline.drawing import Plan, Sample, parse_sample, sample_of
from mixmodal.pipeline.options import SamplingOptions, build_guidance, build_sampling
from mixmodal.pipeline.prompts import Before, check_guided, check_output
from mixmodal.pipeline.reranking import Rank, check_best_of, keep_best, texts_of
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.tokenization.codec import Codec, Content

WINDOW_BATCHES = 8
"""Batches that are drawn with continuous filling; behind them the last samples are waited for."""


class Ask(NamedTuple):
    """A prompt and what is wanted of it.

    Args:
        key: names it in what is given back.
        prompt: a text, or texts and pictures in order.
        num: samples.
        seed: equal seeds give equal samples, whatever else is drawn.
        before: whole documents that are read before it; see `MixedModal.generate`.
    """

    key: str
    prompt: str | Sequence[Content]
    num: int = 1
    seed: int = 0
    before: Sequence[Before] | None = None


class Drawn(NamedTuple):
    """A finished sample, by its number, of the prompt `key`."""

    key: str
    number: int
    sample: Sample


class Failed(NamedTuple):
    """The prompt `key` can not be drawn, or not even be read; there are no samples of it."""

    key: str
    error: Exception


class Job(NamedTuple):
    """A request, and what has been drawn for it.

    Args:
        key: of the prompt.
        sample: number of the prompt and of its sample; with `best_of`, several requests are for one.
        place: among these.
        request: to draw.
        document: the prompt.
        read: ids `(T,)` of the whole documents before it.
        ids: pieces `(n,)`, as they come.
    """

    key: str
    sample: tuple[int, int]
    place: int
    request: Request
    document: Document
    read: list[np.ndarray]
    ids: list[np.ndarray]


class Queue:
    """Draws what is asked for, in windows of a few batches of requests, whichever prompts they are of.

    Args:
        generator: draws.
        rank: chooses, where `best_of` is above 1.
        codec: decodes.
        output: of all prompts.
        best_of: requests for a sample.
        options: how tokens are drawn.

    Raises:
        ValueError: for settings that can not act on any prompt.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        rank: Rank,
        codec: Codec,
        output: str,
        best_of: int,
        options: SamplingOptions,
    ) -> None:
        if best_of < 1:
            raise ValueError(f"best_of is {best_of}; it must be at least 1")
        self.generator, self.rank, self.codec, self.output, self.best_of = generator, rank, codec, output, best_of
        check_output(codec.format, output)
        self.sampling = build_sampling(codec.format.vocabulary.modalities, options)
        self.guidance = build_guidance(options)
        check_guided(self.guidance, output)
        check_best_of(codec.format, output, self.sampling, best_of)
        self._candidates: dict[tuple[int, int], dict[int, tuple[Job, Document]]] = {}

    def draw(self, asks: Iterable[Ask | Failed], plan: Callable[[Ask], Plan]) -> Iterator[Drawn | Failed]:
        """Samples as they end, and what has failed.

        Args:
            asks: taken as there is room; what has failed before is passed on.
            plan: `num * best_of` requests of one; a ValueError fails that one alone.
        """
        size, jobs = WINDOW_BATCHES * self.generator.batch_size, []
        for number, ask in enumerate(asks):
            planned = ask if isinstance(ask, Failed) else self._plan(number, ask, plan)
            if isinstance(planned, Failed):
                yield planned
                continue
            for job in planned:
                jobs.append(job)
                if len(jobs) == size:
                    yield from self._draw(jobs)
                    jobs = []
        yield from self._draw(jobs)

    def _plan(self, number: int, ask: Ask, plan: Callable[[Ask], Plan]) -> list[Job] | Failed:
        try:
            if ask.num < 1:
                raise ValueError(f"num is {ask.num}; it must be at least 1")
            found = plan(ask)
            (document,), (read,) = found.documents, found.read
            if self.best_of > 1:
                texts_of(document)
            self.generator.check(found.requests[0])
        except ValueError as error:
            return Failed(ask.key, error)
        places = (divmod(place, self.best_of) for place in range(len(found.requests)))
        return [
            Job(ask.key, (number, sample), place, request, document, read, [])
            for (sample, place), request in zip(places, found.requests)
        ]

    def _draw(self, jobs: Sequence[Job]) -> Iterator[Drawn]:
        """The samples that end with a window's requests; those of one sample may stand in two windows."""
        for pieces in self.generator.rounds([job.request for job in jobs], self.sampling, self.guidance):
            finished = []
            for progress in pieces:
                job = jobs[progress.number]
                job.ids.append(progress.ids)
                if progress.finished:
                    finished.append(job)
            yield from self._finish(finished)

    def _finish(self, jobs: Sequence[Job]) -> Iterator[Drawn]:
        """The samples of which the last candidate has ended.

        Each is decoded alone: how a decoder rounds depends on how many pictures it decodes.
        """
        whole: list[tuple[Job, Document]] = []
        for job in jobs:
            found = self._candidates.setdefault(job.sample, {})
            found[job.place] = job, parse_sample(self.codec.format, job.request.prompt, np.concatenate(job.ids))
            if len(found) == self.best_of:
                whole += [found[place] for place in range(self.best_of)]
                del self._candidates[job.sample]
        documents = [document for _, document in whole]
        if self.best_of > 1 and whole:
            documents = keep_best(self.rank, [(job.document, job.read) for job, _ in whole], documents, self.best_of)
        firsts = [job for job, _ in whole[:: self.best_of]]
        for job, document in zip(firsts, documents, strict=True):
            yield Drawn(job.key, job.sample[1], sample_of(self.codec.from_document(document), self.output))
