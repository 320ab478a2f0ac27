"""Kinds of index follow from size and settings, and settings that can not act are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from mixmodal.retrieval.index import IndexConfig, add_vectors, build_settings, index_bytes, new_index


def test_the_kind_follows_from_the_size() -> None:
    kinds = [build_settings(IndexConfig(), 512, count)["kind"] for count in (100_000, 100_001, 5_000_001)]
    assert kinds == ["flat", "hnsw", "ivf_pq"]
    flat = {"kind": "flat"}
    assert build_settings(IndexConfig(), 512, 200_000, flat) == flat
    learned = build_settings(IndexConfig(kind="ivf_pq"), 512, 1_000_000)
    assert learned == {"kind": "ivf_pq", "seed": 0, "lists": 65536 // 39, "code_bytes": 64}
    assert build_settings(IndexConfig(kind="ivf_pq"), 30, 1_000_000)["code_bytes"] == 3
    assert build_settings(IndexConfig(), 512, 9_000_000, learned) == learned
    assert index_bytes(flat, 512, 1_000_000) == 2_048_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tree"}, "index.kind is 'tree'; choose one of auto, flat, hnsw, ivf_pq"),
        ({"hnsw_links": 1}, "index.hnsw_links is 1; it must be at least 2"),
        ({"num_threads": 0}, "index.num_threads is 0; it must be at least 1"),
        ({"seed": -1}, "index.seed is -1; it must be at least 0"),
        ({"kind": "flat", "hnsw_links": 8}, "index.hnsw_links can not act where index.kind is flat"),
        ({"kind": "hnsw", "ivf_probes": 8}, "index.ivf_probes can not act where index.kind is hnsw"),
        ({"kind": "hnsw", "pq_bytes": 8}, "index.pq_bytes can not act where index.kind is hnsw"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexConfig(**options)


def build_graph(seed: int) -> Any:
    rows = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    settings = build_settings(IndexConfig(kind="hnsw", hnsw_links=4, seed=seed), 8, 600)
    index = new_index(settings, 8, lambda most: rows[:most], 600)
    for start in (0, 300):
        add_vectors(index, rows[start : start + 300], settings, 1)
    return index


def test_levels_of_a_graph_are_drawn_from_the_seed_and_differ_between_parts() -> None:
    graphs = [build_graph(seed) for seed in (0, 0, 1)]  # the levels live as long as their graph
    levels = [faiss.vector_to_array(graph.hnsw.levels).tolist() for graph in graphs]
    assert levels[0] == levels[1] != levels[2]
    assert levels[0][:300] != levels[0][300:]


def test_a_graph_is_built_with_the_threads_asked_for() -> None:
    before, seen = faiss.omp_get_max_threads(), []
    index = SimpleNamespace(hnsw=SimpleNamespace(), ntotal=0, add=lambda _: seen.append(faiss.omp_get_max_threads()))
    add_vectors(index, np.zeros((1, 8), np.float32), {"kind": "hnsw", "seed": 0}, before + 2)
    assert seen == [before + 2]
    assert faiss.omp_get_max_threads() == before


def test_learned_codes_need_enough_documents_and_bytes_that_divide() -> None:
    for options, count, message in (
        ({}, 200, "ivf_pq needs at least 256 documents; for 200 take flat"),
        ({"pq_bytes": 5}, 1200, r"index\.pq_bytes is 5; it must divide the 32 dimensions"),
        ({"ivf_lists": 5000}, 1200, r"index\.ivf_lists is 5000; of 1200 documents no more"),
    ):
        with pytest.raises(ValueError, match=message):
            build_settings(IndexConfig(kind="ivf_pq", **options), 32, count)
