"""Corpora as people have them to validated shards, and on to token shards where there are tokenizers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from mixmodal.data.conversations import ConversationCounter, describe_conversations
from mixmodal.data.converters import (
    read_conversations,
    read_instructpix2pix,
    read_llava,
    read_mmc4,
    read_obelics,
    read_preferences,
    read_tasks,
)
from mixmodal.data.corpus_files import Reader, read_folder, read_jsonl
from mixmodal.data.pretokenize import PretokenizeConfig, TokensConfig, pretokenize
from mixmodal.data.shards import (
    INDEX_NAME,
    PictureFile,
    Sample,
    read_samples,
    remove_unfinished,
    write_shards,
)
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.data.tasks import TaskTemplates
from mixmodal.files import read_object, write_whole
from mixmodal.tokenization.preprocessing import PictureError, resize_and_crop, resize_and_pad

REPORT_NAME = "report.json"
CorpusKind = Literal[
    "folder", "jsonl", "shards", "conversations", "preferences", "tasks", "llava", "instructpix2pix", "obelics", "mmc4"
]
READERS: dict[CorpusKind, Reader] = {
    "folder": read_folder,
    "jsonl": read_jsonl,
    "shards": read_samples,
    "conversations": read_conversations,
    "preferences": read_preferences,
    "llava": read_llava,
    "instructpix2pix": read_instructpix2pix,
    "obelics": read_obelics,
    "mmc4": read_mmc4,
}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A corpus as it is.

    Args:
        kind: `folder` holds pictures, each with a text file of the same name or all in one `captions.jsonl`; `jsonl` is
            a file with a line `{"image": ..., "text": ...}` or `{"parts": [{"text": ...}, {"image": ...}, ...]}` each,
            its paths within its folder; `shards` is a folder of img2dataset's or this package's shards. `conversations`
            is a file of messages, `preferences` one of pairs of answers, `tasks` one of records that templates make
            conversations of, `llava` and `instructpix2pix` are files that become such, and `obelics` and `mmc4` are
            files of interleaved documents: see `mixmodal.data.converters`.
        path: the folder or file.
        templates: a YAML file of templates, as in `configs/tasks`; of the kind `tasks` alone, which needs it.
        move_boxes: of the kind `tasks`: boxes are in pixels of the pictures' files, and are moved and clipped as those
            are scaled and cropped to `image_size`; otherwise they are in pixels of what is trained on.
    """

    kind: CorpusKind
    path: Path
    templates: Path | None = None
    move_boxes: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "tasks") != (self.templates is not None):
            said = "needs templates, a YAML file as in configs/tasks" if self.kind == "tasks" else "takes no templates"
            raise ValueError(f"{self.path}: a corpus of kind {self.kind} {said}")
        if self.move_boxes and self.kind != "tasks":
            raise ValueError(f"{self.path}: a corpus of kind {self.kind} has no boxes, so move_boxes can not act")

    def read(self, counter: SkipCounter, limits: SampleLimits, image_size: int) -> Iterator[Sample]:
        """Its samples, their pictures not yet decoded; `image_size` is that of the config."""
        size = image_size if self.move_boxes else 0
        reader = READERS.get(self.kind) or partial(read_tasks, templates=self.load_templates(), image_size=size)
        return reader(self.path, counter, limits)

    def load_templates(self) -> TaskTemplates:
        """Those of the kind `tasks`.

        Raises:
            ValueError: where the file can not be read, or holds something else.
        """
        assert self.templates is not None
        return TaskTemplates.load(self.templates)

    @property
    def settings(self) -> dict[str, str]:
        """What its samples follow from, as plain data."""
        found = {"kind": self.kind, "path": str(self.path)}
        if self.templates is not None:
            found |= {"templates": str(self.templates), "templates_digest": self.load_templates().digest}
        if self.move_boxes:
            found["move_boxes"] = "true"
        return found


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From corpora to shards and token shards.

    Args:
        corpora: read in this order.
        out: gets `shards/`, `tokens/` and `report.json`.
        image_size: pictures are scaled and cropped to this side, pixels, and stored as PNG; 0 keeps the files, as the
            sequence format `lumina` needs them.
        shard_size: samples a shard.
        limits: what a sample may be, and the share of bad ones that fails the job.
        tokens: tokenizers for token shards; without it the job ends with the shards. Shards that an earlier call made
            of the same corpora are kept, so that tokenizers can be trained on them in between.
    """

    corpora: tuple[CorpusConfig, ...]
    out: Path
    image_size: int = 0
    shard_size: int = 1000
    limits: SampleLimits = field(default_factory=SampleLimits)
    tokens: TokensConfig | None = None

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora is empty; give at least one with kind and path")
        kinds = {corpus.kind for corpus in self.corpora}
        if "preferences" in kinds and len(kinds) > 1:
            others = ", ".join(sorted(kinds - {"preferences"}))
            raise ValueError(f"corpora: preferences are tuned on apart, not beside {others}; prepare them apart")
        if self.image_size < 0 or self.shard_size < 1:
            raise ValueError(
                f"image_size is {self.image_size} (at least 0), shard_size is {self.shard_size} (at least 1)"
            )
        if not self.image_size and any(corpus.move_boxes for corpus in self.corpora):
            raise ValueError("move_boxes needs image_size, the side of the squares that boxes are moved into, pixels")
        if self.image_size and self.tokens is not None and self.tokens.sequence_format == "lumina":
            raise ValueError(
                f"image_size is {self.image_size}, which makes all pictures squares, and tokens.sequence_format lumina "
                "has pictures of several sizes; leave image_size at 0"
            )


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes shards and, with tokenizers, token shards; prints and saves the report, which it returns.

    Raises:
        ValueError: where a corpus or tokenizer is missing, or `out` holds a corpus, or shards of other settings or of
            someone else.
        TooManySkipped: above the allowed share of bad samples; what is written stays.
    """
    _check_apart(config)
    path = config.out / REPORT_NAME
    report = _finished(config, path)
    if report is None:
        report = {"settings": _settings(config), "shards": _prepare_shards(config), "tokens": None}
    _save(path, report)
    if config.tokens is not None:
        options = {entry.name: getattr(config.tokens, entry.name) for entry in fields(config.tokens)}
        shards, out = (config.out / "shards",), config.out / "tokens"
        tokens = pretokenize(PretokenizeConfig(shards=shards, out=out, limits=config.limits, **options))
        report["tokens"] = tokens.manifest["counts"]
        _save(path, report)
    print(describe(report, config.out))
    return report


def _save(path: Path, report: dict[str, Any]) -> None:
    write_whole(path, json.dumps(report, indent=1).encode())


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the shards follow from, as plain data."""
    return {
        "corpora": [corpus.settings for corpus in config.corpora],
        "image_size": config.image_size,
        "shard_size": config.shard_size,
        "limits": asdict(config.limits),
    }


def _check_apart(config: PrepareConfig) -> None:
    """Whether what is written stays apart from what is read.

    Raises:
        ValueError: where a corpus is the folder of the shards to write, or lies in it.
    """
    shards = (config.out / "shards").resolve()
    for corpus in config.corpora:
        path = corpus.path.resolve()
        if shards in (path, *path.parents):
            raise ValueError(f"{corpus.path}: the shards of {config.out} would be written over this corpus; change out")


def _finished(config: PrepareConfig, path: Path) -> dict[str, Any] | None:
    """The report of an earlier call that finished the shards; where that broke off behind them, from their index.

    Raises:
        ValueError: where its settings were others, or a file of it is broken.
    """
    index_path = config.out / "shards" / INDEX_NAME
    if not index_path.is_file():
        return None
    index = read_object(index_path)
    if path.is_file():
        report = read_object(path)
    elif index.get("shards") and "job" in index:
        shards = {"files": len(index["shards"]), **index["job"]["shards"]}
        path, report = index_path, {"settings": index["job"]["settings"], "shards": shards, "tokens": None}
    else:
        return None
    written = report.get("settings", {})
    for key, value in _settings(config).items():
        if written.get(key) != value:
            raise ValueError(f"{path}: {key} is {written.get(key)}, not {value}; remove {config.out} or choose another")
    return report


def _prepare_shards(config: PrepareConfig) -> dict[str, Any]:
    """Writes the shards and counts, by corpus and over all."""
    for corpus in config.corpora:
        if not corpus.path.exists():
            raise ValueError(f"{corpus.path}: there is no such corpus of kind {corpus.kind}")
    counters = [SkipCounter(config.limits.max_skipped_share) for _ in config.corpora]
    conversations = [ConversationCounter() for _ in config.corpora]
    remove_unfinished(config.out / "shards")

    def report() -> dict[str, Any]:
        corpora = [
            {"kind": corpus.kind, "path": str(corpus.path), **counter.to_dict(), **found.to_dict()}
            for corpus, counter, found in zip(config.corpora, counters, conversations)
        ]
        return {"samples": sum(counter.num_used for counter in counters), "corpora": corpora}

    paths = write_shards(
        _validate(config, counters, conversations),
        config.out / "shards",
        config.shard_size,
        lambda: {"settings": _settings(config), "shards": report()},
    )
    if not paths:
        raise ValueError(f"{', '.join(str(corpus.path) for corpus in config.corpora)}: there is no usable sample")
    return {"files": len(paths), **report()}


def _validate(
    config: PrepareConfig, counters: list[SkipCounter], conversations: list[ConversationCounter]
) -> Iterator[Sample]:
    """Samples whose every picture decodes, under running keys."""
    numbers = count()
    for corpus, counter, found in zip(config.corpora, counters, conversations):
        for sample in corpus.read(counter, config.limits, config.image_size):
            try:
                parts = tuple(
                    part if isinstance(part, str) else _check_picture(part, config.image_size, config.limits, loss)
                    for part, loss in zip(sample.parts, sample.losses)
                )
            except PictureError as error:
                counter.skip(SampleError("broken picture", str(error)))
                continue
            counter.use()
            found.add(
                sample.messages,
                ["text" if isinstance(part, str) else "image" for part in parts],
                sample.metadata.get("task"),
            )
            metadata = {**sample.metadata, "source": sample.source}
            yield replace(sample, key=f"{next(numbers):09d}", parts=parts, metadata=metadata)
        counter.finish()


def _check_picture(file: PictureFile, image_size: int, limits: SampleLimits, loss: bool) -> PictureFile:
    """The picture, decoded once to see that it can be, scaled where asked for: one without loss to be seen whole."""
    picture = file.open(limits.max_pixels)
    if not image_size:
        return file
    stream = io.BytesIO()
    (resize_and_crop if loss else resize_and_pad)(picture, image_size).save(stream, "PNG")
    return PictureFile(stream.getvalue(), "png", file.name)


def describe(report: dict[str, Any], out: Path) -> str:
    """The report as lines for people."""
    lines = []
    for corpus in report["shards"]["corpora"]:
        lines.append(f"{corpus['path']} ({corpus['kind']}): {corpus['used']:,} samples")
        lines += [f"  {number:,} skipped: {reason}" for reason, number in corpus["skipped"].items()]
        lines += [f"  {number:,} altered: {change}" for change, number in corpus["altered"].items()]
        lines += [f"    {example}" for example in corpus["examples"][:3]]
        lines += describe_conversations(corpus)
    lines.append(f"{out / 'shards'}: {report['shards']['samples']:,} samples in {report['shards']['files']:,} files")
    tokens = report["tokens"]
    if tokens:
        lines.append(
            f"{out / 'tokens'}: {tokens['documents']:,} documents, {tokens['tokens']:,} tokens "
            f"({tokens['text_tokens']:,} text, {tokens['image_tokens']:,} image)"
        )
        if "loss_tokens" in tokens:
            lines.append(
                f"  loss on {tokens['loss_tokens']:,} tokens ({tokens['text_loss_tokens']:,} text, "
                f"{tokens['image_loss_tokens']:,} image) of the shards with conversations"
            )
        for task, found in tokens.get("tasks", {}).items():
            lines.append(
                f"    {task}: {found['documents']:,} documents, loss on {found['text_loss_tokens']:,} text and "
                f"{found['image_loss_tokens']:,} image tokens"
            )
        lines += [f"  {number:,} skipped: {reason}" for reason, number in tokens["skipped"].items()]
    lines.append(f"report: {out / REPORT_NAME}")
    return "\n".join(lines)
