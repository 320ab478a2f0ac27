"""Prompts as users write them: parts on the command line, or a JSONL file with a prompt each line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture

from mixmodal.config import suggestion
from mixmodal.document import EndOfTurn, Mask
from mixmodal.files import naming
from mixmodal.pipeline.holes import Holes, PartialPicture
from mixmodal.pipeline.prompt_parts import PromptPart, read_part
from mixmodal.records import Shard

LINE_KEYS = ("key", "prompt", "parts", "seed", "num")
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True, kw_only=True)
class NamedPrompt:
    """A prompt, and what is wanted of it.

    Args:
        parts: in order.
        num: samples.
        seed: of their drawing.
        key: its files begin with it; empty for the only prompt.
        name: what messages call it.
        folder: that paths of pictures are relative to.
    """

    parts: tuple[PromptPart, ...]
    num: int
    seed: int
    key: str = ""
    name: str = "the prompt"
    folder: Path = field(default_factory=Path)

    @property
    def described(self) -> list[dict[str, Any]]:
        """The parts as plain data, paths as they were given."""
        return [part.described for part in self.parts]

    @property
    def caption(self) -> str:
        """Its texts, in one line."""
        return " ".join(" ".join(part.text for part in self.parts).split())

    @property
    def holes(self) -> Holes:
        """What is to be filled in."""
        masks = [part.mask for part in self.parts if part.mask is not None]
        return Holes(masks, [place for place, part in enumerate(self.parts) if part.has_region], len(self.parts))

    def check(self) -> None:
        """Whether there is a prompt, each part is one, and its pictures are there; nothing is opened.

        Raises:
            ValueError: naming the prompt or the part.
        """
        for place, part in enumerate(self.parts):
            part.check(self.folder, f"part {place} of {self.name}")
        if all(part.text.isspace() for part in self.parts):
            raise ValueError(f"{self.name}: there is nothing but white space")

    def open(self) -> list[str | Mask | EndOfTurn | Picture | PartialPicture]:
        """What the parts stand for, pictures from their files.

        Raises:
            PictureError: naming the part, for a picture that is broken or too large.
            ValueError: likewise, for a region that does not lie in its picture.
        """
        return [part.open(self.folder, f"part {place} of {self.name}") for place, part in enumerate(self.parts)]


def read_prompts(
    path: Path, num: int, seed: int, shard: Shard, check: Callable[[NamedPrompt], None] = NamedPrompt.check
) -> Iterator[NamedPrompt]:
    """The prompts of a JSONL file that are in a shard; all of them are checked.

    Args:
        num, seed: of prompts that do not say their own.
        check: raises a ValueError for a prompt that can not be drawn.

    Raises:
        ValueError: naming file, line and key: for a line that is no prompt, a picture that is missing or outside the
            file's folder, a key that can not begin the name of a file, or is there twice; for a file without prompts.
        OSError: naming the file, where it can not be read.
    """
    lines: dict[str, int] = {}
    with naming(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            prompt = _read_line(line, path, number, num, seed)
            first = lines.setdefault(prompt.key.lower(), number)  # as file systems without case have it
            if first != number:
                raise ValueError(f"{prompt.name}: line {first} has this key, too (case does not count)")
            check(prompt)
            if shard.holds(len(lines) - 1):
                yield prompt
    if not lines:
        raise ValueError(f"{path}: there is no prompt in the file")


def _read_line(line: bytes, path: Path, number: int, num: int, seed: int) -> NamedPrompt:
    source = f"{path}:{number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: the line is not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: the line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{source}: the line must be an object such as {{"prompt": "a red apple"}}')
    key = row.get("key", f"{number:06d}")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ValueError(
            f"{source}: key is {str(key)[:80]!r}; it begins the names of files, so it must be a string of 1 to 80 "
            "letters a to z, digits, - and _"
        )
    name = f"{source} ({key})"
    for unknown in sorted(set(row) - set(LINE_KEYS)):
        raise ValueError(f"{name}: there is no key {unknown!r}{suggestion(unknown, dict.fromkeys(LINE_KEYS))}")
    return NamedPrompt(
        parts=_read_parts(row, name),
        num=_read_count(row, "num", num, 1, name),
        seed=_read_count(row, "seed", seed, 0, name),
        key=key,
        name=name,
        folder=path.parent,
    )


def _read_count(row: Mapping[str, Any], key: str, default: int, least: int, name: str) -> int:
    value = row.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: {key} is {str(value)[:80]}; it must be a whole number of at least {least}")
    return value


def _read_parts(row: Mapping[str, Any], name: str) -> tuple[PromptPart, ...]:
    if ("prompt" in row) == ("parts" in row):
        raise ValueError(f"{name}: give either prompt, a text, or parts")
    entries = row["parts"] if "parts" in row else [{"text": row["prompt"]}]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{name}: parts must be a list such as [{{"text": "a red apple"}}, {{"image": "a.png"}}]')
    return tuple(read_part(entry, f"part {place} of {name}") for place, entry in enumerate(entries))
