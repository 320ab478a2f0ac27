"""Token shards of captioned shapes and conversations without trained tokenizers: bytes for text, colours for codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mixmodal.data.pipeline import DataConfig
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Document, Image, Part, Text, Turn, build_format, spell_turns
from mixmodal.manifests import write_manifest
from mixmodal.models.transformer import TransformerConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID = (4, 4)
LEVELS = 4  # of each colour channel: 64 codes


class Bytes:
    """UTF-8 bytes as pieces."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode()


def write_shapes(folder: Path, num_pairs: int, seed: int = 0, text_sha256: str = "t" * 64) -> TokenShards:
    """Writes one token shard of `num_pairs` documents, the text first."""
    vocabulary = Vocabulary(VocabularyConfig(codebook_sizes={"image": LEVELS**3}, num_text_pieces=256, num_sentinels=8))
    spelling = build_format("cm3leon", vocabulary, {"image": GRID}, Bytes())
    documents, keys = [], []
    for key, picture, caption in synthetic_pairs(num_pairs, size=16, seed=seed):
        cells = np.asarray(picture, dtype=np.float64).reshape(GRID[0], 4, GRID[1], 4, 3).mean(axis=(1, 3))
        levels = np.minimum(cells * LEVELS / 256, LEVELS - 1).astype(np.int64)
        codes = levels @ np.array([LEVELS**2, LEVELS, 1])
        documents.append(spelling.spell(Document([Text(caption), Image(codes)])))
        keys.append(f"{key}#0")
    folder.mkdir(parents=True)
    entry = write_token_shard(folder, "shard_00000", documents, keys, vocabulary.size)
    counts = {"documents": len(documents), "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": text_sha256, "image_tokenizer_sha256": "i" * 64}
    write_manifest(folder, build_manifest(spelling, [entry], counts=counts, **hashes))
    return TokenShards.open(folder)


COLOURS = ("red", "blue", "green", "black", "white", "pink", "gold", "grey")


def write_conversations(folder: Path, count: int, seed: int = 0, pairs: bool = False) -> TokenShards:
    """Writes one token shard: what colour a picture in tints of one has, and pictures to draw of a colour.

    With `pairs` each is answered twice: rightly, and then with another colour.
    """
    vocabulary = Vocabulary(VocabularyConfig(codebook_sizes={"image": LEVELS**3}, num_text_pieces=256, num_sentinels=8))
    spelling = build_format("cm3leon", vocabulary, {"image": (2, 2)}, Bytes())
    rng = np.random.default_rng(seed)
    documents, losses = [], []
    for number in range(count):
        colour = int(rng.integers(len(COLOURS)))
        name, tints = Text(COLOURS[colour]), Image(8 * colour + rng.integers(1, 8, (2, 2)))
        prompt: tuple[Part, ...] = (Text("draw "), name) if number % 2 else (tints, Text("see "))
        spelled = []
        for answered in (colour, (colour + int(rng.integers(1, 8))) % 8)[: 2 if pairs else 1]:
            answer = Image(np.full((2, 2), 8 * answered)) if number % 2 else Text(COLOURS[answered])
            turns = [Turn(prompt, (False, False), False), Turn((answer,), (True,), True)]
            spelled.append(spell_turns(spelling, turns))
        documents.append(np.concatenate([ids for ids, _ in spelled]))
        losses.append(np.concatenate([loss for _, loss in spelled]))
    folder.mkdir(parents=True)
    keys = [f"{number}#0" for number in range(count)]
    entry = write_token_shard(folder, "shard_00000", documents, keys, vocabulary.size, losses)
    counts = {"documents": count, "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": "t" * 64, "image_tokenizer_sha256": "i" * 64}
    num_pairs = count if pairs else 0
    write_manifest(folder, build_manifest(spelling, [entry], counts=counts, num_pairs=num_pairs, **hashes))
    return TokenShards.open(folder)


def tiny_config(root: Path, max_steps: int, **trainer: object) -> PretrainConfig:
    """A transformer of 0.1M parameters on the shards in `root / "tokens"`, 4 rows of 128 tokens a step."""
    defaults = {"micro_batch_size": 4, "log_every": 1, "tensorboard": False}
    return PretrainConfig(
        model=TransformerConfig(dim=64, num_layers=2, num_heads=2, ffn_dim=128, max_seq_len=128),
        data=DataConfig(tokens=root / "tokens", seq_len=128),
        objective=CausalMaskedConfig(min_masks=0, max_masks=4),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5, min_lr_ratio=0.1),
        trainer=TrainerConfig(max_steps=max_steps, **{"run_dir": root / "run", **defaults, **trainer}),  # type: ignore[arg-type]
    )


def tiny_tuning(
    root: Path,
    run_dir: Path,
    max_steps: int,
    data: Mapping[str, object] | None = None,
    trainer: Mapping[str, object] | None = None,
    **options: object,
) -> FinetuneConfig:
    """Tunes the model of `root / "run/export"` on the conversations in `root / "talk"`, 4 rows of 64 tokens a step."""
    settings = {"run_dir": run_dir, "micro_batch_size": 4, "log_every": 1, "tensorboard": False, **(trainer or {})}
    given = {"init_from": root / "run/export", "optimizer": OptimizerConfig(lr=5e-3, warmup_steps=2), **options}
    return FinetuneConfig(
        data=FinetuneDataConfig(**{"tokens": root / "talk", "seq_len": 64, **(data or {})}),  # type: ignore[arg-type]
        trainer=TrainerConfig(max_steps=max_steps, **settings),  # type: ignore[arg-type]
        **given,  # type: ignore[arg-type]
    )
