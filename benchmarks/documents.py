"""Random documents as token shards: 8 pieces of text and the codes of a picture, as in the quickstart, or texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixmodal.data.token_shards import build_manifest, write_token_shard
from mixmodal.document import CM3LeonFormat, Run, SequenceFormat
from mixmodal.manifests import write_manifest
from mixmodal.quickstart.recipe import Recipe, load_recipe
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig


def packaged_recipe() -> Recipe:
    """That of the quickstart, for a run that is never made."""
    with tempfile.TemporaryDirectory() as run:
        return load_recipe(Path(run))


RECIPE = packaged_recipe()
IMAGES = ImageTokenizer(RECIPE.configs["image_tokenizer"].tokenizer)
VOCABULARY = Vocabulary(
    VocabularyConfig(
        codebook_sizes={"image": IMAGES.codebook_size},
        num_text_pieces=RECIPE.configs["text_tokenizer"].vocab_size,
        num_sentinels=RECIPE.configs["tokens"].num_sentinels,
    )
)
FORMAT = CM3LeonFormat(VOCABULARY, {"image": IMAGES.grid})
SHAPE = {name: value for name, value in RECIPE.settings["pretrain"]["model"].items() if name != "dropout"}
"""Of the network: that of the quickstart, as are the sizes of the vocabulary and of a picture."""


def write_documents(folder: Path, count: int = 2000) -> None:
    """Writes token shards of `count` documents."""
    rng = np.random.default_rng(0)
    lengths = {"text": 8, "image": FORMAT.blocks["image"].length}
    documents = [
        FORMAT.join([Run(name, rng.choice(VOCABULARY.ids(name), length)) for name, length in lengths.items()])
        for _ in range(count)
    ]
    write_shard(folder, documents, FORMAT)


def write_texts(folder: Path, vocab_size: int, lengths: Sequence[int]) -> None:
    """Writes token shards of random texts; a document takes `lengths` tokens, its first and last one included."""
    sizes = VocabularyConfig(codebook_sizes={"image": 1}, num_text_pieces=1, num_sentinels=1)
    pieces = vocab_size - Vocabulary(sizes).size + 1
    vocabulary = Vocabulary(VocabularyConfig(codebook_sizes={"image": 1}, num_text_pieces=pieces, num_sentinels=1))
    spelling, rng = CM3LeonFormat(vocabulary, {"image": (1, 1)}), np.random.default_rng(0)
    ends = len(spelling.join([Run("text", rng.choice(vocabulary.ids("text"), 1))])) - 1
    texts = [rng.choice(vocabulary.ids("text"), length - ends) for length in lengths]
    write_shard(folder, [spelling.join([Run("text", text)]) for text in texts], spelling)


def write_shard(folder: Path, documents: Sequence[np.ndarray], spelling: SequenceFormat) -> None:
    """Writes documents as one shard."""
    folder.mkdir(parents=True)
    keys = [str(number) for number in range(len(documents))]
    entry = write_token_shard(folder, "shard_00000", documents, keys, spelling.vocabulary.size)
    counts = {"documents": len(documents), "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": "0" * 64, "image_tokenizer_sha256": "0" * 64}
    write_manifest(folder, build_manifest(spelling, [entry], counts=counts, **hashes))
