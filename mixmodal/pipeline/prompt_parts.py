"""The parts of a prompt: how they are written in a JSONL file and on the command line, and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture

from mixmodal.config import suggestion
from mixmodal.document import EndOfTurn, Mask
from mixmodal.files import stays_inside
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.infilling import check_region
from mixmodal.tokenization.preprocessing import open_picture

KINDS, REGIONS = ("text", "image", "mask", "end_of_turn"), ("box", "region")
OPTIONS = {"--prompt": "text", **{f"--{name}": name for name in ("image", "mask", "box", "region")}}
"""Options of the command line by the key that they are short for."""
TURN = "--turn"
"""Its like without a value."""
ONE_KIND = "must have either a text, an image or a mask, or be an end_of_turn"
BOX = re.compile(r"\[?\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*\]?")


@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """One part of a prompt: a text, a picture, a mask in a text, or the end of a speaker's turn.

    Masks and regions are holes, for `infill`.

    Args:
        text: the text; empty where the part is another one.
        image: file of the picture.
        mask: number of the mask, which stands for a text.
        box: what is drawn anew of the picture, in pixels `[left, top, right, bottom]`.
        region: in its place a file of the picture's size, white where it is drawn anew.
        end_of_turn: true where it is the end of a turn, as between a question and its answer.
    """

    text: str = ""
    image: Path | None = None
    mask: int | None = None
    box: tuple[int, int, int, int] | None = None
    region: Path | None = None
    end_of_turn: bool = False

    @property
    def has_region(self) -> bool:
        """Whether it is a picture that is drawn anew in a region."""
        return self.box is not None or self.region is not None

    @property
    def described(self) -> dict[str, Any]:
        """It as plain data, paths as they were given."""
        if self.mask is not None:
            return {"mask": self.mask}
        if self.end_of_turn:
            return {"end_of_turn": True}
        if self.image is None:
            return {"text": self.text}
        box = {} if self.box is None else {"box": list(self.box)}
        return {"image": str(self.image), **box, **({} if self.region is None else {"region": str(self.region)})}

    def check(self, folder: Path, name: str) -> None:
        """Whether it is one of the kinds, and its pictures are there; nothing is opened.

        Args:
            folder: that paths are relative to.
            name: what messages call it.

        Raises:
            ValueError: naming it.
        """
        if [bool(self.text), self.image is not None, self.mask is not None, self.end_of_turn].count(True) != 1:
            raise ValueError(f"{name} {ONE_KIND}")
        if self.mask is not None and self.mask < 0:
            raise ValueError(f"{name}: mask is {self.mask}; it must be a whole number of at least 0")
        if self.has_region and self.image is None:
            given = "box" if self.box is not None else "region"
            raise ValueError(f"{name}: {given} says what of an image is drawn anew, and this part has none")
        if self.box is not None and self.region is not None:
            raise ValueError(f"{name}: give either box, in pixels, or region, a picture")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"{name}: box is {list(self.box)}; it must be [left, top, right, bottom]")
        for picture in (self.image, self.region):
            if picture is not None and not (folder / picture).is_file():
                raise ValueError(f"{name}: there is no picture at {folder / picture}")

    def open(self, folder: Path, name: str) -> str | Mask | EndOfTurn | Picture | PartialPicture:
        """What it stands for, pictures from their files.

        Raises:
            PictureError: naming the part, for a picture that is broken or too large.
            ValueError: likewise, for a region that does not lie in its picture.
        """
        if self.mask is not None:
            return Mask(self.mask)
        if self.end_of_turn:
            return EndOfTurn()
        if self.image is None:
            return self.text
        picture, region = open_picture(folder / self.image, f"{name} ({self.image})"), self.box
        if self.region is not None:
            region = open_picture(folder / self.region, f"{name} ({self.region})")
        if region is None:
            return picture
        try:
            check_region(region, picture.size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return PartialPicture(picture, region)


def read_part(entry: Any, name: str) -> PromptPart:
    """A part as it stands in a JSONL file, such as `{"text": "a red apple"}`.

    Raises:
        ValueError: naming the part and the key.
    """
    keys = set(entry) if isinstance(entry, dict) else set()
    for unknown in sorted(keys - {*KINDS, *REGIONS}):
        raise ValueError(f"{name}: there is no key {unknown!r}{suggestion(unknown, dict.fromkeys((*KINDS, *REGIONS)))}")
    if len(keys & set(KINDS)) != 1:
        raise ValueError(f"{name} is {str(entry)[:80]!r}; it {ONE_KIND}")
    values = {key: _read_value(key, value, f"{name}: {key}") for key, value in entry.items()}
    return PromptPart(**values)


def _read_value(key: str, value: Any, name: str) -> Any:
    """A value of a key as `PromptPart` has it."""
    given = repr(value)[:80]
    if key == "mask":
        if not _is_count(value):
            raise ValueError(f"{name} is {given}; it must be a whole number of at least 0")
        return value
    if key == "end_of_turn":
        if value is not True:
            raise ValueError(f"{name} is {given}; it must be true, or be left out")
        return value
    if key == "box":
        if not isinstance(value, list) or len(value) != 4 or not all(_is_count(one) for one in value):
            raise ValueError(f"{name} is {given}; it must be [left, top, right, bottom], in pixels from 0 on")
        return tuple(value)
    if not isinstance(value, str) or not (value if key == "text" else value.strip()):
        raise ValueError(f"{name} is {given}; it must be a string that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} has half a surrogate pair, which is no letter")
    if key == "text":
        return value
    if not stays_inside(value):
        raise ValueError(f"{name}: the path {value!r} leads out of the folder of the file")
    return Path(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def gather_parts(argv: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The arguments without `--prompt`, `--image`, `--mask`, `--turn`, `--box` and `--region`; and what these spell.

    A box or a region is of the picture right before it.

    Raises:
        ValueError: for one of them without a value or with a wrong one, or a region that follows no picture.
    """
    rest: list[str] = []
    parts: list[dict[str, Any]] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, _, value = argument.partition("=")
        if argument == TURN:
            parts.append({"end_of_turn": True})
            continue
        if name == TURN:
            raise ValueError(f"{argument}: --turn has no value; it ends a turn where it stands")
        if name not in OPTIONS:
            rest.append(argument)
            continue
        if name == argument:
            if not waiting or waiting[0].startswith("--"):
                raise ValueError(f"{name} needs a value; write {name}=VALUE for one that begins with --")
            value = waiting.pop(0)
        key = OPTIONS[name]
        if key not in REGIONS:
            parts.append({key: _number(value) if key == "mask" else value})
            continue
        if not parts or "image" not in parts[-1]:
            raise ValueError(f"{name} {value} says what of a picture is drawn anew; give it right behind --image FILE")
        if set(parts[-1]) & set(REGIONS):
            raise ValueError(f"{name} {value}: the picture before it has a region; give one --box or --region")
        parts[-1][key] = _box(value) if key == "box" else value
    return rest, parts


def _number(value: str) -> int:
    if not re.fullmatch(r"\d{1,9}", value):
        raise ValueError(
            f"--mask is {value!r}; it must be the number of a mask in a text, as 0 (a picture of what is drawn anew is "
            "a --region)"
        )
    return int(value)


def _box(value: str) -> list[int]:
    found = BOX.fullmatch(value.strip())
    if not found:
        raise ValueError(f"--box is {value!r}; it must be left,top,right,bottom, in pixels")
    return [int(one) for one in found.groups()]
