"""Prompts as users write them: parts on the command line, or a JSONL file with a prompt each line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture

from mixmodal.config import suggestion
from mixmodal.files import naming, stays_inside
from mixmodal.tokenization.preprocessing import open_picture

LINE_KEYS = ("key", "prompt", "parts", "seed", "num")
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
LAUNCHER = ("RANK", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """One part of a prompt: a text or a picture.

    Args:
        text: the text; empty where the part is a picture.
        image: file of the picture; null where the part is text.
    """

    text: str = ""
    image: Path | None = None


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
    def described(self) -> list[dict[str, str]]:
        """The parts as plain data, paths as they were given."""
        return [{"text": part.text} if part.image is None else {"image": str(part.image)} for part in self.parts]

    @property
    def caption(self) -> str:
        """Its texts, in one line."""
        return " ".join(" ".join(part.text for part in self.parts).split())

    def check(self) -> None:
        """Whether each part is a text or a picture that is there; nothing is opened.

        Raises:
            ValueError: naming the part.
        """
        for place, part in enumerate(self.parts):
            if (part.image is None) == (not part.text):
                raise ValueError(f"part {place} of {self.name} must have either a text or an image")
            if part.image is not None and not (self.folder / part.image).is_file():
                raise ValueError(f"part {place} of {self.name}: there is no picture at {self.folder / part.image}")

    def open(self) -> list[str | Picture]:
        """Texts, and pictures from their files.

        Raises:
            PictureError: naming the part, for a picture that is broken or too large.
        """
        return [
            part.text
            if part.image is None
            else open_picture(self.folder / part.image, f"part {place} of {self.name} ({part.image})")
            for place, part in enumerate(self.parts)
        ]


@dataclass(frozen=True)
class Shard:
    """Every `count`-th prompt from that at `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`INDEX/COUNT`.

        Raises:
            ValueError: for anything else, or an index that is not below the count.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"shard is {text!r}; it must be INDEX/COUNT with an index below the count, as 0/4 to 3/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def launched(cls) -> Shard:
        """This process's among those that a launcher has started; the whole without one.

        Raises:
            ValueError: where RANK and WORLD_SIZE do not fit together.
        """
        return cls.parse("/".join(os.environ[name] for name in LAUNCHER)) if is_launched() else cls()

    def name(self, stem: str, suffix: str) -> str:
        """A file of its own in a folder that shards share."""
        return f"{stem}.{suffix}" if self.count == 1 else f"{stem}.{self.index}-of-{self.count}.{suffix}"


def is_launched() -> bool:
    """Whether a launcher has started this process, beside others perhaps."""
    return all(name in os.environ for name in LAUNCHER)


def read_prompts(path: Path, num: int, seed: int, shard: Shard) -> Iterator[NamedPrompt]:
    """The prompts of a JSONL file that are in a shard; all of them are checked.

    Args:
        num, seed: of prompts that do not say their own.

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
            prompt.check()
            if (len(lines) - 1) % shard.count == shard.index:
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
    return tuple(_read_part(entry, f"part {place} of {name}") for place, entry in enumerate(entries))


def _read_part(entry: Any, name: str) -> PromptPart:
    (kind, value), *more = entry.items() if isinstance(entry, dict) and entry else [("", None)]
    if more or kind not in ("text", "image") or not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {str(entry)[:80]!r}; it must have either a text or an image, not an empty one")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} has half a surrogate pair, which is no letter")
    if kind == "text":
        return PromptPart(text=value)
    if not stays_inside(value):
        raise ValueError(f"{name}: the path {value!r} leads out of the folder of the file")
    return PromptPart(image=Path(value))
