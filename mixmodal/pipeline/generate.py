"""The generate command: samples of prompts as PNG files and text, listed in `results.json` and `results.jsonl`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mixmodal.config import one_line
from mixmodal.pipeline.generate_config import GenerateConfig
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.prompt_files import NamedPrompt, read_prompts
from mixmodal.pipeline.prompt_parts import PromptPart
from mixmodal.pipeline.queue import Ask, Drawn, Failed
from mixmodal.pipeline.results import (
    RESULTS,
    SHEET,
    SHEET_PICTURES,
    ResultLines,
    check_results,
    files_of,
    write_documents,
    write_sample,
    write_sheet,
)
from mixmodal.records import Shard, read_json, write_json
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.sampling.grammar import INFILL

__all__ = ["GenerateConfig", "PromptPart", "generate"]


def generate(config: GenerateConfig) -> None:
    """Draws the samples, writes them and says where.

    Raises:
        ValueError: for a part that is neither text nor picture, a line of a file that is no prompt, a folder with
            samples of other settings, or what `MixedModal.generate` raises; for prompts of a file that can not be drawn
            when all others are, but not under a launcher of several processes.
    """
    if config.prompts is not None:
        generate_file(config, config.prompts)
    elif config.parts:
        generate_one(config)
    else:
        raise ValueError("there is no prompt; give --prompt TEXT, --image FILE or --parts, or --prompts FILE.jsonl")


def generate_one(config: GenerateConfig) -> None:
    """The samples of one prompt, and `results.json`."""
    prompt = NamedPrompt(parts=tuple(config.parts), num=config.num, seed=config.seed)
    config.check_prompt(prompt)
    prompt.open()  # a broken picture is told before the model is loaded
    path = config.out / f"{RESULTS}.json"
    if path.exists() and "prompts" in read_json(path):
        raise ValueError(f"{path} lists the samples of many prompts; give another folder as out")
    with Drawing(config, config.load(), config.num) as drawing:
        (found,) = drawing.draw([prompt])
    if found.error is not None:
        raise found.error
    write_json(path, {**config.describe_prompt(prompt), **found.listed})
    if config.contact_sheet:
        names = files_of(found.listed["samples"], "image")
        write_sheet(config.out / f"{SHEET}.png", [(config.out / name, prompt.caption) for name in names])
    print(f"{drawing.summary()}, listed in {path}")


def generate_file(config: GenerateConfig, path: Path) -> None:
    """The samples of prompts that no earlier call has drawn, with a line for each prompt, and `results.json`."""
    shard = Shard.choose(config.shard)
    read = partial(read_prompts, path, config.num, config.seed, shard, config.check_prompt)
    settings = json.loads(json.dumps(config.describe_call()))
    check_results(config.out, settings)
    lines = ResultLines(config.out / shard.name(RESULTS, "jsonl"))
    counts, missing = {"prompts": 0, "finished": 0, "failed": 0, "samples": 0}, 0
    for prompt in read():
        samples = lines.samples(prompt)
        counts["prompts"] += 1
        counts["finished"] += samples is not None
        counts["samples"] += len(samples or ())
        missing += 0 if samples is not None else prompt.num
    results = config.out / shard.name(RESULTS, "json")
    of_the_shard = {"shard": f"{shard.index}/{shard.count}", "counts": counts, "results": lines.path.name}
    write_json(results, {**settings, **of_the_shard})
    reason, summary = "", f"all {counts['samples']} samples had been drawn before"
    if missing:
        with Drawing(config, config.load(), missing) as drawing:
            for one in drawing.draw(prompt for prompt in read() if lines.samples(prompt) is None):
                lines.append(one.line())
                counts["failed"] += one.error is not None
                counts["finished"] += one.error is None
                counts["samples"] += len(one.listed.get("samples", ()))
                reason = reason or one.reason
        summary = drawing.summary()
    write_json(results, {**settings, **of_the_shard})
    if config.contact_sheet and config.output != "text":
        write_sheet(config.out / shard.name(SHEET, "png"), list(islice(pictures_of(read(), lines), SHEET_PICTURES)))
    print(f"{summary}, listed in {lines.path}")
    if counts["failed"]:
        message = f"{counts['failed']} of {counts['prompts']} prompts failed, see {lines.path}; the first: {reason}"
        if config.shard is None and shard.count > 1:  # a launcher would end the other processes
            print(message, file=sys.stderr)
        else:
            raise ValueError(message)


def pictures_of(prompts: Iterable[NamedPrompt], lines: ResultLines) -> Iterator[tuple[Path, str]]:
    """Files of the pictures that have been drawn, in the order of prompts, with captions."""
    for prompt in prompts:
        for name in files_of(lines.samples(prompt) or (), "image"):
            yield lines.path.parent / name, prompt.caption


class Finished(NamedTuple):
    """A prompt of which all has been drawn, or that can not be.

    Args:
        prompt: it.
        listed: what the results list of it.
        error: None where it is drawn.
    """

    prompt: NamedPrompt
    listed: dict[str, Any]
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """The error with the prompt's name; empty where it is drawn."""
        message = "" if self.error is None else one_line(str(self.error))
        return message if self.error is None or self.prompt.name in message else f"{self.prompt.name}: {message}"

    def line(self) -> dict[str, Any]:
        """Its line of `results.jsonl`."""
        prompt = self.prompt
        entry = {"key": prompt.key, "prompt": prompt.described, "seed": prompt.seed, "num": prompt.num}
        return {**entry, **self.listed} if self.error is None else {**entry, "error": self.reason}


class Rate(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f}/s" if speed else "")


class Drawing:
    """Draws prompts, writes each sample when it has ended, and shows how far it is.

    Args:
        config: how.
        model: with its memory, where the config has one.
        num: samples of all prompts.
    """

    def __init__(self, config: GenerateConfig, model: MixedModal, num: int) -> None:
        self.config, self.model, self.num = config, model, num
        self.num_samples = self.num_pictures = 0
        self._open: dict[str, tuple[NamedPrompt, list[Retrieved], dict[int, dict[str, Any]]]] = {}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()
        self._progress = Progress(*columns, disable=os.environ.get("RANK", "0") != "0")
        self._bar = self._progress.add_task("samples", total=num)

    def __enter__(self) -> Drawing:
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._seconds = time.perf_counter() - self._started

    def summary(self) -> str:
        """What has been drawn, and how fast."""
        unit, num = ("pictures", self.num_pictures) if self.num_pictures else ("samples", self.num_samples)
        return f"{self.num_samples} samples in {self._seconds:.1f} s ({num / self._seconds:.2f} {unit} a second)"

    def draw(self, prompts: Iterable[NamedPrompt]) -> Iterator[Finished]:
        """Prompts as they are finished."""
        options: dict[str, Any] = self.config.drawing_options()
        drawn = self.model.generate_each(map(self._ask, prompts), self.config.output, **options)
        self.config.out.mkdir(parents=True, exist_ok=True)
        for one in drawn:
            prompt, documents, written = self._open[one.key]
            if isinstance(one, Failed):
                del self._open[one.key]
                self.num -= prompt.num
                self._progress.update(self._bar, total=self.num)
                yield Finished(prompt, {}, one.error)
                continue
            written[one.number] = self._write(prompt, one, documents)
            if len(written) == prompt.num:
                del self._open[one.key]
                yield Finished(prompt, self._list(prompt, documents, written))

    def _ask(self, prompt: NamedPrompt) -> Ask | Failed:
        """A prompt with its pictures opened, and documents found for it."""
        config, documents = self.config, []
        self._open[prompt.key] = prompt, documents, {}
        try:
            parts = config.frame(prompt.open())
            if config.retrieve:
                known = [part for part in parts if not isinstance(part, PartialPicture)]
                output = "image" if config.output == INFILL else config.output  # none before masks in texts
                fit = {"max_new_tokens": config.max_new_tokens, "random_seed": config.random_seed}
                documents += self.model.retrieve([known], config.retrieve, output, **fit)[0]
        except ValueError as error:
            return Failed(prompt.key, error)
        return Ask(prompt.key, parts, prompt.num, prompt.seed, documents)

    def _write(self, prompt: NamedPrompt, drawn: Drawn, documents: list[Retrieved]) -> dict[str, Any]:
        described = self.config.describe_prompt(prompt)
        if self.config.retrieve:
            described["retrieved"] = [document.key for document in documents]
        entry = write_sample(drawn.sample, drawn.number, self.config.out, prompt.key, described)
        self.num_samples += 1
        self.num_pictures += sum(1 for _ in files_of([entry], "image"))
        self._progress.advance(self._bar)
        return entry

    def _list(
        self, prompt: NamedPrompt, documents: list[Retrieved], written: dict[int, dict[str, Any]]
    ) -> dict[str, Any]:
        listed: dict[str, Any] = {}
        if self.config.retrieve:
            listed["retrieved"] = write_documents(self.model, documents, self.config.out, prompt.key)
        return {**listed, "samples": [written[number] for number in sorted(written)]}
