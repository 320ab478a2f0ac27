"""Conditions of denoisers: names of classes to their numbers, texts to tokens. The empty string is no condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixmodal.models.denoiser import pad_tokens
from mixmodal.tokenization.text_files import PieceTokenizer


class ConditionEncoder(Protocol):
    """Makes the conditions that a `Denoiser` is called with, int64 `(B,)` or `(B, T)`, of strings."""

    def encode(self, conditions: Sequence[str]) -> Tensor: ...


class ClassNames:
    """Numbers of classes, int64 `(B,)`.

    Args:
        names: for each class the words that it is known by, such as a label and a caption.

    Raises:
        ValueError: where two classes are known by the same word, or by the empty one.
    """

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self.labels = [known[0] for known in names]
        self._numbers: dict[str, int] = {"": len(names)}
        for number, known in enumerate(names):
            for word in known:
                if self._numbers.setdefault(word, number) != number:
                    raise ValueError(f"classes: {word!r} stands for more than one of them, or for none")

    def encode(self, conditions: Sequence[str]) -> Tensor:
        """
        Raises:
            ValueError: naming what is no class.
        """
        unknown = [one for one in conditions if one not in self._numbers]
        if unknown:
            shown = ", ".join(self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
            raise ValueError(f"{unknown[0]!r} is none of the {len(self.labels)} classes of the denoiser: {shown}")
        return torch.tensor([self._numbers[one] for one in conditions], dtype=torch.int64)

    def __contains__(self, word: str) -> bool:
        return word in self._numbers


class TextTokens(NamedTuple):
    """Tokens of texts, int64 `(B, T)`.

    Args:
        tokenizer: of the pieces.
        max_text_tokens: T.
    """

    tokenizer: PieceTokenizer
    max_text_tokens: int

    def encode(self, conditions: Sequence[str]) -> Tensor:
        return pad_tokens([self.tokenizer.encode(text) for text in conditions], self.max_text_tokens)
