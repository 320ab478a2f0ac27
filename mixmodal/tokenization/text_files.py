"""Text tokenizers of models, whichever file they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from mixmodal.document import TextCodec
from mixmodal.vocabulary import VocabularyConfig


class PieceTokenizer(TextCodec, Protocol):
    """What a model's text tokenizer offers: `TextTokenizer` and `JsonTextTokenizer` do."""

    suffix: ClassVar[str]
    """Of its files."""

    @property
    def num_pieces(self) -> int:
        """Number of pieces; indices are 0 .. num_pieces - 1."""
        ...

    @cached_property
    def piece_bytes(self) -> list[int]:
        """Bytes that each piece stands for in UTF-8."""
        ...

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file: equal hashes mean equal pieces."""
        ...

    def save(self, path: Path | str) -> None: ...


def load_text_tokenizer(path: Path | str, num_pieces: int | None = None) -> PieceTokenizer:
    """Reads a sentencepiece model of ours, or a `tokenizers` JSON file where the name ends in `.json`.

    Args:
        num_pieces: text pieces of the model's vocabulary, where it is known: a JSON file may name fewer (rows that
            fill up the embedding) or more (added tokens without a row). A sentencepiece model has its own number.

    Raises:
        ValueError: naming the file, where it is absent or can not be read; for a JSON file also where the library
            `tokenizers` is not installed.
    """
    if Path(path).suffix == ".json":
        from mixmodal.tokenization.control_tokens import read_control_tokens
        from mixmodal.tokenization.json_text import JsonTextTokenizer

        rows = None if num_pieces is None else read_control_tokens(path).first_piece + num_pieces
        return JsonTextTokenizer.load(path, rows)
    from mixmodal.tokenization.text import TextTokenizer

    return TextTokenizer.load(path)


def size_vocabulary(
    tokenizer: PieceTokenizer, codebook_sizes: Mapping[str, int], num_sentinels: int | None, num_reserved: int = 1
) -> VocabularyConfig:
    """Sizes of a vocabulary around a tokenizer; a file with image codes has said them all, reserved ids too.

    Args:
        num_sentinels: None takes the file's, where it has said them, else the default of `VocabularyConfig`.
        num_reserved: control tokens behind the sentinels that are needed; such a file may have more.

    Raises:
        ValueError: where a file with image codes says others, or has an order that is not ours.
    """
    from mixmodal.tokenization.json_text import JsonTextTokenizer

    given = VocabularyConfig(
        codebook_sizes=dict(codebook_sizes), num_text_pieces=tokenizer.num_pieces, num_reserved=num_reserved
    )
    if num_sentinels is not None:
        given = replace(given, num_sentinels=num_sentinels)
    if not isinstance(tokenizer, JsonTextTokenizer) or not tokenizer.control.num_codes:
        return given
    from mixmodal.tokenization.control_tokens import vocabulary_of

    named = vocabulary_of(tokenizer.control, tokenizer.control.num_rows)
    for name, one, other in (
        ("codes of modalities", dict(given.codebook_sizes), dict(named.codebook_sizes)),
        ("num_sentinels", named.num_sentinels if num_sentinels is None else num_sentinels, named.num_sentinels),
    ):
        if one != other:
            raise ValueError(f"{name}: {one} here, and the file of the text tokenizer has the tokens of {other}")
    return named
