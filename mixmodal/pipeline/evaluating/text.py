"""Texts as a language model reads them: bits for each byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.data.shards import Sample, read_samples
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.evaluation.compression import bits_per_byte
from mixmodal.evaluation.text import score_texts
from mixmodal.pipeline.evaluating.task import Findings, Item, Setup, Task, TaskOptions, batches


@dataclass(frozen=True, kw_only=True)
class TextOptions(TaskOptions):
    """Scores texts; those that the model's context does not take pass it in pieces, see `rolling_windows`.

    Args:
        data: text files, each one text, or folders of shards, of whose samples the texts are joined by newlines.
    """

    data: tuple[Path, ...]


class TextBits(Task[TextOptions]):
    """See `TextOptions`."""

    title = "Text"
    introduction = "What a byte of text costs the model, in bits. The end of a text is not counted."

    def read(self, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
        for path in self.options.data:
            if path.is_dir() or path.suffix == ".tar":
                yield from read_samples(path, counter, limits)
                continue
            if not path.is_file():
                raise ValueError(f"data: there is no file {path}; give text files, or folders of shards")
            try:
                yield Sample(path.stem, (path.read_text(encoding="utf-8"),), source=str(path))
            except UnicodeDecodeError as error:
                counter.skip(SampleError("broken text", f"{path}: the text is not UTF-8 ({error})"))

    def takes(self, sample: Sample) -> bool:
        return any(text.strip() for text in sample.texts)

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        model = setup.load()
        scorer = SequenceScorer(model.model, model.format, setup.batch_size)
        for batch in batches(items, setup.batch_size):
            texts = ["\n".join(item.sample.texts) for item in batch]
            found = score_texts(scorer, texts)
            for item, text, nats, pieces in zip(batch, texts, found.totals, found.counts, strict=True):
                sizes = {"bytes": len(text.encode()), "pieces": int(pieces)}
                yield item, {"sample": item.sample.key, "nats": float(nats), **sizes}

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        nats = sum(entry["nats"] for entry in entries)
        num_bytes, pieces = (sum(entry[name] for entry in entries) for name in ("bytes", "pieces"))
        metrics: dict[str, float | None] = {"bytes": num_bytes, "pieces": pieces}
        if num_bytes:
            metrics |= {"bits_per_byte": bits_per_byte(-nats, num_bytes), "nats_per_piece": -nats / pieces}
        return Findings(metrics=metrics)
