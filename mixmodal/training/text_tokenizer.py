"""Trains the text tokenizer on the texts of shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextTokenizerTrainingConfig:
    """A BPE tokenizer with byte fallback from the texts of shards.

    Args:
        shards: folders of shards, or single shards.
        out: model file to write.
        vocab_size: the most pieces, of which 257 are bytes and the unknown piece; few texts give fewer.
        character_coverage: share of the characters that get a piece of their own, 0 .. 1; the rest is spelled in bytes.
        limits: what a sample may be, and the share of bad ones that fails the job.
    """

    shards: tuple[Path, ...]
    out: Path
    vocab_size: int = 8192
    character_coverage: float = 0.9995
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards is empty; give folders of shards, `mixmodal prepare` writes them")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage is {self.character_coverage}; it must lie above 0 and up to 1")


def train_text_tokenizer_on_shards(config: TextTokenizerTrainingConfig) -> TextTokenizer:
    """Trains and saves the tokenizer, and says what came out.

    Raises:
        ValueError: where there are no shards or no texts, or too many samples are bad.
    """
    counter = SkipCounter(config.limits.max_skipped_share)
    tokenizer = train_text_tokenizer(
        read_texts(config, counter), config.out, config.vocab_size, character_coverage=config.character_coverage
    )
    print(f"{config.out}: {tokenizer.num_pieces:,} pieces")
    return tokenizer


def read_texts(config: TextTokenizerTrainingConfig, counter: SkipCounter) -> Iterator[str]:
    """All texts; too many bad samples raise before anything is learned from the rest."""
    for sample in read_samples(config.shards, counter, config.limits):
        counter.use()
        yield from sample.texts
    counter.finish()
