"""Captions of pictures: how near they are to those that people wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmodal.data.shards import Sample
from mixmodal.document import EndOfTurn
from mixmodal.evaluation.captioning import caption_scores, named_concept
from mixmodal.evaluation.concepts import rest_of
from mixmodal.evaluation.hallucination import chair_scores, mentioned_objects
from mixmodal.pipeline.evaluating.asking import AskingOptions, ask_each, show_first
from mixmodal.pipeline.evaluating.task import (
    LABELS,
    Findings,
    Item,
    Setup,
    Shown,
    Task,
    objects_of,
    open_first,
    rate_labels,
)
from mixmodal.tokenization.codec import Content


@dataclass(frozen=True, kw_only=True)
class ImageToTextOptions(AskingOptions):
    """Writes a caption for each picture. References are the sample's texts and those of `captions` in its metadata.

    Args:
        prompt: what is said behind the picture, as `Describe the picture.`; empty for nothing.
        turns: whether the model was tuned on conversations; an end of turn stands behind the prompt then.
        objects: synonyms of each object that captions may claim, for CHAIR (arXiv 1809.02156), as
            `{dog: [puppy], hot dog: []}`; each picture's metadata have `objects`, the list of what it shows. Empty does
            not count them.
    """

    prompt: str = ""
    turns: bool = False
    objects: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            mentioned_objects("", self.objects)
        except ValueError as error:
            raise ValueError(f"objects: {error}") from error


class ImageToText(Task[ImageToTextOptions]):
    """See `ImageToTextOptions`."""

    title = "Image to text"
    introduction = "Captions written for pictures, compared with the captions that people wrote."
    judged_by = ("objects",)

    def takes(self, sample: Sample) -> bool:
        return len(sample.pictures) == 1 and bool(sample.texts) and not sample.messages

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        behind: list[Content] = [self.options.prompt] if self.options.prompt else []
        behind += [EndOfTurn()] if self.options.turns else []

        def prompts(item: Item) -> list[list[Content]]:
            return [[open_first(item, setup.limits), *behind]]

        def record(item: Item, said: list[str]) -> dict[str, Any]:
            head = {"sample": item.sample.key, "references": references_of(item.sample), **item.labels}
            shown = item.sample.metadata.get("objects")
            return {**head, **({} if shown is None else {"objects": objects_of(item.sample)}), "caption": said[0]}

        return ask_each(setup, items, self.options, prompts, record)

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        captions, references = [entry["caption"] for entry in entries], [entry["references"] for entry in entries]
        scores = caption_scores(captions, references)
        metrics: dict[str, float | None] = {"cider_d": scores.cider_d}
        metrics |= {f"bleu_{order}": value for order, value in enumerate(scores.bleu, 1)}
        metrics["rouge_l"] = scores.rouge_l
        verdicts = judge_names(entries)
        metrics |= rate_labels(verdicts)
        if self.options.objects:
            verdicts = find_hallucinated(verdicts, self.options.objects, metrics)
        return Findings(metrics=metrics, shown=show_first(setup, verdicts, tell))


def find_hallucinated(
    entries: Sequence[Mapping[str, Any]],
    synonyms: Mapping[str, Sequence[str]],
    metrics: dict[str, float | None],
) -> list[dict[str, Any]]:
    """Entries with the `hallucinated` objects of their captions; CHAIR and the counts behind it go into the metrics.

    Raises:
        ValueError: naming a sample that does not say what it shows.
    """
    if lacking := [entry["sample"] for entry in entries if "objects" not in entry]:
        raise ValueError(f"objects: {len(lacking)} samples have no list `objects` in their metadata, as {lacking[0]}")
    scores = chair_scores([one["caption"] for one in entries], [one["objects"] for one in entries], synonyms)
    metrics |= {"chair_i": scores.chair_i, "chair_s": scores.chair_s, "chair_mentions": scores.mentioned}
    return [{**entry, "hallucinated": names} for entry, names in zip(entries, scores.each, strict=True)]


def tell(entry: Mapping[str, Any], pictures: dict[str, str]) -> Shown:
    """The caption beside that of people, and what it claims that is not there."""
    claimed = entry.get("hallucinated")
    text = f"{entry['caption']} (not there: {', '.join(claimed)})" if claimed else entry["caption"]
    right = entry.get("concept_right", None if claimed is None else not claimed)
    return Shown(pictures=pictures, text=text, wanted=entry["references"][0], right=right)


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
