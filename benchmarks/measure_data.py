"""What packed rows of a mixture cost: milliseconds an optimizer step for one of 1 and of 64 ranks, and the padding.

    python benchmarks/measure_data.py [--repeats 5]

The shape is that of configs/train/chameleon_7b.yaml, 4 rows x 8 micro-batches x 4096 tokens a rank; random documents:
a third of the tokens text of 50 to 1,000 tokens, a third pairs of a caption and 1,024 codes, a third pages with two
pictures. CPU time of one process, files in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import record

from mixmodal.data.pipeline import DataConfig, PackedDocuments, open_sources
from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import build_manifest, write_token_shard
from mixmodal.document import CM3LeonFormat, Run
from mixmodal.manifests import write_manifest
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SPLIT = {"micro_batch_size": 4, "grad_accum_steps": 8}
SEQ_LEN, NUM_DOCUMENTS = 4096, 3000
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8192}, num_text_pieces=56000, num_sentinels=512))
FORMAT = CM3LeonFormat(VOCABULARY, {"image": (32, 32)})
OBJECTIVES = {
    "no masks": CausalMaskedConfig(min_masks=0, max_masks=0, poisson_rate=0.0),
    "masks": CausalMaskedConfig(),
}


def write_sources(folder: Path) -> dict[str, SourceConfig]:
    """Token shards of each source."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> Run:
        return Run("text", rng.choice(VOCABULARY.ids("text"), int(rng.integers(low, high))))

    def image() -> Run:
        return Run("image", rng.choice(VOCABULARY.ids("image"), 1024))

    builders: dict[str, Callable[[], list[Run]]] = {
        "text": lambda: [text(50, 1000)],
        "pairs": lambda: [text(10, 60), image()],
        "pages": lambda: [text(50, 300), image(), text(50, 300), image()],
    }
    for name, build in builders.items():
        (folder / name).mkdir()
        documents = [FORMAT.join(build()) for _ in range(NUM_DOCUMENTS)]
        keys = [str(number) for number in range(NUM_DOCUMENTS)]
        entry = write_token_shard(folder / name, "shard_00000", documents, keys, VOCABULARY.size)
        counts = {"documents": NUM_DOCUMENTS, "tokens": entry["tokens"], "skipped": {}}
        hashes = {"text_tokenizer_sha256": "0" * 64, "image_tokenizer_sha256": "0" * 64}
        write_manifest(folder / name, build_manifest(FORMAT, [entry], counts=counts, **hashes))
    return {name: SourceConfig(tokens=folder / name) for name in builders}


def measure(config: DataConfig, objective: CausalMaskedConfig, ranks: int, repeats: int) -> tuple[list[float], float]:
    """Milliseconds of each of `repeats` steps behind a first one, and the share of tokens that are no padding."""
    masked = CausalMasked(objective, VOCABULARY)
    rows = PackedDocuments(open_sources(config), FORMAT, masked, config, world_size=ranks, **SPLIT)
    found, used, whole = [], 0, 0
    for step in range(repeats + 1):
        started = time.process_time()
        batches = [next(rows) for _ in range(SPLIT["grad_accum_steps"])]
        if step:
            found.append(1000 * (time.process_time() - started))
        used += sum(int(batch.num_tokens) for batch in batches)
        whole += sum(batch.tokens.numel() for batch in batches)
    return found, used / whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sources = write_sources(Path(name))
        for label, objective in OBJECTIVES.items():
            for ranks in (1, 64):
                config = DataConfig(sources=sources, seq_len=SEQ_LEN)
                found, _ = measure(config, objective, ranks, arguments.repeats)
                settings = {**SPLIT, "seq_len": SEQ_LEN, "ranks": ranks, "objective": label, "lookahead": 0}
                record("data", f"rows of a step, {label}, rank 0 of {ranks}", found, "ms", "cpu", settings)
        for lookahead in (0, 16, 64):
            config = DataConfig(sources=sources, seq_len=SEQ_LEN, lookahead=lookahead)
            _, filled = measure(config, OBJECTIVES["masks"], 1, 4 * arguments.repeats)
            settings = {**SPLIT, "seq_len": SEQ_LEN, "lookahead": lookahead}
            record("data", f"padding, lookahead {lookahead}", [100 * (1 - filled)], "% of tokens", "cpu", settings)
