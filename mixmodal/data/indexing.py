"""Shards and their token shards to a memory that documents are retrieved from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mixmodal.data.matching import open_parts, read_matched, report
from mixmodal.data.shards import Sample
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.token_shards import TokenShards
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.retrieval.index import IndexConfig
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, Memory, open_memory


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Which documents a memory holds, and how they are found.

    Args:
        shards: folders of shards, or single shards, with the texts and pictures.
        tokens: folder of the token shards that were pretokenized from them.
        encoder: what makes vectors of them: a folder with a CLIP or SigLIP, as `mixmodal train-encoder` exports it, or
            a hub id as `openai/clip-vit-base-patch32`.
        out: folder of the memory. What it holds stays, where it is the beginning of what is given now.
        index: how documents are found.
        part_documents: documents of a part of the memory; a job that broke off goes on with the part that was not
            whole.
        batch_size: documents that are embedded at a time.
        device: where the encoder runs: `cpu`, `cuda`, ...
        limits: what a sample may be, as it was pretokenized, and the share of skipped ones that fails the job.
    """

    shards: tuple[Path, ...]
    tokens: Path
    encoder: str
    out: Path
    index: IndexConfig = field(default_factory=IndexConfig)
    part_documents: int = 16384
    batch_size: int = 64
    device: str = "cpu"
    limits: SampleLimits = field(default_factory=SampleLimits)


def build_memory(config: MemoryConfig) -> Memory:
    """Writes a memory of all documents of token shards, in their order, or adds those that it does not hold yet.

    Prints what it comes to.

    Raises:
        ValueError: where shards and token shards do not belong together or hold conversations, the folder holds another
            memory, or the encoder is none or gives a vector that is none.
        TooManySkipped: above the allowed share of samples that were not pretokenized.
    """
    started = time.perf_counter()
    tokens = TokenShards(config.tokens)
    tokens.check_pairs(wanted=False)
    if tokens.has_loss:
        raise ValueError(
            f"{tokens.manifest_path}: its documents are conversations, which say which tokens carry loss; a memory does"
            " not hold that, so that prompts would be learnt where such documents are retrieved. Index documents that"
            " are trained on as a whole, from a folder of their own"
        )
    encoder = load_encoder(config.encoder, config.device, config.batch_size)
    counter = SkipCounter(config.limits.max_skipped_share)
    write_memory(
        config.out,
        _documents(config, tokens, counter),
        encoder.embed_documents,
        encoder_identity=encoder.identity,
        dim=encoder.dim,
        tokens=tokens.manifest,
        encoder=name_of(config.encoder),
        index=config.index,
        part_documents=config.part_documents,
        batch_size=config.batch_size,
    )
    memory = open_memory(config.out, encoder_identity=encoder.identity, verify=False)
    print(
        f"{config.out}: {len(memory):,} documents with {memory.num_tokens:,} tokens in "
        f"{memory.num_variants} variants, {counter.num_skipped} samples skipped, index "
        f"{memory.manifest['index']['build']['kind']}, {time.perf_counter() - started:.1f} s"
    )
    return memory


def name_of(encoder: str) -> str:
    """Where an encoder is found from any folder: a local one by its whole path, else a hub id as it is."""
    return str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder


def _documents(config: MemoryConfig, tokens: TokenShards, counter: SkipCounter) -> Iterator[MemoryDocument]:
    matched = read_matched(config.shards, tokens, counter, config.limits)
    for number, sample in report(matched, len(tokens) // tokens.num_variants):
        yield MemoryDocument(
            sample.key,
            modalities_of(sample),
            partial(open_parts, sample, config.limits),
            partial(_variants, tokens, number),  # without the sample: it is kept until its part is whole
        )


def _variants(tokens: TokenShards, number: int) -> list[np.ndarray]:
    return [tokens[number * tokens.num_variants + variant] for variant in range(tokens.num_variants)]


def modalities_of(sample: Sample) -> int:
    """HAS_TEXT, HAS_IMAGE or both."""
    return HAS_TEXT * bool(sample.texts) | HAS_IMAGE * bool(sample.pictures)
