"""Whether a document's own content is ever retrieved for it: every document is planted again, and it is counted.

    python benchmarks/retrieval_leaks.py

Needs what `python benchmarks/retrieval.py prepare` makes. Beside each document of the memory stand a copy of it under
another name, and its picture under the caption of another document. The control asks without the rules.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from record import record
from retrieval import SELECTION

from mixmodal.data.retrieving import RetrieveConfig, retrieve
from mixmodal.data.shards import Sample, read_samples
from mixmodal.data.skipping import SampleLimits
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import SequenceFormat
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.encoder import DocumentEncoder, combine, load_encoder
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, open_memory
from mixmodal.retrieval.selection import SelectionConfig, select

PLANTED = ("the document itself", "its copy under another name", "its picture under another caption")
RULES = "under the rules"
NO_RULES = "without them"


def plant(folder: Path, tokens: TokenShards, encoder: DocumentEncoder, samples: Sequence[Sample]) -> np.ndarray:
    """Writes the memory: all documents, then all copies, then all pictures with the caption of the document before.

    Returns:
        Vectors of the texts and of the pictures, float32 `(2, documents, dim)`.
    """
    texts = encoder.embed_texts([sample.texts[0] for sample in samples])
    limits = SampleLimits()
    images = encoder.embed_images([sample.pictures[0].open(limits.max_pixels) for sample in samples])
    spelling, total = tokens.build_format(), len(samples)
    spelled = [tokens[number * tokens.num_variants] for number in range(total)]
    entries = []
    for kind in range(len(PLANTED)):
        for number, sample in enumerate(samples):
            text = number - 1 if kind == 2 else number
            vector = combine(texts[text][None], images[number][None])
            ids = swap_text(spelling, spelled[number], spelled[text])
            key = f"planted_{kind}_{sample.key}" if kind else sample.key
            entries.append(MemoryDocument(key, HAS_TEXT | HAS_IMAGE, vector, [ids] * tokens.num_variants))
    write_memory(
        folder,
        entries,
        lambda vectors: np.stack(list(vectors)),
        encoder_identity=encoder.identity,
        dim=encoder.dim,
        tokens=tokens.manifest,
        encoder="planted",
    )
    return np.stack([texts, images])


def swap_text(spelling: SequenceFormat, ids: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A document of a text and a picture with the text of another one."""
    (text,) = (run for run in spelling.split(other) if run.modality == "text")
    return spelling.join([text if run.modality == "text" else run for run in spelling.split(ids)])


def leaked(numbers: np.ndarray, total: int) -> list[float]:
    """Share of the documents that have each kind of their own among their candidates `(documents, 2, n)`."""
    own = np.arange(total)[:, None, None]
    return [float((numbers == own + kind * total).any(axis=(1, 2)).mean()) for kind in range(len(PLANTED))]


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Counts under the rules, and without."""
    tokens = TokenShards(options.runs / "tokens")
    shards = tuple(options.quickstart / "data" / name for name in ("train", "tokenizer_extra"))
    source = open_memory(options.runs / "memory", encoder_identity=None).encoder
    encoder = load_encoder(source)
    samples = list(read_samples(shards))
    assert len(samples) * tokens.num_variants == len(tokens)
    queries = plant(folder / "memory", tokens, encoder, samples)
    where = {"memory": folder / "memory", "shards": shards, "tokens": tokens.folder, "out": folder / "candidates"}
    config = RetrieveConfig(**where, encoder=source, selection=SELECTION)
    store = retrieve(config)
    found = np.full((len(samples), 2, config.selection.num_candidates), -1, np.int64)
    for row, candidates in zip(found, (store[number] for number in range(len(store)))):
        for place, numbers in enumerate(candidates):
            row[place, : len(numbers)] = numbers
    memory = open_memory(folder / "memory", encoder_identity=encoder.identity)
    free = select(memory, SelectionConfig(max_score=1.0), text_queries=queries[0], image_queries=queries[1]).numbers
    shape = {"documents": len(samples), "planted": 2 * len(samples), **vars(config.selection)}
    for arm, numbers in ((RULES, found), (NO_RULES, free)):
        for name, share in zip(PLANTED, leaked(numbers, len(samples)), strict=True):
            record("retrieval_leaks", f"{arm}: {name}", [share], "of the documents", "cpu", shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--runs", type=Path, default=Path("runs/retrieval"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(given, Path(name))
