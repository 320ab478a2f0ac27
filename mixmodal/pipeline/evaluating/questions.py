"""Questions about pictures, asked as a tuned model is asked, beside the same questions without the picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mixmodal.data.conversations import is_pair, turns_of
from mixmodal.data.converters import read_conversations
from mixmodal.data.shards import PictureFile, Sample, read_samples
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.document import EndOfTurn, Part
from mixmodal.evaluation.answering import exact_accuracy, vqa_accuracy
from mixmodal.pipeline.evaluating.image_to_text import GREEDY
from mixmodal.pipeline.evaluating.task import (
    SHOWN,
    Findings,
    Item,
    Setup,
    Task,
    TaskOptions,
    mean,
    open_first,
    skipped,
)
from mixmodal.pipeline.evaluating.text_to_image import save
from mixmodal.pipeline.options import sampling_options
from mixmodal.pipeline.queue import Ask, Failed
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content

BLIND = "blind"


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions(TaskOptions):
    """Asks questions about pictures.

    The last message of a sample is the answer; `answers` in its metadata are those of several people, and `kind` is
    what questions are counted by, too.

    Args:
        data: folders of shards of conversations, or JSONL files of them (kind `conversations` of `mixmodal prepare`).
        sampling: how answers are drawn.
        max_new_tokens: after which an answer is cut.
    """

    data: tuple[Path, ...]
    sampling: TokenSampling = GREEDY
    max_new_tokens: int = 32


class Questions(Task[QuestionsOptions]):
    """See `QuestionsOptions`."""

    title = "Questions"
    introduction = "Answers to questions about pictures, beside those to the same questions without the picture."

    def read(self, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
        for path in self.options.data:
            yield from (read_conversations if path.suffix == ".jsonl" else read_samples)(path, counter, limits)

    def takes(self, sample: Sample) -> bool:
        if not sample.messages or is_pair(sample.messages):
            return False
        *asked, _ = sample.messages
        start = sum(message.num_parts for message in asked)
        asks_of_pictures = any(isinstance(part, PictureFile) for part in sample.parts[:start])
        return asks_of_pictures and all(isinstance(part, str) for part in sample.parts[start:])

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        known: dict[str, tuple[Item, dict[str, str]]] = {}

        def asks() -> Iterator[Ask]:
            for item in items:
                try:
                    if item.place < SHOWN:
                        save(setup, setup.load().codec.fit(open_first(item, setup.limits)), item.key)
                    prompts = {"answer": prompt_of(item.sample, setup.limits), BLIND: prompt_of(item.sample, None)}
                except ValueError as error:
                    broken.append((item, skipped(error)))
                    continue
                known[item.key] = item, {}
                for kind, prompt in prompts.items():
                    yield Ask(f"{item.key} {kind}", prompt, seed=setup.seed_of(item))

        broken: list[tuple[Item, dict[str, Any]]] = []
        options: Any = {"max_new_tokens": self.options.max_new_tokens}
        options |= sampling_options({"text": self.options.sampling})
        for one in setup.load().generate_each(asks(), "text", **options):
            key, kind = one.key.split()
            if key not in known:  # the other of the two has failed
                continue
            item, said = known[key]
            if isinstance(one, Failed):
                del known[key]
                yield item, skipped(one.error)
                continue
            said[kind] = str(one.sample).strip()
            if len(said) == 2:
                del known[key]
                head = {"sample": item.sample.key, "question": question_of(item.sample)}
                sort = item.sample.metadata.get("kind")
                head |= {"kind": sort} if isinstance(sort, str) else {}
                yield item, {**head, "answers": answers_of(item.sample), **said}
        yield from broken

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        scores = {kind: [accuracy(entry[kind], entry["answers"]) for entry in entries] for kind in ("answer", BLIND)}
        metrics = {"vqa_accuracy": mean(scores["answer"]), "vqa_accuracy_blind": mean(scores[BLIND])}
        for sort in sorted({entry["kind"] for entry in entries if "kind" in entry}):
            places = [place for place, entry in enumerate(entries) if entry.get("kind") == sort]
            metrics[f"vqa_accuracy_{sort}"] = mean(scores["answer"][place] for place in places)
            metrics[f"vqa_accuracy_{sort}_blind"] = mean(scores[BLIND][place] for place in places)
        shown = [
            {
                "image": f"{entry['key']}.png",
                "text": f"{entry['question']} {entry['answer']} | {entry['answers'][0]}",
                "right": score > 0.5,
            }
            for entry, score in list(zip(entries, scores["answer"]))[:SHOWN]
            if (setup.folder / f"{entry['key']}.png").exists()
        ]
        return Findings(metrics=metrics, shown=shown)


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


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQA accuracy among the answers of several people; of a single answer whether it is the same in normal form."""
    return vqa_accuracy(answer, answers) if len(answers) > 1 else exact_accuracy(answer, answers[0])
