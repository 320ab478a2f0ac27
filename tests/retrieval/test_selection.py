"""What is retrieved is near, never the document itself or its near-duplicates, and drawn from the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.index import IndexConfig
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, TOKEN_KEYS, Memory, open_memory
from mixmodal.retrieval.selection import (
    BOTH,
    CM3LEON,
    RA_CM3,
    Candidates,
    DrawConfig,
    SelectionConfig,
    choose,
    draw,
    drop_words,
    select,
)

DIM = 16
ENCODER = "e" * 64
TOKENS = {**dict.fromkeys(TOKEN_KEYS, "t" * 64), "num_variants": 1}


def at(*angles: float) -> np.ndarray:
    """Unit vectors in a plane, float32 `(n, 2)`, by their angle in degrees: their products are cosines."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def chosen(angles: list[float], modalities: list[int] | None = None, query: float = 0, **options: object) -> list[int]:
    """Which places of documents at these angles are chosen for a query; scores are found as a search gives them."""
    vectors = at(*angles)
    scores = (vectors @ at(query)[0]).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    kinds = np.asarray(modalities or [BOTH] * len(angles), np.uint8)
    config = options.pop("config", SelectionConfig(num_candidates=3))
    assert isinstance(config, SelectionConfig)
    return choose(order, scores[order], vectors[order], kinds[order], config, **options).tolist()  # type: ignore[arg-type]


def test_the_relevance_limit_is_a_ceiling() -> None:
    # cos 25 = 0.906, cos 26 = 0.899
    assert chosen([0, 25, 26, 60]) == [2, 3]
    assert chosen([0, 25, 60], config=SelectionConfig(max_score=0.95)) == [1, 2]


def test_chosen_documents_are_no_near_duplicates_of_each_other() -> None:
    assert chosen([30, 32, -30, 60, -66]) == [0, 2, 3]
    assert chosen([30, 32, 50, -50], taken=at(31)) == [3]


def test_documents_with_text_and_image_come_first() -> None:
    angles = [30.0, -40.0, 70.0, -80.0]
    modalities = [HAS_TEXT, BOTH, HAS_IMAGE, BOTH]
    assert chosen(angles, modalities) == [1, 3, 0]
    assert chosen(angles, modalities, config=SelectionConfig(num_candidates=3, prefer_both=False)) == [0, 1, 2]
    assert chosen(angles, modalities, config=SelectionConfig(num_candidates=1)) == [1]


def test_the_own_document_and_what_is_near_it_is_never_chosen() -> None:
    # the query, as a text's vector, lies apart from its document at 40
    angles = [40.0, 42.0, 20.0, -30.0, 70.0]
    assert chosen(angles, own=0, own_vector=at(40)[0]) == [3, 4]
    assert 0 not in chosen(angles, own=0)
    assert chosen(angles) == [3, 0, 4]


def test_places_without_a_document_are_passed_by() -> None:
    numbers, scores = np.array([4, -1, -1]), np.float32([0.5, -np.inf, -np.inf])
    found = choose(numbers, scores, at(60, 0, 0), np.uint8([BOTH, BOTH, BOTH]), SelectionConfig())
    assert found.tolist() == [4]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def build(folder: Path, rows: np.ndarray, kind: str = "flat") -> Memory:
    entries = [MemoryDocument(str(number), BOTH, number, [np.array([number])]) for number in range(len(rows))]
    write_memory(
        folder,
        entries,
        lambda found: rows[found],
        encoder_identity=ENCODER,
        dim=rows.shape[1],
        tokens=TOKENS,
        encoder="e",
        index=IndexConfig(kind=kind),  # type: ignore[arg-type]
    )
    return open_memory(folder, encoder_identity=ENCODER)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_planted_duplicate_of_every_query_is_never_retrieved(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    count = 200
    documents = unit(rng.normal(size=(20, DIM))[rng.integers(20, size=count)] + 0.8 * rng.normal(size=(count, DIM)))
    planted = unit(documents + 0.02 * rng.normal(size=documents.shape))
    rows = np.concatenate([documents, planted])
    memory = build(tmp_path, rows, kind)
    # as texts and pictures do, queries lie apart from the vector of their document, below the ceiling
    texts, images = (unit(documents + 0.25 * rng.normal(size=documents.shape)) for _ in range(2))
    nearest = memory.search(texts, 2).numbers
    assert np.mean([{number, number + count} == set(row) for number, row in enumerate(nearest.tolist())]) > 0.3
    assert np.mean((texts * planted).sum(axis=1) < 0.9) > 0.3
    config = SelectionConfig(num_candidates=2)
    found = select(memory, config, text_queries=texts, image_queries=images, own=range(count)).numbers
    sizes = []
    for number, candidates in enumerate(found):
        pool = candidates[candidates >= 0]
        assert not {number, number + count} & set(pool.tolist())
        assert (memory.vectors(pool) @ documents[number] <= 0.9).all()
        among = memory.vectors(pool) @ memory.vectors(pool).T - np.eye(len(pool))
        assert (among <= 0.9).all()
        sizes.append(len(pool))
    assert np.mean(sizes) > 3.5


def test_candidates_of_one_query_and_without_an_own_document(tmp_path: Path) -> None:
    rows = at(0, 40, -40, 80)
    memory = build(tmp_path, rows)
    config = SelectionConfig(max_score=1.0)
    (found,) = select(memory, config, text_queries=at(10), image_queries=None).numbers
    assert found.tolist() == [[0, 1], [-1, -1]]
    (found,) = select(memory, config, text_queries=at(10), image_queries=at(10), own=[1]).numbers
    assert 1 not in found
    assert 0 in found
    for queries, own in (((None, None), None), ((at(1, 2), at(1)), None), ((at(1), None), [0, 1])):
        with pytest.raises(ValueError, match=r"different numbers .* or no queries"):
            select(memory, config, text_queries=queries[0], image_queries=queries[1], own=own)


def test_the_ceiling_is_judged_by_the_whole_document_not_by_the_query(tmp_path: Path) -> None:
    # two near-duplicates of the own document, with products just above and below the ceiling, far from the query
    own, query = np.eye(DIM, dtype=np.float32)[:2]
    rows = [own, *(score * own + (1 - score**2) ** 0.5 * np.eye(DIM)[2 + n] for n, score in enumerate((0.901, 0.899)))]
    memory = build(tmp_path, unit(np.stack([*rows, np.eye(DIM)[5]])))
    given = {"text_queries": query[None], "image_queries": None}
    config = SelectionConfig(num_candidates=3)
    found = select(memory, config, **given, own_vectors=own[None]).numbers[0]
    assert sorted(found[0].tolist()) == [-1, 2, 3]
    assert found[1].tolist() == [-1, -1, -1]
    assert select(memory, config, **given).numbers[0, 0].tolist() == [0, 2, 3]  # the second is too near to the first


def test_a_batch_is_chosen_as_its_documents_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(10, DIM))[rng.integers(10, size=150)] + 0.6 * rng.normal(size=(150, DIM)))
    memory = build(tmp_path, np.concatenate([rows, rows]))  # ties of every document with its copy
    texts, images = (unit(rows[:40] + 0.3 * rng.normal(size=(40, DIM))) for _ in range(2))
    asks = rng.random((40, 2)) < 0.7
    unread = np.where(asks[:, :1], texts, np.nan), np.where(asks[:, 1:], images, np.nan)

    def refuse(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return numbers % 7 == rows[:, None] % 7

    for depth, ceiling in ((64, 0.9), (64, 1.0), (5, 0.9), (300, 0.8)):
        config = SelectionConfig(search_depth=depth, max_score=ceiling)
        options = {"own_vectors": rows[:40], "asks": asks}
        whole = select(memory, config, text_queries=unread[0], image_queries=unread[1], refuse=refuse, **options)
        for row in range(40):
            at = slice(row, row + 1)
            one = select(
                memory,
                config,
                text_queries=unread[0][at],
                image_queries=unread[1][at],
                refuse=lambda _, numbers, row=row: refuse(np.array([row]), numbers),
                **{key: value[at] for key, value in options.items()},
            )
            assert one.numbers.tolist() == whole.numbers[at].tolist()
            assert np.array_equal(one.scores, whole.scores[at])
        found = whole.numbers[whole.numbers >= 0]
        assert len(found) > 20
        assert not (whole.numbers >= 0)[~asks].any()
        assert np.isneginf(whole.scores[whole.numbers < 0]).all()
        rest = (np.arange(40) % 7)[:, None, None]
        assert not ((whole.numbers % 7 == rest) & (whole.numbers >= 0)).any()
        pools = [row[row >= 0].tolist() for row in whole.numbers.reshape(40, -1)]
        assert all(len(set(pool)) == len(pool) for pool in pools)


def test_a_fifth_of_the_words_is_dropped() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(f"word{number}" for number in range(2000))
    kept = drop_words(text, 0.2, rng).split()
    assert len(kept) == pytest.approx(1600, abs=60)  # three standard deviations are 54
    assert kept == [word for word in text.split() if word in set(kept)]
    assert drop_words(text, 0.2, np.random.default_rng(0)).split() == kept
    assert drop_words("a  red\napple", 0.0, rng) == "a red apple"
    with pytest.raises(ValueError, match=r"share of dropped words is 1\.0"):
        drop_words("red apple", 1.0, rng)
    assert {drop_words("red apple", 0.999, rng) for _ in range(50)} == {"red", "apple"}
    assert drop_words("", 0.2, rng) == ""


def generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(entropy or 0)


POOL = Candidates(np.array([10, 11]), np.array([20, 21]))


def test_ra_cm3_draws_up_to_two_documents_of_one_query() -> None:
    drawn = [draw(POOL, RA_CM3, generator(number)).tolist() for number in range(600)]
    for count in (0, 1, 2):
        assert sum(len(found) == count for found in drawn) == pytest.approx(200, abs=40)
    assert {tuple(sorted(found)) for found in drawn if len(found) == 2} == {(10, 11), (20, 21)}
    assert {found[0] for found in drawn if len(found) == 1} == {10, 11, 20, 21}


def test_cm3leon_draws_three_of_the_pool() -> None:
    drawn = [draw(POOL, CM3LEON, generator(number)).tolist() for number in range(200)]
    assert all(len(set(found)) == 3 for found in drawn)
    assert {tuple(sorted(found)) for found in drawn} == {(10, 11, 20), (10, 11, 21), (10, 20, 21), (11, 20, 21)}


def test_a_draw_follows_from_its_generator() -> None:
    drawn = [
        [draw(POOL, CM3LEON, generator(*key, number)).tolist() for number in range(20)] for key in ((1,), (1,), (2,))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(found) for found in drawn[0]}) > 5


def test_fewer_candidates_are_all_taken_and_an_empty_query_is_not_drawn() -> None:
    none = np.empty(0, np.int64)
    two = DrawConfig(counts=(2,))
    assert draw(Candidates(none, none), CM3LEON, generator()).tolist() == []
    assert draw(Candidates(none, none), two, generator()).tolist() == []
    for number in range(10):
        assert draw(Candidates(none, np.array([7])), two, generator(number)).tolist() == [7]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SelectionConfig, {"num_candidates": 0}, "num_candidates is 0; it must be at least 1"),
        (SelectionConfig, {"max_score": 1.5}, r"max_score is 1\.5"),
        (SelectionConfig, {"search_depth": 1}, "search_depth is 1; it must be at least num_candidates, 2"),
        (DrawConfig, {"counts": ()}, r"draw\.counts is \(\)"),
        (DrawConfig, {"counts": (0, -1)}, r"draw\.counts is \(0, -1\)"),
        (DrawConfig, {"queries": "both"}, r"draw\.queries is 'both'; choose one or all"),
    ],
)
def test_settings_out_of_range_are_refused(config: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)
