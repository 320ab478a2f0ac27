"""Shards of texts and pictures to token shards, one for one, so that training never runs a tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mixmodal.data.augment import AugmentConfig, augment, draw_changes
from mixmodal.data.conversations import NO_TASK, is_pair
from mixmodal.data.preferences import answers_equal, spell_conversation
from mixmodal.data.shards import PictureFile, Sample, find_shards, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.data.token_shards import (
    TokenShards,
    build_manifest,
    is_token_shard,
    write_token_shard,
)
from mixmodal.document import (
    UNIT_PIXELS,
    Document,
    FormatName,
    Image,
    Part,
    SequenceFormat,
    Text,
    build_format,
)
from mixmodal.document.lumina import num_reserved
from mixmodal.environment import choose_device
from mixmodal.files import read_object, write_whole
from mixmodal.manifests import MANIFEST_NAME, write_manifest
from mixmodal.tokenization.codec import map_alike
from mixmodal.tokenization.preprocessing import PictureError, Preprocess, resize_and_crop, resize_and_pad, to_tensor
from mixmodal.tokenization.text_files import PieceTokenizer, load_text_tokenizer, size_vocabulary
from mixmodal.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with the numbers of finished and of all units of work."""


class Spelled(NamedTuple):
    """A document: its key, its ids `(T,)` int64, which tokens carry loss, bool `(T,)` (None is all), its task, and
    whether it is a pair of answers."""

    key: str
    ids: np.ndarray
    loss: np.ndarray | None
    task: str | None
    pair: bool

    @property
    def name_of_task(self) -> str:
        return self.task or NO_TASK

    @property
    def trained(self) -> np.ndarray:
        """The ids that carry loss."""
        return self.ids if self.loss is None else self.ids[self.loss]


class ImageEncoder(Protocol):
    """What is asked of an image tokenizer here."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """What samples are made tokens with.

    Args:
        text_tokenizer: a model file of `mixmodal train-text-tokenizer`, or a `tokenizers` JSON file.
        image_tokenizer: a folder of `mixmodal train-image-tokenizer`.
        sequence_format: how documents are spelled. In `lumina` pictures have several sizes, of the area of the image
            tokenizer's at most: each is resized and cropped to the one that keeps most of it.
        num_sentinels: mask tokens of the vocabulary; by default 512, or as many as a JSON file with image codes has.
        num_text_pieces: of the model's vocabulary, where its embedding has rows that a JSON file has no pieces for, or
            none for some of its added tokens; by default the pieces of the file.
        num_variants: documents a sample gives; the first has its pictures as they are, the others changed ones.
        augment: how the further variants are changed.
        change_alike: whether a variant is one and the same change of all pictures; otherwise each has its own. With it,
            `data.retrieval.variants: same` reads documents that are changed as the one they stand before.
        batch_size: pictures that are encoded at once.
        device: where the image tokenizer runs: `cpu`, `cuda`, ...
        seed: of the changes.
    """

    text_tokenizer: Path
    image_tokenizer: Path
    sequence_format: FormatName = "cm3leon"
    num_sentinels: int | None = None
    num_text_pieces: int | None = None
    num_variants: int = 1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    change_alike: bool = False
    batch_size: int = 64
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_variants", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.num_variants > 1 and not self.augment.changes_pictures:
            raise ValueError(f"num_variants is {self.num_variants}, but augment changes nothing; set one of its shares")
        if self.num_variants == 1 and self.augment.changes_pictures:
            raise ValueError("augment is set, but num_variants is 1 and the first variant is never changed; raise it")
        if self.num_variants == 1 and self.change_alike:
            raise ValueError(
                "change_alike is set, but num_variants is 1 and the first variant is never changed; raise it"
            )


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(TokensConfig):
    """Which shards become token shards, and with what.

    Args:
        shards: folders of shards, or single shards.
        out: folder of the token shards.
        limits: what a sample may be, and the share of bad ones that fails the job.
    """

    shards: tuple[Path, ...]
    out: Path
    limits: SampleLimits = field(default_factory=SampleLimits)


def pretokenize(config: PretokenizeConfig, progress: Progress | None = None) -> TokenShards:
    """Writes a token shard for each shard. Run again after a break, it goes on with the shard that was not finished.

    Raises:
        ValueError: where a tokenizer or the shards are missing, or `out` holds token shards of other settings.
        TooManySkipped: above the allowed share of bad samples; the token shards written so far are kept.
    """
    from mixmodal.tokenization.image import ImageTokenizer

    choose_device(config.device)
    text_tokenizer = load_text_tokenizer(config.text_tokenizer, config.num_text_pieces)
    if config.num_text_pieces not in (None, text_tokenizer.num_pieces):
        raise ValueError(
            f"num_text_pieces is {config.num_text_pieces}, but {config.text_tokenizer} is a sentencepiece model, which "
            f"has {text_tokenizer.num_pieces}; leave it out"
        )
    image_tokenizer = ImageTokenizer.load(config.image_tokenizer).to(config.device)
    sha256 = ImageTokenizer.sha256(config.image_tokenizer)
    size, preprocess = image_tokenizer.config.image_size, image_tokenizer.config.preprocess
    per = image_tokenizer.codes_along(UNIT_PIXELS) if config.sequence_format == "lumina" else None
    return Pretokenizer(config, text_tokenizer, image_tokenizer, size, sha256, preprocess, per).write(progress)


class Pretokenizer:
    """Spells samples with loaded tokenizers.

    Args:
        config: the job; its tokenizer paths are not read.
        text_tokenizer: for texts.
        image_tokenizer: for pictures, on `config.device`.
        image_size: side of its pictures, pixels.
        image_tokenizer_sha256: names it in the manifest.
        preprocess: how its pictures are resized.
        codes_per_unit: of its codes; for the format `lumina` alone.
    """

    def __init__(
        self,
        config: PretokenizeConfig,
        text_tokenizer: PieceTokenizer,
        image_tokenizer: ImageEncoder,
        image_size: int,
        image_tokenizer_sha256: str,
        preprocess: Preprocess = "meta",
        codes_per_unit: int | None = None,
    ) -> None:
        self.config, self.image_tokenizer = config, image_tokenizer
        self.image_size = image_size
        self.preprocess: Preprocess = preprocess
        grid, sizes = image_tokenizer.grid, {Image.modality: image_tokenizer.codebook_size}
        reserved = 1 if codes_per_unit is None else num_reserved(grid, codes_per_unit)
        vocabulary = Vocabulary(size_vocabulary(text_tokenizer, sizes, config.num_sentinels, reserved))
        self.spelling: SequenceFormat = build_format(
            config.sequence_format, vocabulary, {Image.modality: grid}, text_tokenizer, codes_per_unit
        )
        self.tokenizers = {
            "text_tokenizer_sha256": text_tokenizer.sha256,
            "image_tokenizer_sha256": image_tokenizer_sha256,
        }
        self.settings: dict[str, Any] = {
            **self.tokenizers,
            "vocabulary_digest": vocabulary.digest,
            "sequence_format": config.sequence_format,
            "num_variants": config.num_variants,
            "augment": asdict(config.augment),
            "change_alike": config.change_alike,
            "max_pixels": config.limits.max_pixels,
            "max_caption_words": config.limits.max_caption_words,
            "seed": config.seed,
        }

    def write(self, progress: Progress | None = None) -> TokenShards:
        """All shards and then the manifest."""
        sources = find_shards(self.config.shards)
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        counter = SkipCounter(self.config.limits.max_skipped_share)
        records: list[dict[str, Any]] = []
        for number, source in enumerate(sources):
            digest = hashlib.sha256(source.read_bytes()).hexdigest()
            record = self._finished(out / f"shard_{number:05d}.json", digest)
            if record is None:
                (out / MANIFEST_NAME).unlink(missing_ok=True)
                record = self._write_shard(number, source, digest)
            records.append(record)
            counter.merge(record["samples"])
            if progress:
                progress(number + 1, len(sources))
        counter.finish()
        counts: Counter[str] = Counter()
        tasks: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for record in records:
            counts.update(record["counts"])
            for task, found in record.get("tasks", {}).items():
                tasks[task].update(found)
        by_task = {"tasks": {task: dict(tasks[task]) for task in sorted(tasks)}} if tasks else {}
        write_manifest(
            out,
            build_manifest(
                self.spelling,
                [record["entry"] for record in records],
                counts={**counts, **by_task, "skipped": dict(counter.skipped), "altered": dict(counter.altered)},
                num_variants=self.config.num_variants,
                num_pairs=sum(record.get("pairs", 0) for record in records),
                **self.tokenizers,
            ),
        )
        logger.info("%s: %d documents, %d tokens", out, counts["documents"], counts["tokens"])
        return TokenShards(out)

    def _finished(self, path: Path, source_sha256: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier call finished.

        Raises:
            ValueError: where it was written with other settings, or is broken.
        """
        if not path.is_file():
            return None
        record = read_object(path)
        written = record.get("settings", {})
        for key, value in self.settings.items():
            if written.get(key) != value:
                raise ValueError(
                    f"{path}: {key} is {written.get(key)}, not {value}: the folder holds token shards of "
                    f"other settings; remove it or choose another one"
                )
        is_whole = record["source_sha256"] == source_sha256 and is_token_shard(path.parent, record["entry"])
        return record if is_whole else None

    def _write_shard(self, number: int, source: Path, source_sha256: str) -> dict[str, Any]:
        """The record, written behind the shard's files: what is finished has one."""
        name, counter = f"shard_{number:05d}", SkipCounter(max_share=1.0)
        found = list(self._documents(number, source, counter))
        documents, keys = [one.ids for one in found], [one.key for one in found]
        losses = None
        if any(one.loss is not None for one in found):
            losses = [np.ones(len(one.ids), bool) if one.loss is None else one.loss for one in found]
        vocabulary = self.spelling.vocabulary
        entry = write_token_shard(self.config.out, name, documents, keys, vocabulary.size, losses)
        counts = {"documents": len(documents), "tokens": entry["tokens"], **self._count(documents, "tokens")}
        if losses is not None:
            counts |= self._count_loss(found)
        by_task = groupby(sorted(found, key=attrgetter("name_of_task")), attrgetter("name_of_task"))
        has_tasks = losses is not None or any(one.task for one in found)
        record = {
            "entry": entry,
            "source": str(source),
            "source_sha256": source_sha256,
            "settings": self.settings,
            "counts": counts,
            "tasks": {task: self._count_task([*group]) for task, group in by_task} if has_tasks else {},
            "samples": counter.to_dict(),
            "pairs": sum(one.pair for one in found),
        }
        write_whole(self.config.out / f"{name}.json", json.dumps(record, indent=1).encode())
        return record

    def _count_task(self, found: Sequence[Spelled]) -> dict[str, int]:
        """Documents of a task, and the tokens of them that carry loss."""
        return {"documents": len(found), **self._count_loss(found)}

    def _count_loss(self, found: Sequence[Spelled]) -> dict[str, int]:
        """Tokens that carry loss: all, and those of each modality."""
        trained = [one.trained for one in found]
        return {"loss_tokens": sum(map(len, trained)), **self._count(trained, "loss_tokens")}

    def _count(self, documents: Sequence[np.ndarray], what: str) -> dict[str, int]:
        """Tokens of each modality."""
        vocabulary = self.spelling.vocabulary
        return {
            f"{modality}_{what}": sum(int(vocabulary.contains(modality, ids).sum()) for ids in documents)
            for modality in vocabulary.modalities
        }

    def _documents(self, shard: int, source: Path, counter: SkipCounter) -> Iterator[Spelled]:
        """The documents of one shard; all variants of a sample, or none."""
        batch: list[tuple[int, Sample, list[Tensor]]] = []
        waiting = 0
        for number, sample in enumerate(read_samples(source, counter, self.config.limits)):
            try:
                images = [
                    self._image(part, loss)
                    for part, loss in zip(sample.parts, sample.losses)
                    if isinstance(part, PictureFile)
                ]
            except PictureError as error:
                counter.skip(SampleError("broken picture", str(error)))
                continue
            counter.use()
            batch.append((number, sample, images))
            waiting += len(images)
            if waiting >= self.config.batch_size:
                yield from self._spell(shard, batch, counter)
                batch, waiting = [], 0
        yield from self._spell(shard, batch, counter)

    def _image(self, picture: PictureFile, loss: bool) -> Tensor:
        """The picture in the size of its codes: cropped, or, where it is no answer of a conversation, padded."""
        opened = picture.open(self.config.limits.max_pixels)
        height, width = self.spelling.fitting_grid(Image.modality, opened.height, opened.width)
        square = self.image_tokenizer.grid
        size = self.image_size * width // square[1], self.image_size * height // square[0]
        return to_tensor((resize_and_crop if loss else resize_and_pad)(opened, size, self.preprocess))

    def _spell(
        self, shard: int, batch: Sequence[tuple[int, Sample, list[Tensor]]], counter: SkipCounter
    ) -> Iterator[Spelled]:
        variants = range(self.config.num_variants)
        codes = [iter(self._encode(shard, batch, variant)) for variant in variants]
        for _, sample, _ in batch:
            for variant in variants:
                parts: list[Part] = [
                    Text(part) if isinstance(part, str) else Image(next(codes[variant])) for part in sample.parts
                ]
                ids, loss = (
                    spell_conversation(self.spelling, sample.messages, parts)
                    if sample.messages
                    else (self.spelling.spell(Document(parts)), None)
                )
                pair, task = is_pair(sample.messages), sample.metadata.get("task")
                if pair and answers_equal(ids, self.spelling.vocabulary.bos):
                    counter.alter("equal tokens", f"{sample.source}#{variant}: both answers become the same tokens")
                yield Spelled(f"{sample.key}#{variant}", ids, loss, task if isinstance(task, str) else None, pair)

    def _encode(self, shard: int, batch: Sequence[tuple[int, Sample, list[Tensor]]], variant: int) -> list[np.ndarray]:
        """Codes `(h, w)` of all pictures of a batch in one variant, in order."""
        images = [image for _, _, images in batch for image in images]
        alike = self.config.change_alike
        draws = [
            draw_changes(self.config.seed, variant)
            if alike
            else draw_changes(self.config.seed, shard, number, variant, place)
            for number, _, images in batch
            for place in range(len(images))
        ]

        def encode(chosen: list[tuple[Tensor, np.ndarray]]) -> list[np.ndarray]:
            stack = torch.stack([image for image, _ in chosen])
            if variant:
                changes = torch.from_numpy(np.stack([draw for _, draw in chosen]))
                stack = augment(stack, changes, self.config.augment)
            with torch.inference_mode():
                return list(self.image_tokenizer.encode(stack.to(self.config.device)).cpu().numpy())

        codes: list[np.ndarray] = []
        for start in range(0, len(images), self.config.batch_size):
            chunk = slice(start, start + self.config.batch_size)
            shapes = [image.shape for image in images[chunk]]
            codes += map_alike([*zip(images[chunk], draws[chunk])], shapes, encode)
        return codes
