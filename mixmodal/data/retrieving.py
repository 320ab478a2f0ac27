"""The candidates of every document of token shards, found in a memory once, before training.

RA-CM3 (arXiv 2211.12561) and CM3Leon (arXiv 2309.02591, section 4.2): a query is a document's text without some of its
words, or its picture.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.data.matching import Matched, open_parts, read_matched, report
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.token_shards import TokenShards
from mixmodal.manifests import MANIFEST_NAME
from mixmodal.retrieval.candidates import CandidateStore, CandidateWriter, open_candidates
from mixmodal.retrieval.encoder import DocumentEncoder, DocumentParts, combine, load_encoder
from mixmodal.retrieval.leaks import LeakGuard
from mixmodal.retrieval.memory import Memory, find_wrong, open_memory, read_memory_manifest
from mixmodal.retrieval.selection import Chosen, SelectionConfig, drop_words, select


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """For which documents candidates are found, and in which memory.

    Args:
        memory: folder of `mixmodal index`.
        shards: folders of shards, or single shards, with the texts and pictures of the documents.
        tokens: folder of the token shards that were pretokenized from them: those that are trained on, which may be
            the memory's own, or held-out ones.
        out: folder of the candidates. A job that broke off goes on with the part that was not whole.
        encoder: of the memory, where it stands elsewhere by now; null takes the place that the memory names.
        selection: which documents may be candidates.
        query_dropout: share of the words that is left out of a text query, 0 .. 1.
        seed: of the words that are left out.
        part_documents: documents of a part of the candidates.
        batch_size: documents that are embedded and searched for at a time.
        device: where the encoder runs: `cpu`, `cuda`, ...
        limits: what a sample may be, as it was pretokenized, and the share of skipped ones that fails the job.
    """

    memory: Path
    shards: tuple[Path, ...]
    tokens: Path
    out: Path
    encoder: str | None = None
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    query_dropout: float = 0.2
    seed: int = 0
    part_documents: int = 16384
    batch_size: int = 256
    device: str = "cpu"
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"query_dropout is {self.query_dropout}; it must be at least 0 and below 1")
        for name, least in (("part_documents", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class Queries(NamedTuple):
    """Vectors of a batch of documents, float32 `(n, dim)`.

    Args:
        text: of their texts without some of the words.
        image: of their pictures.
        whole: of the documents, nothing left out.
        asks: which of them have a text and which a picture, bool `(n, 2)`; other rows of `text` and `image` are 0.
    """

    text: np.ndarray
    image: np.ndarray
    whole: np.ndarray
    asks: np.ndarray


def retrieve(config: RetrieveConfig) -> CandidateStore:
    """Finds and stores the candidates of each document; prints what they come to.

    A document's candidates are a function of it, the memory and the settings, up to rounding of the encoder.

    Raises:
        ValueError: where shards, token shards, memory or encoder do not belong together, or the folder holds candidates
            of other settings.
        TooManySkipped: above the allowed share of samples that were not pretokenized.
    """
    started = time.perf_counter()
    tokens = TokenShards(config.tokens)
    tokens.check_pairs(wanted=False)
    encoder = _load_encoder(config)
    memory = open_memory(config.memory, encoder_identity=encoder.identity)
    memory.check_like(tokens.manifest)
    writer = CandidateWriter(config.out, _settings(config, memory, tokens))
    total = writer.manifest["num_documents"]
    if sum(part["documents"] for part in writer.parts) < total or not all(
        map(writer.is_whole, range(len(writer.parts)))
    ):
        counter = SkipCounter(config.limits.max_skipped_share)
        guard = LeakGuard(memory, tokens.build_format())
        matched = report(read_matched(config.shards, tokens, counter, config.limits), total)

        def choose(batch: Sequence[Matched]) -> Chosen:
            queries = embed_queries(encoder, batch, config)
            keys = [entry.sample.key for entry in batch]
            documents = [tokens[entry.number * tokens.num_variants] for entry in batch]
            return select(
                memory,
                config.selection,
                text_queries=queries.text,
                image_queries=queries.image,
                own_vectors=queries.whole,
                asks=queries.asks,
                refuse=guard.refuse(keys, documents),
            )

        _write(writer, matched, choose, config)
    store = open_candidates(config.out, memory=memory, tokens_digest=tokens.digest)
    print(f"{describe(store)}, {time.perf_counter() - started:.1f} s")
    return store


def describe(store: CandidateStore) -> str:
    """One line on what was found."""
    counts = [part["counts"] for part in store.manifest["parts"]]
    sums = {key: sum(part[key] for part in counts) for key in ("queries", "candidates", "without", "score_sum")}
    return (
        f"{store.folder}: candidates of {len(store):,} documents, {sums['without']:,} without any, "
        f"{sums['candidates'] / max(sums['queries'], 1):.2f} a query, mean score "
        f"{sums['score_sum'] / max(sums['candidates'], 1):.3f}"
    )


def _load_encoder(config: RetrieveConfig) -> DocumentEncoder:
    path = config.memory / MANIFEST_NAME
    source = config.encoder or read_memory_manifest(config.memory)["encoder"]
    try:
        return load_encoder(source, config.device, config.batch_size)
    except ValueError as error:
        if config.encoder:
            raise
        raise ValueError(f"{error}; {path} names it: give encoder, where it stands elsewhere by now") from error


def _settings(config: RetrieveConfig, memory: Memory, tokens: TokenShards) -> dict[str, Any]:
    """What the candidates follow from."""
    return {
        "memory_digest": memory.digest,
        "tokens_digest": tokens.digest,
        "num_documents": len(tokens) // tokens.num_variants,
        "num_candidates": config.selection.num_candidates,
        "selection": asdict(config.selection),
        "query_dropout": config.query_dropout,
        "seed": config.seed,
        "max_caption_words": config.limits.max_caption_words,
        "index": {key: memory.manifest["index"][key] for key in ("build", "search")},
    }


def embed_queries(encoder: DocumentEncoder, batch: Sequence[Matched], config: RetrieveConfig) -> Queries:
    """The vectors of a batch.

    Of several texts each loses words and gets a vector, and their normalised mean is the query, as it is the text part
    of a document's vector: joined, most of them would lie behind what a tower reads.

    Raises:
        ValueError: naming the sample, where the encoder gives it no vector of length 1.
    """
    parts = [open_parts(entry.sample, config.limits) for entry in batch]
    whole_texts = encoder.embed_texts([text for document in parts for text in document.texts])
    dropped = [_drop(entry.sample.key, document, config) for entry, document in zip(batch, parts)]
    dropped_texts = encoder.embed_texts([text for texts in dropped for text in texts])
    images = encoder.embed_images([image for document in parts for image in document.images])
    none = np.empty((0, encoder.dim), np.float32)
    text, image, whole = (np.zeros((len(batch), encoder.dim), np.float32) for _ in range(3))
    first_text = first_image = 0
    for row, document in enumerate(parts):
        texts = slice(first_text, first_text := first_text + len(document.texts))
        pictures = slice(first_image, first_image := first_image + len(document.images))
        if document.texts:
            text[row] = combine(dropped_texts[texts], none)
        if document.images:
            image[row] = combine(none, images[pictures])
        whole[row] = combine(whole_texts[texts], images[pictures])
    asks = np.array([[bool(document.texts), bool(document.images)] for document in parts])
    for vectors, rows in ((text, asks[:, 0]), (image, asks[:, 1]), (whole, np.ones(len(batch), bool))):
        wrong = find_wrong(vectors[rows])
        if wrong is not None:
            source = batch[int(np.flatnonzero(rows)[wrong[0]])].sample.source
            raise ValueError(f"{source}: {wrong[1]}, which the encoder gives of it; its part was not written")
    return Queries(text, image, whole, asks)


def _drop(key: str, document: DocumentParts, config: RetrieveConfig) -> list[str]:
    """The texts without some of their words: a function of the seed and the key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    generator = np.random.default_rng((config.seed, int.from_bytes(digest[:16], "big")))
    return [drop_words(text, config.query_dropout, generator) for text in document.texts]


def _write(
    writer: CandidateWriter,
    matched: Iterator[Matched],
    choose: Callable[[Sequence[Matched]], Chosen],
    config: RetrieveConfig,
) -> None:
    """All parts that are not there as they were written."""
    for number in count():
        there = number < len(writer.parts)
        part = islice(matched, writer.parts[number]["documents"] if there else config.part_documents)
        if writer.is_whole(number):
            for _ in part:
                pass
            continue
        found: list[np.ndarray] = []
        counts: dict[str, float] = dict.fromkeys(("queries", "candidates", "without", "score_sum"), 0)
        while batch := list(islice(part, config.batch_size)):
            numbers, scores = choose(batch)
            chosen = numbers >= 0
            found.append(numbers)
            counts["queries"] += sum(
                bool(kind) for entry in batch for kind in (entry.sample.texts, entry.sample.pictures)
            )
            counts["candidates"] += int(chosen.sum())
            counts["without"] += int((~chosen.any(axis=(1, 2))).sum())
            counts["score_sum"] += float(scores[chosen].sum(dtype=np.float64))
        if not found:
            break
        writer.write_part(number, np.concatenate(found), counts)
