"""What a job of many items leaves line by line: shared between processes, and gone on with where it broke off."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmodal.files import append_line, read_object, write_whole

LAUNCHER = ("RANK", "WORLD_SIZE")
RECORDS, SETTINGS, SUMMARY = "records", "settings", "summary.json"
"""Files of a job's folder; the first two are stems, since shards have their own."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th item from that at `index` on."""

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

    @classmethod
    def choose(cls, text: str | None) -> Shard:
        """That of an option, or where it is None of the launcher."""
        return cls.launched() if text is None else cls.parse(text)

    def holds(self, number: int) -> bool:
        """Whether the item of this number is in it."""
        return number % self.count == self.index

    def name(self, stem: str, suffix: str) -> str:
        """A file of its own in a folder that shards share."""
        return f"{stem}.{suffix}" if self.count == 1 else f"{stem}.{self.index}-of-{self.count}.{suffix}"

    def describe_end(self, folder: Path) -> str:
        """What is told at the end of a shard beside which others are still at work."""
        return f"shard {self.index}/{self.count} is finished, the records are in {folder}; the last shard sums up"


def is_launched() -> bool:
    """Whether a launcher has started this process, beside others perhaps."""
    return all(name in os.environ for name in LAUNCHER)


def check_out(out: Path) -> None:
    """Whether a path can be the folder of a job.

    Raises:
        ValueError: where it is a file, or named as one.
    """
    if out.suffix == ".json" or out.is_file():
        raise ValueError(f"out is {out}; it must be a folder, which gets {RECORDS}.jsonl and {SUMMARY}")


@contextmanager
def own_folder(folder: Path, shard: Shard) -> Iterator[Path]:
    """A folder of the shard's own, whose files go to `folder` at the end: several shards may be the last at once."""
    own = folder / f".{shard.index}-of-{shard.count}"
    own.mkdir(parents=True, exist_ok=True)
    yield own
    for path in own.iterdir():
        os.replace(path, folder / path.name)
    own.rmdir()


class RecordLines:
    """A JSONL file with a line for each item that is finished or has failed; a later one of the same item counts.

    Only the places of lines are held. A last line that a crash has torn is dropped.

    Args:
        path: `STEM.jsonl` that lines are added to; where others `STEM*.jsonl` of the folder hold items of other shards,
            these are found, too.
        item: what messages call an item.

    Raises:
        ValueError: naming file and line, for a broken line before the last.
    """

    def __init__(self, path: Path, item: str = "prompt") -> None:
        self.path, self.item = path, item
        self._places: dict[str, tuple[Path, int]] = {}
        for other in sorted(path.parent.glob(f"{path.name.partition('.')[0]}*.jsonl")):
            if other != path:
                self._scan(other)
        if path.exists():
            end = self._scan(path)
            if end < path.stat().st_size:
                with open(path, "r+b") as file:
                    file.truncate(end)

    def _scan(self, path: Path) -> int:
        """Notes the places of lines; gives that behind the last whole one."""
        broken, place = 0, 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if broken:
                    raise ValueError(
                        f"{path}:{broken}: the line is broken; remove it, and its {self.item} is done again"
                    )
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("torn")
                    self._places[json.loads(line)["key"]] = path, place
                    place += len(line)
                except (ValueError, KeyError, TypeError):
                    broken = number
        return place

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line; a reader of the file sees it at once."""
        place = self.path.stat().st_size if self.path.exists() else 0
        append_line(self.path, entry)
        self._places[entry["key"]] = self.path, place

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def find(self, key: str) -> dict[str, Any] | None:
        """The last line of an item; None where there is none."""
        if key not in self._places:
            return None
        path, place = self._places[key]
        with open(path, "rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def file_of(self, key: str) -> Path:
        """The file with the last line of an item."""
        return self._places[key][0]


def write_json(path: Path, content: object) -> None:
    """Writes plain data as a JSON file at once; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a command.

    Raises:
        ValueError: naming it, where it is none.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or give another folder as out") from error


def check_settings(paths: Iterable[Path], settings: Mapping[str, Any], apart: Iterable[str] = ()) -> None:
    """Whether all that has been written to a folder is of the same settings.

    Args:
        paths: JSON files that hold the settings of what has been written.
        settings: of now, as plain JSON data.
        apart: keys of the files that are no settings.

    Raises:
        ValueError: naming the file and the first setting that differs.
    """
    now, apart = dict(flat(settings)), set(apart)
    for path in paths:
        before = dict(flat({key: value for key, value in read_json(path).items() if key not in apart}))
        for name in [*now, *before]:
            if now.get(name) != before.get(name):
                raise ValueError(
                    f"{path}: {name} was {json.dumps(before.get(name))} when this was written and is "
                    f"{json.dumps(now.get(name))} now; give the same settings to go on, or another folder as out"
                )


def hash_settings(settings: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON data, hexadecimal, in whatever order its keys are."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys with dots between them, and their values; the places of a list of objects count as keys."""
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
