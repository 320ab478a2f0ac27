"""Questions about pictures, asked as a tuned model is asked, beside the same questions without the picture."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mixmodal.data.conversations import is_pair, turns_of
from mixmodal.data.converters import read_conversations
from mixmodal.data.shards import PictureFile, Sample, read_samples
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.document import EndOfTurn, Part
from mixmodal.evaluation.answering import BlindBaseline, answer_accuracy, judge_answer
from mixmodal.pipeline.evaluating.asking import AskingOptions, ask_each, show_first
from mixmodal.pipeline.evaluating.task import Findings, Item, Setup, Shown, Task
from mixmodal.tokenization.codec import Content

BLIND = "blind"


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions(AskingOptions):
    """Asks questions about pictures.

    The last message of a sample is the answer; `answers` in its metadata are those of several people, and `kind`, or
    else `task`, is what questions are counted by, too.

    Args:
        data: folders of shards of conversations, or JSONL files of them (kind `conversations` of `mixmodal prepare`).
        training: the same of the training split, for the baseline that sees no picture: the most frequent answer there
            to the same question, or else to the same kind of question; empty for none.
    """

    data: tuple[Path, ...]
    training: tuple[Path, ...] = ()
    max_new_tokens: int = 32


class Questions(Task[QuestionsOptions]):
    """See `QuestionsOptions`."""

    title = "Questions"
    introduction = "Answers to questions about pictures, beside those to the same questions without the picture."
    judged_by = ("training",)

    def read(self, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
        return read_asked(self.options.data, counter, limits)

    def takes(self, sample: Sample) -> bool:
        if not sample.messages or is_pair(sample.messages):
            return False
        *asked, _ = sample.messages
        start = sum(message.num_parts for message in asked)
        asks_of_pictures = any(isinstance(part, PictureFile) for part in sample.parts[:start])
        return asks_of_pictures and all(isinstance(part, str) for part in sample.parts[start:])

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        def prompts(item: Item) -> list[list[Content]]:
            return [prompt_of(item.sample, setup.limits), prompt_of(item.sample, None)]

        def record(item: Item, said: list[str]) -> dict[str, Any]:
            head = {"sample": item.sample.key, "question": question_of(item.sample)}
            kind = kind_of(item.sample)
            head |= {"kind": kind} if kind else {}
            return {**head, "answers": answers_of(item.sample), "answer": said[0], BLIND: said[1]}

        return ask_each(setup, items, self.options, prompts, record)

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        truths, kinds = [entry["answers"] for entry in entries], [entry.get("kind", "") for entry in entries]
        said = {"": [entry["answer"] for entry in entries], "_blind": [entry[BLIND] for entry in entries]}
        digest = None
        if self.options.training:
            baseline, digest = self._train_baseline(setup)
            said["_frequent"] = [baseline.answer(entry["question"], kind) for entry, kind in zip(entries, kinds)]
        found = {ending: answer_accuracy(answers, truths, kinds) for ending, answers in said.items()}
        metrics: dict[str, float | None] = {f"vqa_accuracy{ending}": one.accuracy for ending, one in found.items()}
        for kind in sorted(set(kinds) - {""}):
            metrics |= {f"vqa_accuracy_{kind}{ending}": one.by_kind[kind][0] for ending, one in found.items()}
        return Findings(metrics=metrics, training_sha256=digest, shown=show_first(setup, entries, tell))

    def _train_baseline(self, setup: Setup) -> tuple[BlindBaseline, str]:
        """What is answered most often in training, and a digest of the questions and answers there.

        Raises:
            ValueError: where there is none.
            TooManySkipped: above the allowed share of broken samples.
        """
        counter = SkipCounter(setup.limits.max_skipped_share)
        rows: list[tuple[str, str, str]] = []
        for sample in read_asked(self.options.training, counter, setup.limits):
            counter.use()
            if self.takes(sample):
                rows += [(question_of(sample), answer, kind_of(sample)) for answer in answers_of(sample)]
        counter.finish()
        if not rows:
            raise ValueError(f"training: no question about a picture in {', '.join(map(str, self.options.training))}")
        questions, answers, kinds = zip(*rows, strict=True)
        return BlindBaseline(questions, answers, kinds), hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_asked(paths: Iterable[Path], counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Samples of folders of shards and of JSONL files of conversations."""
    for path in paths:
        yield from (read_conversations if path.suffix == ".jsonl" else read_samples)(path, counter, limits)


def tell(entry: Mapping[str, Any], pictures: dict[str, str]) -> Shown:
    """The question with the model's answer, beside that of people."""
    answers = entry["answers"]
    text, right = f"{entry['question']} {entry['answer']}", judge_answer(entry["answer"], answers) > 0.5
    return Shown(pictures=pictures, text=text, wanted=Counter(answers).most_common(1)[0][0], right=right)


def prompt_of(sample: Sample, limits: SampleLimits | None) -> list[Content]:
    """All messages but the answer, with an end of turn behind each; without limits no picture is opened, or shown.

    Raises:
        PictureError: for a broken picture.
        ValueError: where nothing is left without pictures.
    """
    *asked, _ = sample.messages
    found: list[Content] = []
    for turn in turns_of(asked, cast(Sequence[Part], sample.parts)):
        for part in cast(Sequence[Any], turn.parts):
            if isinstance(part, str):
                found.append(part)
            elif limits is not None:
                found.append(part.open(limits.max_pixels))
        found.append(EndOfTurn())
    if not any(isinstance(part, str) for part in found):
        raise ValueError(f"{sample.source}: the question has no text")
    return found


def question_of(sample: Sample) -> str:
    """The texts of the last message before the answer."""
    *asked, _ = sample.messages
    stop = sum(message.num_parts for message in asked)
    parts = sample.parts[stop - asked[-1].num_parts : stop]
    return " ".join(part for part in parts if isinstance(part, str))


def answers_of(sample: Sample) -> list[str]:
    """What people answered: `answers` of the metadata, else the last message."""
    given = sample.metadata.get("answers")
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        return list(given)
    start = sum(message.num_parts for message in sample.messages[:-1])
    return [" ".join(part for part in sample.parts[start:] if isinstance(part, str))]


def kind_of(sample: Sample) -> str:
    """What the question is counted by; empty where the metadata do not say."""
    found = (sample.metadata.get(name) for name in ("kind", "task"))
    return next((kind for kind in found if isinstance(kind, str)), "")
