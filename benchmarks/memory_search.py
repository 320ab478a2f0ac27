"""A retrieval memory: time to build its index, time and resident memory of queries, recall@10 against the flat index.

    python benchmarks/memory_search.py [--documents 1000000] [--dim 512] [--kinds flat hnsw ivf_pq] [--folder DIR]

Vectors lie in clusters of 100 on average: a random direction and noise, such that two of a cluster have a product of
0.7 and two of different ones 0, and queries are drawn likewise, so that neighbours within a cluster are hard to tell
apart. Building and querying run in processes of their own; files are in the page cache where it holds them. The disk
takes twice the vectors. `--link_threads` above 1 makes graphs that differ from run to run, and builds them faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import record

from mixmodal.environment import num_cores
from mixmodal.retrieval.building import MemoryDocument, MemoryWriter, write_memory
from mixmodal.retrieval.index import IndexConfig
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, TOKEN_KEYS, open_memory

NEIGHBOURS = 10
NOISE = (1 / 0.7 - 1) ** 0.5
CLUSTER = 100
NAMES: dict[str, Any] = {
    "encoder_identity": "benchmark",
    "encoder": "benchmark",
    "tokens": {**dict.fromkeys(TOKEN_KEYS, "none"), "num_variants": 1},
}
SEARCHED_ALONE = 100
"""Queries that are timed one by one."""


class Queried(NamedTuple):
    """What one process measured: milliseconds a query, alone and in a batch, for each repeat; bytes; what it found."""

    alone_ms: list[float]
    batch_ms: list[float]
    resident_bytes: int
    numbers: np.ndarray


def draw_vectors(contents: list[tuple[int, int]], num_clusters: int, dim: int) -> np.ndarray:
    """Vectors of (stream, number), float32 `(n, dim)` of length 1: the same for the same numbers in any batch."""
    rows = np.empty((len(contents), dim), np.float32)
    for row, (stream, number) in zip(rows, contents):
        rng = np.random.default_rng((stream, number))
        centre = np.random.default_rng((2, int(rng.integers(num_clusters)))).standard_normal(dim, np.float32)
        row[:] = centre + NOISE * rng.standard_normal(dim, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def build(folder: Path, num_documents: int, dim: int, config: IndexConfig) -> tuple[float, int]:
    """Seconds for the index over parts that are there, and the memory that it takes at its highest, bytes."""
    import faiss  # noqa: F401  # libraries are not counted
    import torch  # noqa: F401

    writer = MemoryWriter(folder, dim=dim, **NAMES)
    assert sum(part["documents"] for part in writer.parts) == num_documents
    before = memory_bytes("VmRSS")
    started = time.perf_counter()
    writer.finish(config)
    return time.perf_counter() - started, memory_bytes("VmHWM") - before


def query(folder: Path, queries: np.ndarray, repeats: int) -> Queried:
    """Searches all queries at once, and the first ones alone."""
    import faiss  # noqa: F401  # libraries are not counted
    import torch  # noqa: F401

    before = memory_bytes("VmRSS")
    memory = open_memory(folder, encoder_identity="benchmark", verify=False)
    numbers = memory.search(queries, NEIGHBOURS).numbers
    alone, batch = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        memory.search(queries, NEIGHBOURS)
        batch.append(1000 * (time.perf_counter() - started) / len(queries))
        started = time.perf_counter()
        for row in queries[:SEARCHED_ALONE]:
            memory.search(row[None], NEIGHBOURS)
        alone.append(1000 * (time.perf_counter() - started) / len(queries[:SEARCHED_ALONE]))
    return Queried(alone, batch, memory_bytes("VmRSS") - before, numbers)


def memory_bytes(field: str) -> int:
    """Resident memory of this process, pages of mapped files among it: now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that were found."""
    return float(np.mean([len(set(ours) & set(wanted)) / len(wanted) for ours, wanted in zip(found, exact)]))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Builds and queries each kind over the same vectors; the flat one first, which is what the others are held to."""
    clusters = max(1, options.documents // CLUSTER)
    embed = partial(draw_vectors, num_clusters=clusters, dim=options.dim)
    shape: dict[str, Any] = {"documents": options.documents, "dim": options.dim}
    ids = np.arange(2)  # the tokens, which are not measured
    documents = (MemoryDocument(str(n), HAS_TEXT | HAS_IMAGE, (0, n), [ids]) for n in range(options.documents))
    flat = IndexConfig(kind="flat")
    started = time.perf_counter()
    write_memory(folder, documents, embed, dim=options.dim, index=flat, **NAMES)
    print(f"{options.documents:,} vectors of {options.dim} in {time.perf_counter() - started:.0f} s")
    queries = embed([(1, n) for n in range(options.queries)])
    exact = in_process(query, folder, queries, 1).numbers
    for kind in options.kinds:
        searched = {
            "hnsw": {"hnsw_search_width": options.width},
            "ivf_pq": {"ivf_probes": options.probes, "ivf_rerank": options.rerank},
        }
        config = IndexConfig(kind=kind, num_threads=options.link_threads, seed=1, **searched.get(kind, {}))
        seconds, peak = in_process(build, folder, options.documents, options.dim, config)
        found = in_process(query, folder, queries, options.repeats)
        settings = {**shape, **vars(config), "queries": options.queries, "threads": num_cores()}
        name = f"{kind}, {options.documents:,} vectors of {options.dim}"
        add = partial(record, "memory", device_kind="cpu", config=settings)
        if kind != "flat":  # it is there already
            add(f"{name}: index built", repeats=[seconds], unit="s")
            add(f"{name}: peak memory of building", repeats=[peak / 1e6], unit="MB")
        add(f"{name}: query alone", repeats=found.alone_ms, unit="ms")
        add(f"{name}: query in a batch", repeats=found.batch_ms, unit="ms")
        add(f"{name}: resident memory of queries", repeats=[found.resident_bytes / 1e6], unit="MB")
        add(f"{name}: recall@{NEIGHBOURS}", repeats=[recall(found.numbers, exact)], unit="of the flat index")


def in_process(function: Any, *arguments: Any) -> Any:
    """What a function gives in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=("flat", "hnsw", "ivf_pq"), default=["flat", "hnsw", "ivf_pq"])
    parser.add_argument("--width", type=int, default=IndexConfig.hnsw_search_width, help="hnsw_search_width")
    parser.add_argument("--probes", type=int, default=IndexConfig.ivf_probes, help="ivf_probes")
    parser.add_argument("--rerank", type=int, default=IndexConfig.ivf_rerank, help="ivf_rerank")
    parser.add_argument("--link_threads", type=int, default=num_cores(), help="threads that build a graph")
    parser.add_argument("--folder", type=Path, help="for the files, in the place of the system's for temporary ones")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        measure(given, Path(name))
