"""`mixmodal prefer`: of several answers of a model to each question the best and the worst, as a judge sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.config import check_least, plain
from mixmodal.data.conversations import Message, dump_messages
from mixmodal.data.preferences import CHOSEN, REJECTED, spell_conversation
from mixmodal.data.shards import PictureFile
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.token_shards import build_manifest, write_token_shard
from mixmodal.document import Document, Image, SequenceFormat
from mixmodal.files import append_line, check_new_folder, replacing
from mixmodal.interop.export import IMAGE_TOKENIZER, find_export
from mixmodal.manifests import write_manifest
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.judging import (
    OTHER_ANSWER,
    Judge,
    JudgeName,
    Output,
    Question,
    build_judge,
    draw_answers,
    read_questions,
)
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import DEFAULT_SAMPLING, SamplingOptions, sampling_options
from mixmodal.pipeline.reading import resolve_device
from mixmodal.records import read_json, write_json
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.training.reference import model_digest

REPORT = "report.json"
PREFERENCES = "preferences.jsonl"
WINDOW = 8
"""Batches of answers that are drawn and judged at a time."""


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """Makes pairs of answers for preference tuning by best-of-N.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        prompts: a JSONL file of conversations, or a folder of shards of them. What stands before the last answer is
            asked, and this answer is the reference.
        out: folder for `tokens/`, `preferences.jsonl` with its pictures, and `report.json`.
        output: `image` or `text`; conversations that are answered otherwise are left out, and counted.
        num: answers to each question, at least 2.
        judge: what is best: `likelihood` (of the prompt's text behind the picture, by the model itself), `encoder`
            (cosine of picture and text) or `reference` (nearness to the answer that the data have).
        encoder: folder or hub id of a CLIP or SigLIP, of the judge `encoder` alone.
        min_gap: least difference of the scores of best and worst, in the judge's unit; a smaller one is a tie, and a
            question without one makes no pair.
        seed: equal seeds give equal answers.
        guidance_scale: how closely images follow the text; 1 is none, null is 2 wherever a picture may follow a text.
        image_sampling: how the codes of images are drawn.
        text_sampling: how text is drawn.
        max_new_tokens: most tokens of a text; null is as many as the model's context takes.
        limits: what a sample may be, and the share of bad ones that fails the job.
        batch_size: answers in one forward; they do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    prompts: Path
    out: Path
    output: Output = "image"
    num: int = 4
    judge: JudgeName
    encoder: str | None = None
    min_gap: float = 0.0
    seed: int = 0
    guidance_scale: float | None = None
    image_sampling: TokenSampling = DEFAULT_SAMPLING["image"]
    text_sampling: TokenSampling = DEFAULT_SAMPLING["text"]
    max_new_tokens: int | None = None
    limits: SampleLimits = field(default_factory=SampleLimits)
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ValueError(f"num is {self.num}; a best and a worst take at least 2 answers")
        check_least(self, 1, "batch_size", "max_new_tokens")
        check_least(self, 0, "seed", "min_gap")
        if (self.judge == "encoder") != (self.encoder is not None):
            raise ValueError(f"judge is {self.judge}: encoder, a folder, is given with the judge encoder and no other")
        if self.output == "text" and self.judge != "reference":
            raise ValueError(f"judge {self.judge} compares pictures with texts; for output text take reference")
        if self.output == "text" and self.guidance_scale is not None:
            raise ValueError("guidance_scale acts on pictures alone; leave it out for the output text")
        if self.output == "image" and self.max_new_tokens is not None:
            raise ValueError("max_new_tokens acts on texts alone; leave it out for the output image")
        given = {"image": self.image_sampling, "text": self.text_sampling}
        sampling = given.pop(self.output)
        ((idle, other),) = given.items()
        if other != DEFAULT_SAMPLING[idle]:
            raise ValueError(f"{idle}_sampling can not act on the output {self.output}; leave it out")
        if not sampling.temperature:
            raise ValueError(f"{self.output}_sampling.temperature is 0, with which all answers are the same; raise it")

    def options(self) -> SamplingOptions:
        """How tokens are drawn."""
        chosen = {"image": self.image_sampling, "text": self.text_sampling}
        return {**sampling_options(chosen), "guidance_scale": self.guidance_scale}

    def describe(self) -> dict[str, Any]:
        """What the pairs follow from, as plain data."""
        apart = ("out", "batch_size", "device")
        return {key: value for key, value in plain(self).items() if key not in apart}


class Judged(NamedTuple):
    """Answers to a question with their scores `(n,)`; those without content are left out."""

    question: Question
    answers: list[Document]
    scores: np.ndarray


def prefer(config: PreferConfig) -> dict[str, Any]:
    """Draws, judges and writes; the report, which it prints too.

    A folder that an earlier call of the same settings and weights has finished is left as it is.

    Raises:
        ValueError: for a folder with something else or of other weights, what can not be asked, or where no pair is
            found.
        TooManySkipped: above the allowed share of bad samples.
    """
    path = config.out / REPORT
    folder = find_export(config.model)
    if path.is_file() and (made := read_json(path)).get("settings") == config.describe():
        if made.get("model_sha256") != model_digest(folder):
            raise ValueError(
                f"out: {path} was made with other weights than {config.model} has now; choose another folder"
            )
        print(f"{path}: made before, with the same settings")
        return made
    check_new_folder(config.out, "out")
    device = resolve_device(config.device)
    model = MixedModal.from_pretrained(folder, device, DTYPES[config.dtype], config.batch_size)
    judge = build_judge(config.judge, model, config.encoder)
    counter = SkipCounter(config.limits.max_skipped_share)

    def check(question: Question) -> None:
        asked = [list(question.prompt.parts)]
        plan = model.plan(asked, config.output, 1, config.seed, config.max_new_tokens, config.options())
        model.generator.check(plan.requests[0])
        build_pair(model.codec.format, question, (question.reference, question.reference))

    questions = read_questions(config.prompts, model.codec, config.output, counter, config.limits, check)
    writer = PairWriter(config, model)
    for judged in judge_answers(config, model, judge, questions):
        writer.add(judged)
    counter.finish()
    report = {
        "settings": config.describe(),
        "judge": config.judge,
        "model_sha256": model_digest(folder),
        **writer.finish(),
        "skipped": dict(counter.skipped),
        "examples": counter.examples,
        "left_out": counter.altered[OTHER_ANSWER],
    }
    write_json(path, report)
    means = ", ".join(f"{name} {report[f'mean_{name}']:.4g}" for name in ("best", "any", "worst"))
    print(
        f"{config.out}: {report['pairs']} pairs of {report['questions']} questions ({report['ties']} ties), judged by "
        f"{config.judge}: {means}"
    )
    return report


def judge_answers(
    config: PreferConfig, model: MixedModal, judge: Judge, questions: Iterable[Question]
) -> Iterator[Judged]:
    """Answers to each question, with their scores, in order."""
    stream = iter(questions)
    while window := list(islice(stream, max(1, WINDOW * config.batch_size // config.num))):
        drawn = draw_answers(
            model,
            window,
            config.output,
            num=config.num,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            options=config.options(),
        )
        for question, answers in zip(window, drawn):
            answers = [answer for answer in answers if answer.parts]
            yield Judged(question, answers, judge([question] * len(answers), answers) if answers else np.zeros(0))


def build_pair(
    format: SequenceFormat, question: Question, answers: Sequence[Document]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `(T,)` int64 of a question with a chosen and a rejected answer, and which of them carry loss."""
    ends = tuple(Message("assistant", (True,) * len(answer.parts)) for answer in answers)
    parts = [*question.parts, *(part for answer in answers for part in answer.parts)]
    return spell_conversation(format, (*question.messages, *ends), parts)


class PairWriter:
    """Writes pairs as they are found: as lines with pictures, and as the tokens that were drawn.

    Args:
        config: of the command.
        model: whose answers they are.
    """

    def __init__(self, config: PreferConfig, model: MixedModal) -> None:
        self.config, self.codec = config, model.codec
        assert model.folder
        self.folder = model.folder
        self.questions = self.ties = 0
        self._scores: list[tuple[float, float, float]] = []  # best, mean and worst of each pair
        self._ids: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []
        self._kept_codes = self._num_codes = 0

    def add(self, judged: Judged) -> None:
        """Takes a question; one whose best and worst answers do not differ makes no pair."""
        number = self.questions
        self.questions += 1
        scores = judged.scores
        best, worst = (int(scores.argmax()), int(scores.argmin())) if len(scores) else (0, 0)
        gap = float(scores[best] - scores[worst]) if len(scores) else 0.0
        if gap <= 0 or gap < self.config.min_gap:
            self.ties += 1
            return
        self._scores.append((float(scores[best]), float(scores.mean()), float(scores[worst])))
        question, answers = judged.question, (judged.answers[best], judged.answers[worst])
        ids, loss = build_pair(self.codec.format, question, answers)
        self._ids.append(ids)
        self._losses.append(loss)
        self._write_line(question, f"{number:06d}", answers, (float(scores[best]), float(scores[worst])))

    def _write_line(
        self, question: Question, key: str, answers: Sequence[Document], scores: tuple[float, float]
    ) -> None:
        folder = self.config.out
        folder.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, str]] = []
        for place, part in enumerate(question.sample.parts[: len(question.parts)]):
            if isinstance(part, PictureFile):
                name = f"{key}_{place}.{part.suffix}"
                (folder / name).write_bytes(part.data)
                entries.append({"image": name})
            else:
                entries.append({"text": part})
        prompt = [Message(one.role, (one.role == "assistant",) * one.num_parts) for one in question.messages]
        row: dict[str, Any] = {"key": key, "messages": dump_messages(prompt, entries)}
        for name, answer in zip((CHOSEN, REJECTED), answers):
            row[name] = [self._write_part(content, f"{key}_{name}") for content in self.codec.from_document(answer)]
            self._count_codes(answer)
        task = {"task": question.task} if question.task else {}
        asked = {"question": question.key, "judge": self.config.judge, "scores": list(scores)}
        append_line(folder / PREFERENCES, {**row, **task, **asked})

    def _write_part(self, content: Any, stem: str) -> dict[str, str]:
        if not isinstance(content, Picture):
            return {"text": str(content)}
        with replacing(self.config.out / f"{stem}.png") as part:
            content.save(part, "png")
        return {"image": f"{stem}.png"}

    def _count_codes(self, answer: Document) -> None:
        """How many codes of drawn pictures come back when what they show is encoded again."""
        pictures = [part for part in answer.parts if isinstance(part, Image)]
        again = self.codec.encode_pictures(self.codec.decode_images(pictures)) if pictures else []
        for one, other in zip(pictures, again):
            self._num_codes += one.codes.size
            self._kept_codes += int((one.codes == other.codes).sum()) if one.codes.shape == other.codes.shape else 0

    def finish(self) -> dict[str, Any]:
        """Writes the token shards; what is to be reported.

        Raises:
            ValueError: where there is no pair.
        """
        if not self.questions:
            what = "one picture" if self.config.output == "image" else "text"
            raise ValueError(f"{self.config.prompts}: there is no conversation whose last answer is {what} alone")
        if not self._ids:
            raise ValueError(
                f"{self.config.prompts}: no pair came of {self.questions} questions; raise num or the temperature, or "
                "lower min_gap"
            )
        out, format = self.config.out / "tokens", self.codec.format
        out.mkdir()
        keys = [f"{number}#0" for number in range(len(self._ids))]
        entry = write_token_shard(out, "shard_00000", self._ids, keys, format.vocabulary.size, self._losses)
        counts: dict[str, Any] = {"documents": len(self._ids), "tokens": entry["tokens"], "skipped": {}}
        for modality in format.vocabulary.modalities:
            counts[f"{modality}_tokens"] = sum(
                int(format.vocabulary.contains(modality, ids).sum()) for ids in self._ids
            )
        manifest = build_manifest(
            format,
            [entry],
            text_tokenizer_sha256=self.codec.text_tokenizer.sha256,
            image_tokenizer_sha256=ImageTokenizer.sha256(self.folder / IMAGE_TOKENIZER),
            counts=counts,
            num_pairs=len(self._ids),
        )
        write_manifest(out, manifest)
        best, mean, worst = (float(np.mean(column)) for column in zip(*self._scores))
        return {
            "questions": self.questions,
            "pairs": len(self._ids),
            "ties": self.ties,
            "mean_best": best,
            "mean_any": mean,
            "mean_worst": worst,
            "codes_kept": self._kept_codes / self._num_codes if self._num_codes else None,
        }
