"""One id space for text pieces, image codes and control tokens: the only place with id arithmetic.

The default order is Chameleon's (arXiv 2405.09818), so that a Chameleon checkpoint keeps its ids:

    <s> <pad> </s> <unk> | image codes | <eoss> <break> | sentinels | reserved | text pieces | further code ranges

Of the reserved ids the first is `<end_of_turn>`; Lumina-mGPT (arXiv 2408.02657, released code) has a newline and sizes
of pictures further behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

NEWLINE, SIZES = 93, 94
"""Places among the reserved ids, as Lumina-mGPT has them: of its newline, and of its size of 0 units."""
Ids = TypeVar("Ids")  # an int, a numpy array or a torch tensor of ids


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Sizes from which every id follows.

    Args:
        codebook_sizes: number of codes of each coded modality, by its name; `image` comes first where present.
        num_text_pieces: pieces of the text tokenizer.
        num_sentinels: CM3 mask tokens `<mask:i>`.
        num_reserved: control tokens behind the sentinels; the first is `<end_of_turn>`. `reserved_for_sizes` says how
            many pictures of several sizes need.
    """

    codebook_sizes: Mapping[str, int] = field(default_factory=dict)
    num_text_pieces: int
    num_sentinels: int = 512
    num_reserved: int = 1


class Vocabulary:
    """Named, disjoint ranges that fill `range(size)` without a gap.

    Raises:
        ValueError: for a size that is not positive.
    """

    bos = 0
    pad = 1
    eos = 2
    unk = 3

    def __init__(self, config: VocabularyConfig) -> None:
        sizes = {**config.codebook_sizes, "text pieces": config.num_text_pieces, "sentinels": config.num_sentinels}
        sizes["reserved"] = config.num_reserved
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"vocabulary: the number of {name} is {size}; it must be at least 1")
        self.config = config
        self._ranges: dict[str, range] = {}
        taken = {"special", "control", "sentinel", "reserved", "text"} & set(config.codebook_sizes)
        if taken:
            raise ValueError(f"vocabulary: {sorted(taken)} can not name a coded modality; the name is taken")
        # A file that sorts its keys must not move the image codes away from Chameleon's place.
        names = sorted(config.codebook_sizes, key=lambda name: name != "image")
        self._append("special", 4)
        for name in names[:1]:
            self._append(name, config.codebook_sizes[name])
        self._append("control", 2)
        self._append("sentinel", config.num_sentinels)
        self._append("reserved", config.num_reserved)
        self._append("text", config.num_text_pieces)
        for name in names[1:]:
            self._append(name, config.codebook_sizes[name])
        self.end_of_span, self.break_ = self._ranges["control"]
        self.end_of_turn = self._ranges["reserved"].start
        self.size = max(ids.stop for ids in self._ranges.values())

    def _append(self, name: str, size: int) -> None:
        start = max((ids.stop for ids in self._ranges.values()), default=0)
        self._ranges[name] = range(start, start + size)

    @property
    def modalities(self) -> tuple[str, ...]:
        """`text` and every coded modality: the ranges that carry content."""
        return ("text", *self.config.codebook_sizes)

    def ids(self, name: str) -> range:
        """Ids of the range `name`: a modality, `special`, `control`, `sentinel` or `reserved`."""
        if name not in self._ranges:
            raise ValueError(f"vocabulary: no range {name!r}; there are {', '.join(self._ranges)}")
        return self._ranges[name]

    def named(self, name: str) -> range:
        """Ids of a range, or the one id of a control token: `bos`, `pad`, `eos`, `unk`, `end_of_span`, `break` or
        `end_of_turn`."""
        tokens = {one: getattr(self, one) for one in ("bos", "pad", "eos", "unk", "end_of_span", "end_of_turn")}
        tokens["break"] = self.break_
        if name in self._ranges:
            return self._ranges[name]
        if name not in tokens:
            known = ", ".join([*self._ranges, *tokens])
            raise ValueError(f"vocabulary: no range or control token {name!r}; there are {known}")
        return range(tokens[name], tokens[name] + 1)

    def to_ids(self, name: str, indices: Ids) -> Ids:
        """Indices within the range `name` (codes or text pieces, any shape) to ids."""
        return indices + self.ids(name).start  # type: ignore[operator]

    def from_ids(self, name: str, ids: Ids) -> Ids:
        """The inverse of `to_ids`; the caller sees to it that all ids are of the range."""
        return ids - self.ids(name).start  # type: ignore[operator]

    def contains(self, name: str, ids: Ids) -> Ids:
        """Whether each id is of the range `name`: booleans in the shape of `ids`."""
        span = self.ids(name)
        return (ids >= span.start) & (ids < span.stop)  # type: ignore[operator]

    def sentinel(self, index: int) -> int:
        """Id of `<mask:index>` (CM3, arXiv 2201.07520)."""
        if not 0 <= index < self.config.num_sentinels:
            raise ValueError(f"vocabulary: there is no <mask:{index}>; the last is {self.config.num_sentinels - 1}")
        return self._ranges["sentinel"].start + index

    @staticmethod
    def reserved_for_sizes(most_units: int) -> int:
        """`num_reserved` of a vocabulary with a newline and sizes of 1 to `most_units` units."""
        return SIZES + most_units + 1

    @property
    def newline(self) -> int:
        """Id of the token behind each row of codes of a picture (Lumina-mGPT).

        Raises:
            ValueError: where too few ids are reserved.
        """
        return self._reserved(NEWLINE, "newline")

    def size_token(self, units: int) -> int:
        """Id of the token for a picture's height or width of `units` units, 1 or more (Lumina-mGPT).

        Raises:
            ValueError: where too few ids are reserved.
        """
        if units < 1:
            raise ValueError(f"vocabulary: there is no size of {units} units; the smallest is 1")
        return self._reserved(SIZES + units, f"size of {units} units")

    def size_units(self, token: int) -> int | None:
        """The inverse of `size_token`; None for the id of anything else."""
        units = token - self.end_of_turn - SIZES
        return units if units >= 1 and token in self._ranges["reserved"] else None

    def _reserved(self, place: int, what: str) -> int:
        if place >= self.config.num_reserved:
            raise ValueError(
                f"vocabulary: there is no {what}: num_reserved is {self.config.num_reserved}, and at least {place + 1} "
                "are needed"
            )
        return self._ranges["reserved"].start + place

    def is_content(self, ids: Ids) -> Ids:
        """Whether each id is text or a code, not a control token."""
        first, *rest = self.modalities
        found = self.contains(first, ids)
        for name in rest:
            found = found | self.contains(name, ids)  # type: ignore[operator]
        return found

    def name(self, token: int) -> str:
        """A readable name of one id, for messages and for `mixmodal inspect`."""
        control = {
            self.bos: "<s>",
            self.pad: "<pad>",
            self.eos: "</s>",
            self.unk: "<unk>",
            self.end_of_span: "<eoss>",
            self.break_: "<break>",
            self.end_of_turn: "<end_of_turn>",
        }
        if token in control:
            return control[token]
        if token == self.end_of_turn + NEWLINE and token in self._ranges["reserved"]:
            return "<newline>"
        if (units := self.size_units(token)) is not None:
            return f"<size:{units}>"
        for name, span in self._ranges.items():
            if token in span:
                return f"<mask:{token - span.start}>" if name == "sentinel" else f"<{name}:{token - span.start}>"
        raise ValueError(f"vocabulary: id {token} is outside 0 .. {self.size - 1}")

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; `Vocabulary.from_dict` is the inverse."""
        return {**asdict(self.config), "codebook_sizes": dict(self.config.codebook_sizes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Vocabulary:
        return cls(VocabularyConfig(**data))  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the layout: equal digests mean equal ids."""
        layout = {name: [ids.start, ids.stop] for name, ids in self._ranges.items()}
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()
