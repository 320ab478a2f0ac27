"""What is retrieved for a prompt: the best last, under the rules of training, and a control that is drawn by a seed."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.retrieval import retriever as module
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, open_memory
from mixmodal.retrieval.retriever import Retriever, load_retriever
from mixmodal.retrieval.selection import SelectionConfig

DIM = 64
TOKENS = {
    "vocabulary_digest": "d" * 64,
    "sequence_format": {"name": "cm3leon", "grids": {"image": [4, 4]}},
    "text_tokenizer_sha256": "a" * 64,
    "image_tokenizer_sha256": "b" * 64,
    "num_variants": 2,
}
CAPTIONS = ["red apple", "red apple pie", "green apple pie", "green pear tree", "blue car", "blue toy car"]
KINDS = [HAS_TEXT | HAS_IMAGE] * 5 + [HAS_TEXT]


class WordEncoder:
    """Texts with common words are near to each other."""

    identity = "e" * 64

    def embed_documents(self, documents: Sequence[DocumentParts]) -> np.ndarray:
        rows = np.array([sum(map(self._word, " ".join(one.texts).split())) for one in documents]).reshape(-1, DIM)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def _word(self, word: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=DIM)


ENCODER: Any = WordEncoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [
        MemoryDocument(caption, kind, DocumentParts([caption]), [np.arange(3) + 10 * number, np.array([99])])
        for number, (caption, kind) in enumerate(zip(CAPTIONS, KINDS))
    ]
    path = tmp_path_factory.mktemp("memory")
    given: dict[str, Any] = {"encoder_identity": "e" * 64, "dim": DIM, "tokens": TOKENS, "encoder": "runs/gone"}
    write_memory(path, documents, ENCODER.embed_documents, **given)
    return path


@pytest.fixture
def retriever(folder: Path) -> Retriever:
    return Retriever(open_memory(folder, encoder_identity=None), ENCODER)


def keys(found: list[list[Any]]) -> list[list[str]]:
    return [[one.key for one in row] for row in found]


def test_the_best_stands_last_and_carries_its_tokens(retriever: Retriever) -> None:
    found = retriever.find([DocumentParts(["apple pie"]), DocumentParts(["blue"])], 2)
    assert {one.key for one in found[0]} == {"red apple pie", "green apple pie"}
    assert found[1][1].key == "blue car"
    for row in found:
        assert row[0].score <= row[1].score <= 0.9
        for one in row:
            assert one.key == CAPTIONS[one.number]
            assert one.ids.tolist() == [10 * one.number + place for place in range(3)]
            assert one.to_dict() == {"key": one.key, "score": one.score}


def test_near_duplicates_and_the_own_document_are_left_out(retriever: Retriever) -> None:
    queries = [DocumentParts(["red apple"])]
    assert "red apple" not in keys(retriever.find(queries, 3))[0]
    retriever.selection = SelectionConfig(max_score=1.0)
    assert keys(retriever.find(queries, 2))[0] == ["red apple pie", "red apple"]
    assert "red apple" not in keys(retriever.find(queries, 3, own=[0]))[0]


def test_documents_of_both_modalities_come_first(retriever: Retriever) -> None:
    queries = [DocumentParts(["toy"])]
    assert "blue toy car" not in keys(retriever.find(queries, 3))[0]
    retriever.selection = SelectionConfig(prefer_both=False)
    assert keys(retriever.find(queries, 3))[0][-1] == "blue toy car"


def test_a_query_is_found_alike_in_any_batch(retriever: Retriever) -> None:
    queries = [DocumentParts([caption]) for caption in ("apple", "pear", "car")]
    for kind in (retriever.find, lambda some, count: retriever.random(some, count, 7)):
        together = keys(kind(queries, 2))
        assert together == [keys(kind([query], 2))[0] for query in queries]
    assert retriever.find([], 2) == retriever.random([], 2, 0) == []


def test_random_documents_follow_seed_and_query_and_the_same_rules(retriever: Retriever) -> None:
    queries = [DocumentParts(["red apple"]), DocumentParts(["pear"])]
    draws = [keys(retriever.random(queries, 2, seed)) for seed in range(12)]
    assert draws[3] == keys(retriever.random(queries, 2, 3))
    assert len({tuple(first) for first, _ in draws}) > 4
    assert not any("red apple" in first or "blue toy car" in [*first, *second] for first, second in draws)
    retriever.selection = SelectionConfig(max_score=1.0)  # so that the rules do not tell the queries apart
    assert any(first != second for first, second in (keys(retriever.random(queries, 2, seed)) for seed in range(12)))
    (one,) = retriever.random(queries[1:], 1, 0)[0]
    assert one.score == pytest.approx(
        float(retriever.memory.vectors([one.number])[0] @ ENCODER.embed_documents(queries[1:])[0])
    )


def test_fewer_than_asked_for_are_told(retriever: Retriever, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = retriever.find([DocumentParts(["red apple"])], 6)
    assert len(found) < 6
    assert f"for 1 of 1 queries fewer than 6 documents may be taken, {len(found)} at the least" in caplog.text


def test_queries_that_can_not_be_asked_are_refused(retriever: Retriever) -> None:
    with pytest.raises(ValueError, match="query 1 has neither text nor picture"):
        retriever.find([DocumentParts(["a"]), DocumentParts()], 1)
    for ask in (lambda: retriever.find([], 0), lambda: retriever.random([], 0, 1)):
        with pytest.raises(ValueError, match="number of documents to retrieve is 0"):
            ask()
    with pytest.raises(ValueError, match="search_depth is 64; it must be at least num_candidates, 65"):
        retriever.find([DocumentParts(["a"])], 65)


def test_the_encoder_is_the_one_of_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"encoder that it was built with is not at runs/gone any more; give --encoder"
    ):
        load_retriever(folder)
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/none; give one with a CLIP or SigLIP"):
        load_retriever(folder, tmp_path / "none")
    loaded = []
    monkeypatch.setattr(module, "load_encoder", lambda *given: loaded.append(given) or ENCODER)
    found = load_retriever(folder, tmp_path, SelectionConfig(max_score=0.5), "meta")
    assert loaded == [(tmp_path, "meta")]
    assert found.selection.max_score == 0.5
    other: Any = WordEncoder()
    other.identity = "f" * 64
    monkeypatch.setattr(module, "load_encoder", lambda *given: other)
    with pytest.raises(ValueError, match=r"encoder_identity is eeee.*built with another encoder; give that one"):
        load_retriever(folder, tmp_path)


def test_a_folder_without_a_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no memory"):
        load_retriever(tmp_path)
