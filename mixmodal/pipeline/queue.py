"""Any number of prompts through one model: planned as there is room for them, given back as they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.document import Document
from mixmodal.pipeline.drawing import Plan, Sample, parse_sample, sample_of
from mixmodal.pipeline.holes import Holes, PartialPicture
from mixmodal.pipeline.options import SamplingOptions, build_guidance, build_sampling
from mixmodal.pipeline.prompts import Before, check_guided, check_output, grid_asked_for
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
        prompt: a text, or texts and pictures in order; for the output `infill` with holes.
        num: samples.
        seed: equal seeds give equal samples, whatever else is drawn.
        before: whole documents that are read before it; see `MixedModal.generate`.
    """

    key: str
    prompt: str | Sequence[Content | PartialPicture]
    num: int = 1
    seed: int = 0
    before: Sequence[Before] | None = None


def open_parts(ask: Ask) -> list[Content | PartialPicture]:
    """The prompt as a list."""
    return [ask.prompt] if isinstance(ask.prompt, (str, Picture)) else list(ask.prompt)


class Drawn(NamedTuple):
    """A finished sample, by its number, of the prompt `key`.

    `document` holds the texts and codes that were drawn, of which `sample` is decoded; None for the output `infill`.
    """

    key: str
    number: int
    sample: Sample
    document: Document | None = None


class Failed(NamedTuple):
    """The prompt `key` can not be drawn, or not even be read; there are no samples of it."""

    key: str
    error: Exception


class Job(Protocol):
    """What a queue draws at a time."""

    @property
    def request(self) -> Request:
        """To draw."""
        ...


JobT = TypeVar("JobT", bound=Job)


class Queue(ABC, Generic[JobT]):
    """Draws what is asked for, in windows of a few batches of requests, whichever prompts they are of.

    Args:
        generator: draws.
        codec: encodes and decodes.
        options: how tokens are drawn.
        follows_text: whether a picture may follow a text, so that there is guidance where none is asked for.

    Raises:
        ValueError: for settings that can not act on any prompt.
    """

    def __init__(
        self, generator: SequenceGenerator, codec: Codec, options: SamplingOptions, *, follows_text: bool
    ) -> None:
        self.generator, self.codec = generator, codec
        self.sampling = build_sampling(codec.format.vocabulary.modalities, options)
        self.guidance = build_guidance(options, follows_text)

    @abstractmethod
    def plan(self, number: int, ask: Ask) -> Sequence[JobT]:
        """The first jobs of an ask, the `number`-th.

        Raises:
            ValueError: where it can not be drawn.
        """

    @abstractmethod
    def finish(self, ended: Sequence[tuple[JobT, np.ndarray]]) -> Iterator[Drawn | JobT]:
        """The samples that end with jobs, each with its new ids `(n,)`; or what is to be drawn for them next."""

    def draw(self, asks: Iterable[Ask | Failed]) -> Iterator[Drawn | Failed]:
        """Samples as they end, and what has failed.

        Args:
            asks: taken as there is room; what has failed before is passed on, and one that can not be planned fails
                alone.
        """
        size, jobs = WINDOW_BATCHES * self.generator.batch_size, []
        for number, ask in enumerate(asks):
            planned = ask if isinstance(ask, Failed) else self._plan(number, ask)
            if isinstance(planned, Failed):
                yield planned
                continue
            for job in planned:
                jobs.append(job)
                while len(jobs) == size:
                    jobs = yield from self._draw(jobs)
        while jobs:
            jobs = yield from self._draw(jobs)

    def _plan(self, number: int, ask: Ask) -> Sequence[JobT] | Failed:
        try:
            if ask.num < 1:
                raise ValueError(f"num is {ask.num}; it must be at least 1")
            jobs = self.plan(number, ask)
            self.generator.check(jobs[0].request)
        except ValueError as error:
            return Failed(ask.key, error)
        return jobs

    def _draw(self, jobs: Sequence[JobT]) -> Generator[Drawn, None, list[JobT]]:
        """The samples that end with a window's requests; gives the jobs that follow from them."""
        drawn: list[list[np.ndarray]] = [[] for _ in jobs]
        following: list[JobT] = []
        for pieces in self.generator.rounds([job.request for job in jobs], self.sampling, self.guidance):
            ended = []
            for progress in pieces:
                drawn[progress.number].append(progress.ids)
                if progress.finished:
                    ended.append((jobs[progress.number], np.concatenate(drawn[progress.number])))
            for one in self.finish(ended):
                if isinstance(one, Drawn):
                    yield one
                else:
                    following.append(one)
        return following


class Candidate(NamedTuple):
    """One of the `best_of` drafts of a sample.

    Args:
        key: of the prompt.
        sample: number of the prompt and of its sample.
        place: among the drafts.
        request: to draw.
        document: the prompt.
        read: ids `(T,)` of the whole documents before it.
    """

    key: str
    sample: tuple[int, int]
    place: int
    request: Request
    document: Document
    read: list[np.ndarray]


class SampleQueue(Queue[Candidate]):
    """Draws what follows prompts.

    Args:
        generator: draws.
        codec: decodes.
        options: how tokens are drawn.
        plan: `num * best_of` requests of an ask with this prompt.
        output: of all prompts.
        best_of: requests for a sample.
        rank: chooses, where `best_of` is above 1.

    Raises:
        ValueError: for settings that can not act on any prompt.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        codec: Codec,
        options: SamplingOptions,
        plan: Callable[[Ask, Sequence[Content]], Plan],
        output: str,
        best_of: int,
        rank: Rank,
    ) -> None:
        if best_of < 1:
            raise ValueError(f"best_of is {best_of}; it must be at least 1")
        check_output(codec.format, output)
        super().__init__(generator, codec, options, follows_text=output != "text")
        check_guided(self.guidance, output)
        grid_asked_for(codec, output, options)
        check_best_of(codec.format, output, self.sampling, best_of)
        self.rank, self.output, self.best_of, self._requests = rank, output, best_of, plan
        self._found: dict[tuple[int, int], dict[int, tuple[Candidate, Document]]] = {}

    def plan(self, number: int, ask: Ask) -> list[Candidate]:
        """All drafts of all samples."""
        parts = open_parts(ask)
        whole = [part for part in parts if not isinstance(part, PartialPicture)]
        if len(whole) < len(parts):
            Holes.of(parts).check_none(self.output)
        found = self._requests(ask, whole)
        (document,), (read,) = found.documents, found.read
        if self.best_of > 1:
            texts_of(document)
        places = (divmod(place, self.best_of) for place in range(len(found.requests)))
        return [
            Candidate(ask.key, (number, sample), place, request, document, read)
            for (sample, place), request in zip(places, found.requests)
        ]

    def finish(self, ended: Sequence[tuple[Candidate, np.ndarray]]) -> Iterator[Drawn]:
        """The samples of which the last draft has ended; those of one sample may stand in two windows.

        Each is decoded alone: how a decoder rounds depends on how many pictures it decodes.
        """
        whole: list[tuple[Candidate, Document]] = []
        for draft, ids in ended:
            found = self._found.setdefault(draft.sample, {})
            found[draft.place] = draft, parse_sample(self.codec.format, draft.request.prompt, ids)
            if len(found) == self.best_of:
                whole += [found[place] for place in range(self.best_of)]
                del self._found[draft.sample]
        documents = [document for _, document in whole]
        if self.best_of > 1 and whole:
            asked = [(draft.document, draft.read) for draft, _ in whole]
            documents = keep_best(self.rank, asked, documents, self.best_of)
        firsts = [draft for draft, _ in whole[:: self.best_of]]
        for draft, document in zip(firsts, documents, strict=True):
            sample = sample_of(self.codec.from_document(document), self.output)
            yield Drawn(draft.key, draft.sample[1], sample, document)
