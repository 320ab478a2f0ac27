"""Questions whose answers a judge scores: the higher the better, by a rule that has a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.data.conversations import Message, is_pair, turns_of
from mixmodal.data.converters import read_conversations
from mixmodal.data.shards import Sample, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.document import Coded, Document, EndOfTurn, Part
from mixmodal.pipeline.drawing import parse_sample
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import SamplingOptions
from mixmodal.pipeline.reranking import Rank, rank_by_encoder, rank_by_likelihood, texts_of
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.tokenization.codec import Codec, Content
from mixmodal.tokenization.preprocessing import PictureError

JudgeName = Literal["likelihood", "encoder", "reference"]
Output = Literal["text", "image"]
OTHER_ANSWER = "other answer"
"""What conversations are counted under whose answer is of another modality."""


class Question(NamedTuple):
    """A prompt that ends where the assistant speaks, and its answer as the data have it.

    Args:
        key: names it.
        messages: of the prompt, without the answer.
        parts: of these messages, in order, pictures as codes.
        reference: the answer.
        task: its name, where it has one.
        sample: what it was read from.
    """

    key: str
    messages: tuple[Message, ...]
    parts: tuple[Part, ...]
    reference: Document
    task: str | None
    sample: Sample

    @property
    def prompt(self) -> Document:
        """With an end of turn behind each message."""
        turns = turns_of(self.messages, self.parts)
        return Document([part for turn in turns for part in (*turn.parts, EndOfTurn())])


Judge = Callable[[Sequence[Question], Sequence[Document]], np.ndarray]
"""Scores `(n,)` float64 of answers to questions, higher is better."""


def read_questions(
    path: Path,
    codec: Codec,
    output: Output,
    counter: SkipCounter,
    limits: SampleLimits,
    check: Callable[[Question], None] | None = None,
) -> Iterator[Question]:
    """The conversations of a JSONL file or of shards whose last answer is of texts alone, or one picture alone.

    Args:
        path: a file of the kind `conversations`, or a folder of shards.
        codec: encodes pictures as conversations are prepared: those of prompts padded, answers cropped to their centre.
        output: the modality of the answers that are wanted.
        counter: takes what is bad; those with other answers are altered ones of it, since nothing is wrong with them.
        limits: of samples.
        check: raises a ValueError for a question that can not be asked, which is then counted as `not askable`.

    Raises:
        ValueError: where there is no such file or folder.
    """
    for sample in (read_samples if path.is_dir() else read_conversations)(path, counter, limits):
        try:
            question = _read_question(sample, codec, output, limits)
            if check:
                check(question)
        except PictureError as error:
            counter.skip(SampleError("broken picture", str(error)))
        except SampleError as error:
            if error.reason == OTHER_ANSWER:
                counter.alter(OTHER_ANSWER, str(error))
            else:
                counter.skip(error)
        except ValueError as error:
            counter.skip(SampleError("not askable", f"{sample.source}: {error}"))
        else:
            counter.use()
            yield question


def _read_question(sample: Sample, codec: Codec, output: Output, limits: SampleLimits) -> Question:
    if not sample.messages or is_pair(sample.messages):
        raise SampleError(
            "no conversation", f"{sample.source}: it is no conversation, and has no answer to compare with"
        )
    *prompt, answer = sample.messages
    kinds = ["text" if isinstance(part, str) else "image" for part in sample.parts]
    start = len(kinds) - answer.num_parts
    fits = kinds[start:] == ["image"] if output == "image" else set(kinds[start:]) == {"text"}
    if not fits:
        raise SampleError(OTHER_ANSWER, f"{sample.source}: its answer is no {output} alone")
    contents: list[Content] = [
        part if isinstance(part, str) else codec.fit(part.open(limits.max_pixels), part.name, padded=place < start)
        for place, part in enumerate(sample.parts)
    ]
    whole = [codec.to_document([content]).parts[0] for content in contents]
    messages = tuple(Message(one.role, (False,) * one.num_parts) for one in prompt)
    task = sample.metadata.get("task")
    reference = Document(whole[start:])
    name = task if isinstance(task, str) else None
    return Question(sample.key, messages, tuple(whole[:start]), reference, name, sample)


def draw_answers(
    model: MixedModal,
    questions: Sequence[Question],
    output: Output,
    *,
    num: int,
    seed: int,
    max_new_tokens: int | None,
    options: SamplingOptions,
) -> list[list[Document]]:
    """`num` answers of a model to each question, with the codes that were drawn; they depend on nothing else asked.

    Raises:
        ValueError: for settings that can not act, or a question behind which no answer fits.
    """
    prompts = [list(question.prompt.parts) for question in questions]
    plan = model.plan(prompts, output, num, seed, max_new_tokens, options)
    drawn = model.generator.generate(plan.requests, plan.sampling, plan.guidance)
    found = [parse_sample(model.format, request.prompt, ids) for request, ids in zip(plan.requests, drawn)]
    return [found[start : start + num] for start in range(0, len(found), num)]


def build_judge(name: JudgeName, model: MixedModal, encoder: Path | str | None = None) -> Judge:
    """The judge of a name.

    - `likelihood`: log p(text of the prompt | picture) in nats, as `model` reads it; for pictures.
    - `encoder`: cosine of the vectors of picture and prompt's text, by a CLIP or SigLIP; for pictures.
    - `reference`: nearness to the answer that the data have: of pictures, the root mean square difference of pixels,
      0 .. 255, both as the tokenizer shows them, times -1; of texts 1 less the edit distance as a share of the longer
      one, so that the same text has 1.

    Args:
        name: of the three.
        model: with the tokenizers of the answers; it judges by `likelihood`.
        encoder: folder or hub id, of the judge `encoder` alone.

    Raises:
        ValueError: where the encoder is missing, or can not act.
    """
    if (name == "encoder") != (encoder is not None):
        raise ValueError(
            f"judge {name} {'needs an encoder' if name == 'encoder' else 'takes no encoder'}: a CLIP folder"
        )
    if name == "reference":
        return judge_by_reference(model.codec)
    if encoder is not None:
        return _judge_by(rank_by_encoder(load_encoder(encoder, model.codec.device), model.codec))
    return _judge_by(rank_by_likelihood(SequenceScorer(model.model, model.format, model.batch_size)))


def _judge_by(rank: Rank) -> Judge:
    def judge(questions: Sequence[Question], answers: Sequence[Document]) -> np.ndarray:
        if any(not isinstance(part, Coded) for answer in answers for part in answer.parts):
            raise ValueError("judges likelihood and encoder compare pictures with texts; take reference for texts")
        for question in questions:
            texts_of(question.prompt)
        return np.asarray(rank([(question.prompt, []) for question in questions], answers), np.float64)

    return judge


def judge_by_reference(codec: Codec) -> Judge:
    """See `build_judge`."""

    def judge(questions: Sequence[Question], answers: Sequence[Document]) -> np.ndarray:
        pairs = [
            (codec.from_document(answer), codec.from_document(question.reference))
            for question, answer in zip(questions, answers, strict=True)
        ]
        return np.array([_nearness(own, wanted) for own, wanted in pairs], np.float64)

    return judge


def _nearness(answer: Sequence[Any], reference: Sequence[Any]) -> float:
    if isinstance(reference[-1], str):
        own, wanted = ("".join(map(str, parts)) for parts in (answer, reference))
        from torchmetrics.functional.text import edit_distance

        return 1 - float(edit_distance([own], [wanted])) / max(len(own), len(wanted), 1)
    own, wanted = answer[-1], reference[-1]
    if own.size != wanted.size:
        own = own.resize(wanted.size)
    difference = np.asarray(own, np.float64) - np.asarray(wanted, np.float64)
    return -float(np.sqrt(np.square(difference).mean()))
