"""A memory finds what is nearest, is built whole or not at all, and refuses what does not belong to it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.retrieval import index as index_module
from mixmodal.retrieval.building import MemoryDocument, MemoryWriter, write_memory
from mixmodal.retrieval.index import IndexConfig
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, TOKEN_KEYS, open_memory

DIM = 32
ENCODER = "e" * 64
TOKENS = {**dict.fromkeys(TOKEN_KEYS, "t" * 64), "num_variants": 2}
GIVEN: dict[str, Any] = {"encoder_identity": ENCODER, "dim": DIM, "tokens": TOKENS, "encoder": "org/clip"}
CONFIGS = {
    "flat": IndexConfig(kind="flat"),
    "hnsw": IndexConfig(kind="hnsw", hnsw_links=8, hnsw_build_width=32, hnsw_search_width=48),
    "ivf_pq": IndexConfig(kind="ivf_pq", ivf_lists=16, ivf_probes=6, ivf_rerank=60, pq_bytes=8, max_train_vectors=600),
}


def clustered(count: int, seed: int = 0, clusters: int = 40) -> np.ndarray:
    """Unit vectors about random centres, float32 `(count, DIM)`."""
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(99).normal(size=(clusters, DIM))[rng.integers(clusters, size=count)]
    rows = rows + 0.5 * rng.normal(size=(count, DIM))
    return unit(rows)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


VECTORS = clustered(1200)
QUERIES = unit(clustered(40, seed=1) + clustered(40, seed=2))
"""They lie between two clusters, so that no single list holds what is nearest."""


def documents(count: int) -> list[MemoryDocument]:
    kinds = (HAS_TEXT, HAS_IMAGE, HAS_TEXT | HAS_IMAGE)
    return [MemoryDocument(f"key {number}", kinds[number % 3], number, spell(number)) for number in range(count)]


def spell(number: int) -> list[np.ndarray]:
    """Tokens of both variants; from the second part on they need 32 bits."""
    return [np.arange(number % 5 + 1) + 140 * number, np.array([number])]


def embed(contents: Sequence[int]) -> np.ndarray:
    return VECTORS[np.asarray(contents)]


def write(folder: Path, count: int = len(VECTORS), kind: str = "flat", **options: Any) -> None:
    given = {**GIVEN, "index": CONFIGS[kind], "part_documents": 500, "batch_size": 64}
    write_memory(folder, documents(count), **{"embed": embed, **given, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CONFIGS}
    for kind, folder in folders.items():
        write(folder, kind=kind)
    return folders


@pytest.fixture
def copy(built: dict[str, Path], tmp_path: Path) -> Path:
    """A memory that may be broken."""
    return Path(shutil.copytree(built["flat"], tmp_path / "copy"))


# what it finds


@pytest.mark.parametrize("mapped", [True, False])
def test_flat_is_the_brute_force_product(built: dict[str, Path], mapped: bool) -> None:
    memory = open_memory(built["flat"], encoder_identity=ENCODER, mapped=mapped)
    found = memory.search(QUERIES, 10)
    products = QUERIES.astype(np.float64) @ VECTORS.astype(np.float64).T
    wanted = np.argsort(-products, axis=1)[:, :10]
    assert np.array_equal(found.numbers, wanted)
    assert np.abs(found.scores - np.take_along_axis(products, wanted, 1)).max() < 1e-6


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.95), ("ivf_pq", 0.95)])  # seen: 0.988, 0.983
def test_other_kinds_find_nearly_all_of_it_with_exact_scores(
    built: dict[str, Path], kind: str, least: float, mapped: bool
) -> None:
    wanted = open_memory(built["flat"], encoder_identity=ENCODER).search(QUERIES, 10).numbers
    found = open_memory(built[kind], encoder_identity=ENCODER, mapped=mapped).search(QUERIES, 10)
    recall = np.mean([len(set(ours) & set(exact)) / 10 for ours, exact in zip(found.numbers, wanted)])
    assert recall >= least
    products = np.einsum("qd,qkd->qk", QUERIES.astype(np.float64), VECTORS[found.numbers].astype(np.float64))
    assert np.abs(found.scores - products).max() < 1e-6  # worst seen 9e-8
    assert (np.diff(found.scores) <= 0).all()


def test_documents_are_those_written(built: dict[str, Path]) -> None:
    memory = open_memory(built["flat"], encoder_identity=ENCODER)
    assert len(memory) == len(VECTORS)
    assert [memory.keys[number] for number in (0, 499, 500, -1)] == ["key 0", "key 499", "key 500", "key 1199"]
    assert memory.modalities.tolist() == [entry.modalities for entry in documents(len(VECTORS))]
    numbers = [1199, 0, 500, 0]
    assert np.array_equal(memory.vectors(numbers), VECTORS[numbers])
    assert memory.vectors([]).shape == (0, DIM)
    for number in (-1, len(VECTORS)):
        with pytest.raises(IndexError, match="no document"):
            memory.vectors([number])


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_fewer_documents_than_asked_for_leave_places_empty(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 3, kind)
    found = open_memory(tmp_path, encoder_identity=ENCODER).search(QUERIES[:2], 5)
    assert found.numbers.shape == (2, 5)
    assert {-1} == set(found.numbers[:, 3:].ravel().tolist())
    assert np.isneginf(found.scores[:, 3:]).all()
    assert sorted(found.numbers[0, :3].tolist()) == [0, 1, 2]


def test_queries_that_are_no_unit_vectors_are_refused(built: dict[str, Path]) -> None:
    memory = open_memory(built["flat"], encoder_identity=ENCODER)
    for queries, message in (
        (QUERIES[:, :5], r"queries of shape \(40, 5\); .* has vectors of 32 dimensions"),
        (QUERIES[0], r"queries of shape \(32,\)"),
        (np.concatenate([QUERIES[:2], 0 * QUERIES[:1]]), "query 2: the vector has length 0 instead of 1"),
        (np.full((1, DIM), np.nan, np.float32), "query 0: the vector holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.search(queries, 3)
    with pytest.raises(ValueError, match="k is 0"):
        memory.search(QUERIES, 0)


# how it is built


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_build_that_broke_off_ends_as_one_that_did_not(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    seen: list[int] = []

    def failing(contents: Sequence[int]) -> np.ndarray:
        if contents[0] >= 640:
            raise RuntimeError("power cut")
        seen.extend(contents)
        return embed(contents)

    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path, kind=kind, embed=failing)
    with pytest.raises(ValueError, match=r"manifest\.json: the index covers 0 of 500 documents, so the job broke off"):
        open_memory(tmp_path, encoder_identity=ENCODER)
    seen.clear()

    def watched(contents: Sequence[int]) -> np.ndarray:
        seen.extend(contents)
        return embed(contents)

    write(tmp_path, kind=kind, embed=watched)
    assert seen == list(range(500, len(VECTORS)))
    assert contents(tmp_path) == contents(built[kind])
    seen.clear()
    write(tmp_path, kind=kind, embed=watched)
    assert not seen
    assert contents(tmp_path) == contents(built[kind])


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_adding_finds_what_building_at_once_finds(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write(tmp_path, 500, kind)
    (first,) = tmp_path.glob("index_*.faiss")
    added: list[int] = []
    real = index_module.add_vectors
    monkeypatch.setattr(
        "mixmodal.retrieval.building.add_vectors",
        lambda index, vectors, *rest: (added.append(len(vectors)), real(index, vectors, *rest)),
    )
    write(tmp_path, kind=kind)
    assert added == [500, 200]  # nothing of the earlier ones
    assert not first.exists()
    ours, theirs = (
        open_memory(folder, encoder_identity=ENCODER).search(QUERIES, 10) for folder in (tmp_path, built[kind])
    )
    assert np.array_equal(ours.numbers, theirs.numbers)
    assert np.array_equal(ours.scores, theirs.scores)


def test_learned_lists_take_further_documents(tmp_path: Path) -> None:
    write(tmp_path, 700, "ivf_pq")
    write(tmp_path, kind="ivf_pq", index=IndexConfig(kind="auto", ivf_probes=16, ivf_rerank=200))
    memory = open_memory(tmp_path, encoder_identity=ENCODER)
    build = memory.manifest["index"]["build"]
    assert (build["lists"], build["code_bytes"]) == (16, 8)
    found = memory.search(VECTORS[[5, 699, 700, 1199]], 1)
    assert found.numbers[:, 0].tolist() == [5, 699, 700, 1199]


def test_a_short_last_part_stays_and_new_documents_follow_it(tmp_path: Path) -> None:
    write(tmp_path, 700)
    write(tmp_path, 900)
    memory = open_memory(tmp_path, encoder_identity=ENCODER)
    assert [part["documents"] for part in memory.manifest["parts"]] == [500, 200, 200]
    assert np.array_equal(memory.vectors(range(900)), VECTORS[:900])


def test_contents_are_not_asked_for_where_documents_are_there(copy: Path) -> None:
    def never() -> int:
        raise AssertionError("asked for a document that is there")

    entries = [document._replace(content=never) for document in documents(len(VECTORS))]
    entries.append(MemoryDocument("new", HAS_TEXT, lambda: 3, spell(0)))
    write_memory(copy, entries, embed, **GIVEN)
    found = open_memory(copy, encoder_identity=ENCODER).search(VECTORS[[3]], 2)
    assert sorted(found.numbers[0].tolist()) == [3, len(VECTORS)]


def test_other_documents_than_those_there_are_refused(copy: Path) -> None:
    before = contents(copy)
    swapped = [*documents(2)[::-1], *documents(len(VECTORS))[2:]]
    for given in (swapped, documents(700), documents(500), documents(1100)):
        with pytest.raises(ValueError, match=r"part_0000\d holds other documents than those given"):
            write_memory(copy, given, embed, **GIVEN)
    assert contents(copy) == before


def test_a_damaged_part_is_written_again_by_the_same_job(copy: Path, built: dict[str, Path]) -> None:
    path = copy / "part_00001.vectors.npy"
    path.write_bytes(path.read_bytes()[:-8])
    (copy / "part_00002.keys.npy").unlink()
    write(copy)
    assert contents(copy) == contents(built["flat"])


def test_an_index_over_vectors_that_came_out_otherwise_is_built_again(copy: Path) -> None:
    (copy / "part_00001.vectors.npy").unlink()
    write(copy, embed=lambda contents: -embed(contents))
    found = open_memory(copy, encoder_identity=ENCODER).search(np.stack([VECTORS[3], -VECTORS[600]]), 1)
    assert found.numbers[:, 0].tolist() == [3, 600]
    assert found.scores[:, 0] == pytest.approx([1, 1])


def test_a_damaged_index_is_built_again(copy: Path) -> None:
    (path,) = copy.glob("index_*.faiss")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"index_00001\.faiss: changed since it was written .*index again"):
        open_memory(copy, encoder_identity=ENCODER)
    write(copy)
    assert np.array_equal(open_memory(copy, encoder_identity=ENCODER).search(VECTORS[:9], 1).numbers[:, 0], range(9))


def test_settings_of_the_search_change_without_a_build(built: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built["hnsw"], tmp_path / "copy"))
    (before,) = folder.glob("index_*.faiss")
    write(folder, kind="hnsw", index=IndexConfig(kind="hnsw", hnsw_links=8, hnsw_build_width=32, hnsw_search_width=7))
    assert open_memory(folder, encoder_identity=ENCODER).manifest["index"]["search"] == {"width": 7}
    assert before.exists()
    write(folder, kind="hnsw", index=IndexConfig(kind="hnsw", hnsw_links=4))
    assert not before.exists()


# bad input


def test_vectors_that_are_none_name_the_document_and_nothing_is_written(tmp_path: Path) -> None:
    for wrong, message in (
        (np.nan, "document 'key 7': the vector holds NaN or infinity; its part was not written"),
        (np.inf, "document 'key 7': the vector holds NaN or infinity"),
        (0.5, r"document 'key 7': the vector has length 0\.5\d* instead of 1"),
    ):
        vectors = VECTORS.copy()
        vectors[7] = vectors[7] * 0 if wrong != 0.5 else vectors[7] / 2
        vectors[7, 3] += 0 if wrong == 0.5 else wrong
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "new", embed=lambda contents, vectors=vectors: vectors[np.asarray(contents)])
        assert not (tmp_path / "new").exists()


def test_documents_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = MemoryWriter(tmp_path / "new", **GIVEN)
    for keys, rows, modalities, message in (
        (["a"], VECTORS[:1, :7], [1], r"vectors of shape \(1, 7\)"),
        (["a", "b"], VECTORS[:1], [1, 1], r"2 documents with vectors of shape \(1, 32\)"),
        (["a"], VECTORS[:1], [0], "document 'a' has neither text nor image"),
        (["a"], VECTORS[:1], [4], "document 'a' has neither text nor image"),
        ([], VECTORS[:0], [], "a part without documents"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write_part(0, keys, rows, modalities, [spell(1)] * len(keys))
    with pytest.raises(ValueError, match="there are no documents, so there is no memory to build"):
        write(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


def test_another_encoder_is_refused_by_reader_and_writer(copy: Path) -> None:
    before = contents(copy)
    message = r"manifest\.json: encoder_identity is e{12}\.\.\., not f{12}\.\.\.: the memory was built with another"
    with pytest.raises(ValueError, match=message):
        open_memory(copy, encoder_identity="f" * 64)
    with pytest.raises(ValueError, match=message):
        write(copy, encoder_identity="f" * 64)
    with pytest.raises(ValueError, match="the memory has vectors of 32 dimensions, not 16"):
        write(copy, dim=16)
    assert len(open_memory(copy, encoder_identity=None)) == len(VECTORS)
    assert contents(copy) == before


def test_missing_and_changed_files_are_named(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path.name}: (no such file|missing)"):
            open_memory(copy, encoder_identity=ENCODER)
        if path.suffix != ".json":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(ValueError, match=rf"{path.name}: changed since it was written"):
                open_memory(copy, encoder_identity=ENCODER)
        path.write_bytes(whole)
    open_memory(copy, encoder_identity=ENCODER)


def test_empty_and_foreign_folders_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/manifest\.json: no such file, so .* holds no memory"):
        open_memory(tmp_path / "nowhere", encoder_identity=ENCODER)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_bytes())
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda found: found.update(parts=[], index=None), "the memory is empty; index again"),
        (lambda found: found.update(format_version=9), "format_version is 9, this version reads 2"),
        (lambda found: found.pop("dim"), r"not the manifest of a memory \(the key dim is missing\)"),
        (lambda found: found.clear(), "not the manifest of a memory"),
        (lambda found: found.update(parts=None, tokens=None), "not the manifest of a memory"),
        (
            lambda found: found["parts"][0].pop("sha256"),
            r"not the manifest of a memory \(KeyError\('sha256'\)\); index",
        ),
    ]
    for change, message in changes:
        found = json.loads(json.dumps(manifest))
        change(found)
        path.write_text(json.dumps(found))
        with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
            open_memory(copy, encoder_identity=ENCODER)
    path.write_text("[1")
    with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of a memory"):
        write(copy)


def test_an_index_larger_than_memory_is_mapped_or_refused_with_the_number(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "free_memory_bytes", lambda: 1000)
    (path,) = copy.glob("index_*.faiss")
    size = f"{path.stat().st_size:,}"
    with pytest.raises(
        ValueError, match=rf"{path.name} takes {size} bytes of memory, and 1,000 are free; open it with"
    ):
        open_memory(copy, encoder_identity=ENCODER, mapped=False)
    assert open_memory(copy, encoder_identity=ENCODER, mapped=True).search(VECTORS[:1], 1).numbers == [[0]]
    with pytest.raises(
        ValueError, match="an index flat of 1,200 documents takes 153,600 bytes of memory, and 1,000 are"
    ):
        write(tmp_path / "new")
    assert not list((tmp_path / "new").glob("index_*"))


def test_without_faiss_the_extra_is_named(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"needs faiss: pip install 'mixmodal\[retrieval\]'"):
        open_memory(built["flat"], encoder_identity=ENCODER)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["part_00002.vectors.npy", "index_00001.faiss"])
def test_a_full_disk_names_the_file_and_keeps_what_is_whole(built: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"'.*{re.escape(name)}'") as caught:
        write(tmp_path)
    assert caught.value.filename == str(tmp_path / name)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert not (tmp_path / name).exists()
    write(tmp_path)
    assert contents(tmp_path) == contents(built["flat"])
