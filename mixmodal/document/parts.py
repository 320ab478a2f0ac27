"""What a document is made of: texts, masks and coded parts, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np


class SequenceError(ValueError):
    """Ids or parts that the sequence format does not allow."""


class TextCodec(Protocol):
    """What a text tokenizer offers here: strings to piece indices and back, without control tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, pieces: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Text:
    """A run of text; never empty."""

    text: str
    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if not self.text:
            raise SequenceError("a text part is empty; leave the part out")


@dataclass(frozen=True)
class Mask:
    """A `<mask:index>` in place of text: what guidance puts for the prompt, and what infilling fills."""

    index: int = 0
    modality: ClassVar[str] = "text"


@dataclass(frozen=True)
class EndOfTurn:
    """Where a speaker of a conversation has ended: human and model take turns, and nothing else says whose it is.

    Text to every format, though it is no text: Chameleon's token 8710 (arXiv 2405.09818, released code).
    """

    modality: ClassVar[str] = "text"


@dataclass(frozen=True, eq=False)
class Coded:
    """Codes of one thing, int64, of a fixed grid; a subclass names the modality, which is also its vocabulary range."""

    codes: np.ndarray
    modality: ClassVar[str]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and np.array_equal(self.codes, other.codes)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((self.modality, self.codes.tobytes()))


class Image(Coded):
    """A picture as codes `(h, w)`, raster order when flattened."""

    modality: ClassVar[str] = "image"


Part = Text | Mask | EndOfTurn | Coded
PART_TYPES: dict[str, type[Coded]] = {Image.modality: Image}


@dataclass(frozen=True)
class Document:
    """An ordered list of parts. Adjacent texts are joined, so that equal sequences are equal documents."""

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable[Part]) -> None:
        joined: list[Part] = []
        for part in parts:
            if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
                joined[-1] = Text(joined[-1].text + part.text)
            else:
                joined.append(part)
        object.__setattr__(self, "parts", tuple(joined))
