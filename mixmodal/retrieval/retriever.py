"""Retrieval for a model that is used: the documents of a memory that stand before a prompt.

RA-CM3 (arXiv 2211.12561) and CM3Leon (arXiv 2309.02591): under the rules of training, with the prompt as it is for the
query.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mixmodal.manifests import MANIFEST_NAME
from mixmodal.retrieval.encoder import DocumentEncoder, DocumentParts, find_encoder, load_encoder
from mixmodal.retrieval.memory import Memory, check_encoder, open_memory
from mixmodal.retrieval.selection import SelectionConfig, choose, select

logger = logging.getLogger(__name__)

DEFAULT_SELECTION = SelectionConfig()


class Retrieved(NamedTuple):
    """A document of the memory.

    Args:
        number: in the memory.
        key: its name.
        score: inner product with the query's vector.
        ids: the whole document as it was spelled, int64 `(T,)`.
    """

    number: int
    key: str
    score: float
    ids: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Key and score, for a report."""
        return {"key": self.key, "score": self.score}


class Retriever:
    """Finds documents of a memory for queries of text and pictures; see `load_retriever`.

    Args:
        memory: where they are.
        encoder: the one that the memory was built with.
        selection: which may be taken. The count of each call stands in for `num_candidates`.

    Raises:
        ValueError: where the memory was built with another encoder.
    """

    def __init__(
        self, memory: Memory, encoder: DocumentEncoder, selection: SelectionConfig = DEFAULT_SELECTION
    ) -> None:
        check_encoder(memory.folder / MANIFEST_NAME, memory.manifest, encoder.identity)
        self.memory, self.encoder, self.selection = memory, encoder, selection

    def find(
        self, queries: Sequence[DocumentParts], count: int, *, own: Sequence[int] | None = None
    ) -> list[list[Retrieved]]:
        """The `count` best documents for each query, in the order in which they are read: the best LAST.

        So the best stands next to the prompt. In training their order is random.

        Args:
            queries: prompts; each has one vector, of all its texts and pictures.
            count: fewer are found where fewer may be taken.
            own: the queries' numbers in the memory, where they stand there; they and what is near them are left out.

        Raises:
            ValueError: for a query without text and picture, or a count below 1.
        """
        vectors = self._embed(queries, count)
        if not queries:
            return []
        config = replace(self.selection, num_candidates=count)
        found = select(self.memory, config, text_queries=vectors, image_queries=None, own=own)
        return self._read(found.numbers[:, 0].tolist(), found.scores[:, 0].tolist(), count)

    def random(self, queries: Sequence[DocumentParts], count: int, seed: int) -> list[list[Retrieved]]:
        """The control that tells what nearness is worth: documents drawn at random, under the same rules otherwise.

        A query's documents are a function of the seed and the query, whatever else is asked for beside it.
        """
        vectors, memory = self._embed(queries, count), self.memory
        config = replace(self.selection, num_candidates=count)
        chosen: list[list[int]] = []
        scores: list[list[float]] = []
        for query, vector in zip(queries, vectors):
            generator = np.random.default_rng((seed, _digest(query)))
            numbers = generator.choice(len(memory), min(config.search_depth, len(memory)), replace=False)
            drawn = memory.vectors(numbers)
            taken = choose(numbers, drawn @ vector, drawn, memory.modalities[numbers], config)
            chosen.append(taken.tolist())
            scores.append((memory.vectors(taken) @ vector).tolist())
        return self._read(chosen, scores, count)

    def _embed(self, queries: Sequence[DocumentParts], count: int) -> np.ndarray:
        if count < 1:
            raise ValueError(f"the number of documents to retrieve is {count}; it must be at least 1")
        for place, query in enumerate(queries):
            if not query.texts and not query.images:
                raise ValueError(f"query {place} has neither text nor picture: nothing can be retrieved for it")
        return self.encoder.embed_documents(queries)

    def _read(
        self, numbers: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], count: int
    ) -> list[list[Retrieved]]:
        """The documents of each row of numbers, best first, without those of -1: the best last."""
        found: list[list[Retrieved]] = []
        for pairs in zip(numbers, scores):
            there = [(number, score) for number, score in zip(*pairs) if number >= 0]
            found.append([Retrieved(n, self.memory.keys[n], score, self.memory.ids(n)) for n, score in there[::-1]])
        short = [len(row) for row in found if len(row) < count]
        if short:
            logger.warning(
                "%s: for %d of %d queries fewer than %d documents may be taken, %d at the least, as %s says",
                self.memory.folder,
                len(short),
                len(found),
                count,
                min(short),
                self.selection,
            )
        return found


def load_retriever(
    memory: Path | str,
    encoder: Path | str | None = None,
    selection: SelectionConfig = DEFAULT_SELECTION,
    device: str | torch.device = "cpu",
    *,
    verify: bool = False,
) -> Retriever:
    """The memory in a folder with its encoder.

    Args:
        memory: its folder.
        encoder: folder or hub id of its encoder; None is the one that the memory names.
        selection: which documents may be taken.
        device: of the encoder.
        verify: compare the SHA-256 of every file first, which reads the whole memory.

    Raises:
        ValueError: naming the file: no memory, an empty or damaged one; no encoder where it should be, or another one.
    """
    opened = open_memory(memory, encoder_identity=None, verify=verify)
    try:
        folder = find_encoder(opened.encoder if encoder is None else encoder)
    except ValueError as error:
        if encoder is not None:
            raise
        raise ValueError(
            f"{opened.folder}: the encoder that it was built with is not at {opened.encoder} any more; "
            f"give --encoder (attach_memory: encoder). {error}"
        ) from error
    return Retriever(opened, load_encoder(folder, device), selection)


def _digest(query: DocumentParts) -> int:
    """A number that stands for a query's content."""
    digest = hashlib.sha256()
    for text in query.texts:
        digest.update(f"text {len(text)} {text}".encode())
    for image in query.images:
        digest.update(f"image {image.mode} {image.size}".encode() + image.tobytes())
    return int.from_bytes(digest.digest()[:8], "little")
