"""Nearest neighbours by faiss: the kinds of index, what they take, and that they are built the same each time.

All of them compare unit vectors by inner product. `flat` compares with every vector; `hnsw` walks a graph (arXiv
1603.09320); `ivf_pq` keeps a few bytes a vector (IEEE TPAMI 33(1), 2011) and leaves the last choice to exact products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixmodal.environment import free_memory_bytes
from mixmodal.extras import import_extra
from mixmodal.files import replacing

IndexKind = Literal["auto", "flat", "hnsw", "ivf_pq"]

KINDS = ("auto", "flat", "hnsw", "ivf_pq")
MAX_FLAT, MAX_HNSW = 100_000, 5_000_000
"""Documents up to which `auto` takes these kinds."""
NUM_CENTROIDS = 256
"""Of each byte of a product quantizer, so also the least number of vectors that it can learn from."""
OWNERS = {"hnsw": "hnsw", "ivf": "ivf_pq", "pq": "ivf_pq"}
"""Kinds by how the names of their options begin."""
VECTORS_PER_LIST = 39
"""Least number of training vectors for a list, as faiss advises."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How documents are found.

    Args:
        kind: `flat` compares a query with every vector, `hnsw` walks a graph that stands in memory beside the vectors,
            `ivf_pq` has a few bytes a vector; `auto` takes the first up to 100,000 documents, the second up to
            5,000,000, and stays with the kind of an index that is there.
        seed: of the graph's levels and of what is learned.
        num_threads: that build a graph; with more than one it comes out otherwise each time.
        hnsw_links: neighbours of a vector in the graph, on each of its levels.
        hnsw_build_width: candidates that are held while a vector is linked.
        hnsw_search_width: candidates that are held while a query is answered: more are slower and find more.
        ivf_lists: lists that the vectors are divided into; null takes 4 times the root of the number of documents.
        ivf_probes: lists that a query is compared with: more are slower and find more.
        ivf_rerank: candidates of a query that are compared exactly: more are slower and find more.
        pq_bytes: bytes that stand for a vector, a divisor of its dimensions; null takes an eighth of them.
        max_train_vectors: that lists and bytes are learned from, in memory at a time.
    """

    kind: IndexKind = "auto"
    seed: int = 0
    num_threads: int = 1
    hnsw_links: int = 32
    hnsw_build_width: int = 80
    hnsw_search_width: int = 128
    ivf_lists: int | None = None
    ivf_probes: int = 32
    ivf_rerank: int = 128
    pq_bytes: int | None = None
    max_train_vectors: int = 65536

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"index.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind != "auto":
            for name in vars(self):
                owner = OWNERS.get(name.partition("_")[0], self.kind)
                if owner != self.kind and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"index.{name} can not act where index.kind is {self.kind}; leave it out")
        for name, value in vars(self).items():
            least = {"seed": 0, "hnsw_links": 2, "max_train_vectors": NUM_CENTROIDS}.get(name, 1)
            if name != "kind" and value is not None and value < least:
                raise ValueError(f"index.{name} is {value}; it must be at least {least}")


def build_settings(
    config: IndexConfig, dim: int, num_documents: int, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an index is built with, with every choice made.

    Args:
        dim: of the vectors.
        num_documents: that it is to hold.
        before: the settings of the index that is there; what the config leaves open stays as it is.

    Raises:
        ValueError: for a kind that these documents are too few for, or bytes that do not divide the dimensions.
    """
    kind = config.kind
    if kind == "auto":
        kind = before["kind"] if before else _kind_by_size(num_documents)
    if kind == "flat":
        return {"kind": kind}
    if kind == "hnsw":
        return {"kind": kind, "seed": config.seed, "links": config.hnsw_links, "build_width": config.hnsw_build_width}
    same = before if before and before["kind"] == kind else {}
    if not same and num_documents < NUM_CENTROIDS:
        raise ValueError(f"index.kind ivf_pq needs at least {NUM_CENTROIDS} documents; for {num_documents} take flat")
    code_bytes = config.pq_bytes or same.get("code_bytes") or max(n for n in range(1, dim // 8 + 2) if dim % n == 0)
    if dim % code_bytes:
        raise ValueError(f"index.pq_bytes is {code_bytes}; it must divide the {dim} dimensions of the vectors")
    most = max(1, min(num_documents, config.max_train_vectors) // VECTORS_PER_LIST)
    lists = config.ivf_lists or same.get("lists") or min(most, round(4 * math.sqrt(num_documents)))
    if not same and lists > num_documents:
        raise ValueError(f"index.ivf_lists is {lists}; of {num_documents} documents no more lists can be learned")
    return {"kind": kind, "seed": config.seed, "lists": lists, "code_bytes": code_bytes}


def _kind_by_size(num_documents: int) -> IndexKind:
    if num_documents <= MAX_FLAT:
        return "flat"
    return "hnsw" if num_documents <= MAX_HNSW else "ivf_pq"


def search_settings(config: IndexConfig, kind: str) -> dict[str, int]:
    """What queries are answered with; may change without the index being built again."""
    if kind == "flat":
        return {}
    if kind == "hnsw":
        return {"width": config.hnsw_search_width}
    return {"probes": config.ivf_probes, "rerank": config.ivf_rerank}


def index_bytes(settings: Mapping[str, Any], dim: int, num_documents: int) -> int:
    """Memory that an index takes at least, bytes."""
    if settings["kind"] == "flat":
        return 4 * dim * num_documents
    if settings["kind"] == "hnsw":
        return (4 * dim + 8 * settings["links"] + 12) * num_documents
    return (settings["code_bytes"] + 8) * num_documents + 4 * dim * (settings["lists"] + NUM_CENTROIDS)


def check_fits(num_bytes: int, what: str, remedy: str) -> None:
    """Whether so much fits what is free of the machine's memory.

    Raises:
        ValueError: with both numbers.
    """
    free = free_memory_bytes()
    if free is not None and num_bytes > free:
        raise ValueError(f"{what} takes {num_bytes:,} bytes of memory, and {free:,} are free; {remedy}")


def import_faiss() -> Any:
    """faiss.

    Raises:
        ValueError: naming the extra, where it is not installed.
    """
    return import_extra("faiss", "retrieval", "retrieval needs")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """faiss computes with so many threads within."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def new_index(settings: Mapping[str, Any], dim: int, sample: Callable[[int], np.ndarray], max_sample: int) -> Any:
    """An empty index that vectors can be added to.

    Args:
        settings: see `build_settings`.
        sample: gives so many vectors to learn from, float32 `(n, dim)`, or all where there are fewer.
        max_sample: the most that it is asked for.
    """
    faiss = import_faiss()
    product = faiss.METRIC_INNER_PRODUCT
    if settings["kind"] == "flat":
        return faiss.IndexFlatIP(dim)
    if settings["kind"] == "hnsw":
        index = faiss.IndexHNSWFlat(dim, settings["links"], product)
        index.hnsw.efConstruction = settings["build_width"]
        return index
    index = faiss.index_factory(dim, f"IVF{settings['lists']},PQ{settings['code_bytes']}x8", product)
    index.do_polysemous_training = False  # it serves Hamming distances, which are not used, and takes seconds
    for clustering in (index.cp, index.pq.cp):
        clustering.seed = settings["seed"]
        clustering.min_points_per_centroid = 1  # the least is checked above, where faiss would print
        clustering.max_points_per_centroid = max_sample
    index.train(sample(max_sample))
    return index


def add_vectors(index: Any, vectors: np.ndarray, settings: Mapping[str, Any], num_threads: int) -> None:
    """Adds vectors, float32 `(n, dim)`, as numbers from the index's count on."""
    if settings["kind"] != "hnsw":
        index.add(vectors)
        return
    faiss = import_faiss()
    # Levels are drawn from the seed and the place, so that a graph that was read from disk goes on as one that was not.
    index.hnsw.rng = faiss.RandomGenerator(settings["seed"] + index.ntotal)
    with threads(num_threads):
        index.add(vectors)


def search_index(index: Any, queries: np.ndarray, k: int, settings: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers, both `(queries, k)`, best first; -1 is no number. Scores of `ivf_pq` are approximate."""
    faiss = import_faiss()
    options = None
    if "width" in settings:
        options = faiss.SearchParametersHNSW(efSearch=max(k, settings["width"]))
    elif "probes" in settings:
        options = faiss.SearchParametersIVF(nprobe=settings["probes"])
    return index.search(queries, k, params=options)


def write_index(index: Any, path: Path) -> None:
    """Writes an index whole or not at all.

    Raises:
        OSError: naming the file.
    """
    with replacing(path) as part:
        try:
            import_faiss().write_index(index, str(part))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def read_index(path: Path, mapped: bool) -> Any:
    """The index in a file.

    Args:
        mapped: leave vectors and codes on disk; such an index can not be added to.

    Raises:
        ValueError: naming the file, where it is missing or broken.
    """
    faiss = import_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: missing or broken ({reason}); index again") from error
