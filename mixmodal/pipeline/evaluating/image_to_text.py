"""Captions of pictures: how near they are to those that people wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmodal.data.shards import Sample
from mixmodal.document import EndOfTurn
from mixmodal.evaluation.captioning import caption_scores, named_concept
from mixmodal.evaluation.concepts import rest_of
from mixmodal.pipeline.evaluating.task import (
    LABELS,
    SHOWN,
    Findings,
    Item,
    Setup,
    Task,
    TaskOptions,
    open_first,
    rate_labels,
    skipped,
)
from mixmodal.pipeline.evaluating.text_to_image import save
from mixmodal.pipeline.options import sampling_options
from mixmodal.pipeline.queue import Ask, Failed
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content

GREEDY = TokenSampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class ImageToTextOptions(TaskOptions):
    """Writes a caption for each picture. References are the sample's texts and those of `captions` in its metadata.

    Args:
        prompt: what is said behind the picture, as `Describe the picture.`; empty for nothing.
        turns: whether the model was tuned on conversations; an end of turn stands behind the prompt then.
        sampling: how text is drawn.
        max_new_tokens: after which a caption is cut.
    """

    prompt: str = ""
    turns: bool = False
    sampling: TokenSampling = GREEDY
    max_new_tokens: int = 64


class ImageToText(Task[ImageToTextOptions]):
    """See `ImageToTextOptions`."""

    title = "Image to text"
    introduction = "Captions written for pictures, compared with the captions that people wrote."

    def takes(self, sample: Sample) -> bool:
        return len(sample.pictures) == 1 and bool(sample.texts) and not sample.messages

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        known: dict[str, Item] = {}
        behind: list[Content] = [self.options.prompt] if self.options.prompt else []
        behind += [EndOfTurn()] if self.options.turns else []

        def asks() -> Iterator[Ask | Failed]:
            for item in items:
                known[item.key] = item
                try:
                    picture = open_first(item, setup.limits)
                except ValueError as error:
                    yield Failed(item.key, error)
                    continue
                if item.place < SHOWN:
                    save(setup, setup.load().codec.fit(picture), item.key)
                yield Ask(item.key, [picture, *behind], seed=setup.seed_of(item))

        options: Any = {"max_new_tokens": self.options.max_new_tokens}
        options |= sampling_options({"text": self.options.sampling})
        for one in setup.load().generate_each(asks(), "text", **options):
            item = known.pop(one.key)
            if isinstance(one, Failed):
                yield item, skipped(one.error)
                continue
            head = {"sample": item.sample.key, "references": references_of(item.sample), **item.labels}
            yield item, {**head, "caption": str(one.sample).strip()}

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        captions, references = [entry["caption"] for entry in entries], [entry["references"] for entry in entries]
        scores = caption_scores(captions, references)
        metrics: dict[str, float | None] = {"cider_d": scores.cider_d}
        metrics |= {f"bleu_{order}": value for order, value in enumerate(scores.bleu, 1)}
        metrics["rouge_l"] = scores.rouge_l
        verdicts = judge_names(entries)
        metrics |= rate_labels(verdicts)
        shown = [
            {
                "image": f"{entry['key']}.png",
                "text": f"{entry['caption']} | {entry['references'][0]}",
                "right": entry.get("concept_right"),
            }
            for entry in verdicts[:SHOWN]
            if (setup.folder / f"{entry['key']}.png").exists()
        ]
        return Findings(metrics=metrics, shown=shown)


def references_of(sample: Sample) -> list[str]:
    """The captions that a sample has."""
    more = sample.metadata.get("captions", [])
    found = [*sample.texts, *(one for one in more if isinstance(one, str) and one.strip())]
    return list(dict.fromkeys(found))


def judge_names(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries with `concept_right` and `style_right` where they have these labels: whether the caption names them."""
    names = {label: sorted({entry[label] for entry in entries if label in entry}) for label in LABELS}
    found: list[dict[str, Any]] = []
    for entry in entries:
        verdict = {}
        for label in LABELS:
            if label in entry:
                text = entry["caption"] if label == "concept" else rest_of(entry["caption"], names["concept"])
                verdict[f"{label}_right"] = named_concept(text, names[label]) == entry[label]
        found.append({**entry, **verdict})
    return found
