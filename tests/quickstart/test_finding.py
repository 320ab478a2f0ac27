"""What held-out pairs find: their concept in the other style, among all training documents, counted and shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmodal.data.shards import Sample, read_samples, write_shards
from mixmodal.quickstart import finding
from mixmodal.quickstart.demo import Demo
from mixmodal.quickstart.finding import FindingConfig, Held, chances, find_for_heldout, side_by_side, summarise_finding
from mixmodal.quickstart.scoring import Label
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.retrieval.memory import open_memory
from mixmodal.retrieval.retriever import Retriever

COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
TOKENS = {"vocabulary_digest": "v", "sequence_format": {"name": "f", "grids": {}}, "num_variants": 1}
TOKENS |= {"text_tokenizer_sha256": "t", "image_tokenizer_sha256": "i"}


class ColourEncoder:
    """Texts by their first word, which is the colour, and a little by their style; pictures say nothing."""

    identity, dim = "colours", len(COLOURS) + 2

    def embed_documents(self, documents: Sequence[DocumentParts]) -> np.ndarray:
        rows = np.full((len(documents), self.dim), 0.05, np.float32)
        for row, document in zip(rows, documents, strict=True):
            for text in document.texts:
                row[COLOURS.index(text.split()[0])] += 1
                row[len(COLOURS) + ("outline" in text)] += 0.4
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> tuple[Path, ...]:
    """The training pairs, and a document of both styles of blue."""
    train = data / "data" / "train"
    parts = [part for sample in read_samples(train) if sample.key.startswith("blue") for part in sample.parts]
    write_shards([Sample("blue_both", tuple(parts), {"concept": "blue square"})], tmp_path / "mixed")
    return train, tmp_path / "mixed"


@pytest.fixture
def memory(shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    encoder: Any = ColourEncoder()
    documents = [
        MemoryDocument(sample.key, 3, DocumentParts(sample.texts), [np.array([1, 2])])
        for sample in read_samples(shards)
    ]
    settings: dict[str, Any] = {"encoder_identity": encoder.identity, "dim": encoder.dim, "encoder": "colours"}
    write_memory(tmp_path / "memory", documents, encoder.embed_documents, tokens=TOKENS, **settings)

    def load(memory: Path, folder: Path, selection: Any) -> Retriever:
        return Retriever(open_memory(memory, encoder_identity=None), encoder, selection)

    monkeypatch.setattr(finding, "load_retriever", load)
    return tmp_path / "memory"


def test_each_held_out_pair_finds_its_concept_in_the_other_style(
    tmp_path: Path, demo: Demo, shards: tuple[Path, ...], memory: Path
) -> None:
    results = find_for_heldout(tmp_path, demo, shards, memory, tmp_path, FindingConfig(max_score=1.0))
    assert results["num_documents"] == 11
    assert results["by_text"] == {"1": [2, 2], "5": [2, 2]}
    for item in results["items"]:
        first, *others = item["found"]["text"]
        assert (first["right"], [other["right"] for other in others]) == (True, [False] * 4)
        assert first["caption"].startswith(item["label"]["concept"])
        assert item["label"]["style"] not in first["caption"]
        scores = [document["score"] for document in item["found"]["text"]]
        assert scores == sorted(scores, reverse=True)
        shown = [item["image"], *(document["image"] for found in item["found"].values() for document in found)]
        assert all((tmp_path / name).is_file() for name in shown)


def test_the_ceiling_leaves_out_what_is_too_near(
    tmp_path: Path, demo: Demo, shards: tuple[Path, ...], memory: Path
) -> None:
    results = find_for_heldout(tmp_path, demo, shards, memory, tmp_path, FindingConfig(max_score=0.7))
    assert results["by_text"] == {"1": [0, 2], "5": [0, 2]}


def test_figures_of_the_summary_are_shares() -> None:
    results = {"by_text": {"1": [1, 2], "5": [2, 2]}, "by_image": {"1": [0, 2], "5": [1, 4]}}
    assert summarise_finding({**results, "chance": {"1": 0.1, "5": 0.5}}) == {
        "recall1_text": 0.5,
        "recall5_text": 1.0,
        "recall1_image": 0.0,
        "recall5_image": 0.25,
        "chance1": 0.1,
        "chance5": 0.5,
    }


def test_chance_is_that_of_one_right_document_among_all() -> None:
    label = Label("a", "apple", "flat", "food", "apple, flat style", True)
    held = [Held(str(n), "pear", "flat", DocumentParts()) for n in range(8)]
    held += [Held("b", "apple", "outline", DocumentParts()), Held("c", "apple", "flat", DocumentParts())]
    assert chances([label], held) == pytest.approx({"1": 0.1, "5": 0.5})


def test_pictures_of_a_document_are_shown_side_by_side() -> None:
    sheet = side_by_side([Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")])
    assert sheet.size == (8, 4)
    assert [sheet.getpixel((x, 0)) for x in (0, 7)] == [(255, 0, 0), (0, 0, 255)]


def test_what_can_not_be_asked_is_refused(tmp_path: Path, demo: Demo, shards: tuple[Path, ...]) -> None:
    with pytest.raises(ValueError, match="num_documents is 4; it must be at least 5"):
        FindingConfig(num_documents=4)
    with pytest.raises(ValueError, match=r"max_score is 1\.5; it must lie in -1 \.\. 1"):
        FindingConfig(max_score=1.5)
    trained = demo.indices(heldout=False)
    without = Demo([demo.labels[index] for index in trained], demo.images[trained])
    with pytest.raises(ValueError, match=r"no pair is held out to look for; raise heldout_share in corpus\.yaml"):
        find_for_heldout(tmp_path, without, shards, tmp_path, tmp_path, FindingConfig())
