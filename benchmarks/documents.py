"""Random documents of the quickstart's shape as token shards: 8 pieces of text and 16 codes each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixmodal.data.token_shards import build_manifest, write_manifest, write_token_shard
from mixmodal.document import CM3LeonFormat, Run
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 2560}, num_text_pieces=1024, num_sentinels=16))
FORMAT = CM3LeonFormat(VOCABULARY, {"image": (4, 4)})
SHAPE = {"dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352, "max_seq_len": 128}
"""Of the network: that of the quickstart."""


def write_documents(folder: Path, count: int = 2000) -> None:
    """Writes token shards of `count` documents."""
    rng = np.random.default_rng(0)
    lengths = {"text": 8, "image": FORMAT.blocks["image"].length}
    documents = [
        FORMAT.join([Run(name, rng.choice(VOCABULARY.ids(name), length)) for name, length in lengths.items()])
        for _ in range(count)
    ]
    folder.mkdir(parents=True)
    keys = [str(number) for number in range(count)]
    entry = write_token_shard(folder, "shard_00000", documents, keys, VOCABULARY.size)
    counts = {"documents": count, "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": "0" * 64, "image_tokenizer_sha256": "0" * 64}
    write_manifest(folder, build_manifest(FORMAT, [entry], counts=counts, **hashes))
