"""What a held-out pair finds among the training documents: its concept, which stands there in the other style only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mixmodal.config import check_least
from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SampleLimits
from mixmodal.evaluation.concepts import Rate, rate
from mixmodal.evaluation.recall import chance_at
from mixmodal.quickstart.demo import Demo, choose, save_picture
from mixmodal.quickstart.scoring import Label
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.retrieval.retriever import Retrieved, Retriever, load_retriever
from mixmodal.retrieval.selection import SelectionConfig
from mixmodal.tokenization.preprocessing import to_pictures

RECALLED = (1, 5)
QUERIES = ("text", "image")


@dataclass(frozen=True, kw_only=True)
class FindingConfig:
    """What the held-out pairs are asked to find.

    Args:
        num_documents: found for each query, nearest first; at least 5, of which the recall is told.
        max_score: ceiling on the inner product of a document with the query and with documents found before it; 1
            leaves out none.
        seed: of the order in which the pairs are shown.
    """

    num_documents: int = 5
    max_score: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, max(RECALLED), "num_documents")
        if not -1 <= self.max_score <= 1:
            raise ValueError(f"max_score is {self.max_score}; it must lie in -1 .. 1")


class Held(NamedTuple):
    """A document that the memory holds: what it shows, and its texts and pictures. Of both styles it has none."""

    key: str
    concept: str
    style: str | None
    parts: DocumentParts

    def answers(self, label: Label) -> bool:
        """Whether it shows the concept of a pair in another style."""
        return self.concept == label.concept and self.style != label.style


def read_held(shards: Sequence[Path]) -> dict[str, Held]:
    """The documents of shards by key."""
    most = SampleLimits().max_pixels
    held: dict[str, Held] = {}
    for sample in read_samples(shards):
        parts = DocumentParts(sample.texts, [picture.open(most) for picture in sample.pictures])
        held[sample.key] = Held(sample.key, sample.metadata["concept"], sample.metadata.get("style"), parts)
    return held


def find_for_heldout(
    run: Path, demo: Demo, shards: Sequence[Path], memory: Path, encoder: Path, config: FindingConfig
) -> dict[str, Any]:
    """Asks the memory for each held-out pair, by its caption and by its picture.

    Args:
        run: folder of the quickstart.
        demo: its pictures, the held-out ones among them.
        shards: that the memory is of.
        memory: its folder.
        encoder: folder of the encoder that it was built with.
        config: what is asked for.

    Returns:
        Plain data for the report; pictures are saved under `run/retrieval` and named relative to `run`.

    Raises:
        ValueError: where no pair is held out, or the memory is of another encoder.
    """
    heldout = demo.indices(heldout=True)
    if not heldout:
        raise ValueError("retrieval: no pair is held out to look for; raise heldout_share in corpus.yaml")
    held = read_held(shards)
    retriever = load_retriever(memory, encoder, SelectionConfig(max_score=config.max_score))
    chosen = choose(heldout, len(heldout), config.seed)
    labels = [demo.labels[index] for index in chosen]
    pictures = to_pictures(demo.images[chosen])
    queries = {
        "text": [DocumentParts(texts=[label.caption]) for label in labels],
        "image": [DocumentParts(images=[picture]) for picture in pictures],
    }
    found = {name: find(retriever, queries[name], config.num_documents) for name in QUERIES}
    answers = {
        name: [[held[document.key].answers(label) for document in row] for label, row in zip(labels, rows, strict=True)]
        for name, rows in found.items()
    }
    shown = {document.key for rows in found.values() for row in rows for document in row}
    files = {
        key: save_picture(side_by_side(held[key].parts.images), run, f"retrieval/found/{key}.png")
        for key in sorted(shown)
    }

    def describe(name: str, place: int) -> Iterator[dict[str, Any]]:
        for document, right in zip(found[name][place], answers[name][place], strict=True):
            caption = "; ".join(held[document.key].parts.texts)
            yield {**document.to_dict(), "caption": caption, "right": right, "image": files[document.key]}

    return {
        "num_documents": len(retriever.memory),
        "chance": chances(labels, [held[key] for key in retriever.memory.keys]),
        **{f"by_{name}": recalls(answers[name]) for name in QUERIES},
        "items": [
            {
                "label": label._asdict(),
                "image": save_picture(picture, run, f"retrieval/heldout/{place:03d}.png"),
                "found": {name: list(describe(name, place)) for name in QUERIES},
            }
            for place, (label, picture) in enumerate(zip(labels, pictures, strict=True))
        ],
    }


def find(retriever: Retriever, queries: Sequence[DocumentParts], count: int) -> list[list[Retrieved]]:
    """The documents of each query, nearest first."""
    return [row[::-1] for row in retriever.find(queries, count)]


def recalls(answers: Sequence[Sequence[bool]]) -> dict[str, list[int]]:
    """By k: how many queries have a right document among the first k, and of how many."""
    return {str(k): list(rate(any(row[:k]) for row in answers)) for k in RECALLED}


def chances(labels: Sequence[Label], documents: Sequence[Held]) -> dict[str, float]:
    """By k: the share of the queries that documents in a random order would answer."""
    answered = [
        next((number for number, label in enumerate(labels) if document.answers(label)), -1) for document in documents
    ]
    found = chance_at(range(len(labels)), answered, RECALLED)
    return {str(k): share for k, share in zip(RECALLED, found, strict=True)}


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures of a document as one."""
    width = sum(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture.convert("RGB"), (left, 0))
        left += picture.width
    return sheet


def summarise_finding(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `summary.json`."""
    shares = {f"recall{k}_{name}": Rate(*results[f"by_{name}"][str(k)]).share for name in QUERIES for k in RECALLED}
    return {**shares, **{f"chance{k}": results["chance"][str(k)] for k in RECALLED}}
