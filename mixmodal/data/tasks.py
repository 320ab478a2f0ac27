"""Tasks as templates: records with fields, as of pairs, edits or questions, become conversations or documents.

    tasks:
      editing:
        - [{user: "{image1} {edit}"}, {assistant: "{image2}"}]
        - [{user: "Change this picture. {edit} {image1}"}, {assistant: "{image2}"}]

    {"key": "a7", "task": "editing", "image1": "a.png", "edit": "Make it blue.", "image2": "b.png"}

A wording is a list of messages, of which the assistant's are trained on (Chameleon, arXiv 2405.09818, section 3.2), or
one text, which becomes a document that is trained on as a whole (CM3Leon, arXiv 2309.02591, table 5).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np

from mixmodal.config import read_yaml
from mixmodal.data.conversations import ROLES, parse_messages
from mixmodal.data.skipping import SampleError

OBJECTS = "objects"
"""The field of boxes."""
ANSWER = "answer"
NAME = re.compile(r"[a-z][a-z0-9_]*")
PICTURE = re.compile(r"image[0-9]*")
TAKEN = ("messages", "parts")
"""Keys that records can not have: they are what a record is turned into."""
Entry = dict[str, Any]
MoveBoxes = Callable[[Any, Mapping[str, bool], str], Any]
"""See `mixmodal.data.boxes.BoxMover.move`."""


class Place(NamedTuple):
    """Where the value of a field stands in a text; a picture where it is called `image`, `image1`, `image2`, ..."""

    field: str

    @property
    def is_picture(self) -> bool:
        return PICTURE.fullmatch(self.field) is not None


class Line(NamedTuple):
    """What one speaker says, or a whole document, whose role is None."""

    role: str | None
    pieces: tuple[str | Place, ...]

    @property
    def fields(self) -> list[str]:
        return [piece.field for piece in self.pieces if isinstance(piece, Place)]

    def fill(self, values: Mapping[str, str]) -> list[Entry]:
        """Entries `{"text": ...}` and `{"image": ...}`, without the white space at a picture and at the ends."""
        entries: list[Entry] = []
        text = ""
        for piece in self.pieces:
            if isinstance(piece, Place) and piece.is_picture:
                entries += [*_text(text), {"image": values[piece.field]}]
                text = ""
            else:
                text += values[piece.field] if isinstance(piece, Place) else piece
        return [*entries, *_text(text)]


Wording = tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """The templates of a file.

    Args:
        tasks: wordings by the name of the task. A wording is a list of messages, each `{user: TEXT}`,
            `{assistant: TEXT}` or, as the first, `{system: TEXT}`, or it is one text. A text has places `{caption}` for
            the record's fields; `{{` and `}}` are braces. All wordings of a task have the same fields.
        seed: of the draws of wordings.
    """

    tasks: dict[str, list[Any]]
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, dict) or not self.tasks:
            raise ValueError("tasks is empty, or no mapping; give at least one task with its wordings")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; give a whole number, 0 or more")


class TaskTemplates:
    """Fills records into templates.

    Args:
        config: the templates.

    Raises:
        ValueError: for a wording that gives neither a conversation nor a document; it names task and wording.
    """

    def __init__(self, config: TasksConfig) -> None:
        self.seed = config.seed
        self.wordings = {task: _parse_task(task, wordings) for task, wordings in config.tasks.items()}

    @classmethod
    def load(cls, path: Path) -> TaskTemplates:
        """The templates of a YAML file.

        Raises:
            ValueError: where it can not be read or holds something else; the message names the file.
        """
        found = read_yaml(path)
        names = [entry.name for entry in fields(TasksConfig)]
        if "tasks" not in found:
            raise ValueError(f"{path}: the key tasks is missing, with wordings by the name of the task")
        for key in found:
            if key not in names:
                raise ValueError(f"{path}: there is no key {key!r}; take {' and '.join(names)}")
        try:
            return cls(TasksConfig(**found))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def digest(self) -> str:
        """Names what the samples follow from."""
        return hashlib.sha256(repr((self.seed, sorted(self.wordings.items()))).encode()).hexdigest()[:16]

    def fields(self, task: str) -> list[str]:
        """Fields of a task, in the order of its first wording."""
        return list(dict.fromkeys(chain.from_iterable(line.fields for line in self.wordings[task][0])))

    def draw(self, task: str, key: str) -> int:
        """The wording of a record, from 0: a function of seed, task and key."""
        digest = hashlib.sha256(f"{task}\n{key}".encode("utf-8", "surrogatepass")).digest()
        generator = np.random.default_rng((self.seed, int.from_bytes(digest[:16], "big")))
        return int(generator.integers(len(self.wordings[task])))

    def fill(self, row: Entry, source: str, move: MoveBoxes | None = None) -> Entry:
        """A row of `messages` or `parts`, with what stands beside the fields of the task.

        Args:
            row: a record with `task` and its fields; the wording is drawn for its `key` or `id`, or else for its place
                in the file.
            source: names file, line and key.
            move: changes the value of `objects`, given the files of pictures, and which of them carry loss.

        Raises:
            SampleError: for an unknown task, a missing or empty field, or not the pictures that the task has.
        """
        task = row.get("task")
        if not isinstance(task, str) or task not in self.wordings:
            known = ", ".join(self.wordings)
            raise SampleError("unknown task", f"{source}: the task {str(task)[:40]!r} has no template; take {known}")
        wanted = self.fields(task)
        key = next((row[name] for name in ("key", "id") if isinstance(row.get(name), str | int)), Path(source).name)
        wording = self.wordings[task][self.draw(task, str(key))]
        values = {field: self._value(task, field, row, source) for field in wanted if field != OBJECTS}
        if OBJECTS in wanted:
            moved = move(row[OBJECTS], _pictures(wording, values), source) if move and OBJECTS in row else None
            values[OBJECTS] = self._value(task, OBJECTS, row if moved is None else {**row, OBJECTS: moved}, source)
        pictures = [name for name in row if PICTURE.fullmatch(name) and name not in wanted and row[name] is not None]
        if pictures:
            message = f"{source}: {', '.join(pictures)} has no place in the task {task}, which has {', '.join(wanted)}"
            raise SampleError("wrong number of pictures", message)
        for name in TAKEN:
            if name in row:
                raise SampleError("broken metadata", f"{source}: {name} stands beside the fields of the task {task}")
        rest = {name: value for name, value in row.items() if name not in wanted}
        return {**rest, "task": task, **_filled(wording, values)}

    def _value(self, task: str, field: str, row: Entry, source: str) -> str:
        """What stands in a field, as text or as the name of a file."""
        value = row.get(field)
        if value is None:
            wanted = ", ".join(self.fields(task))
            raise SampleError("missing field", f"{source}: the task {task} has {wanted}, and {field} is missing")
        place = f"{source}: {field}"
        if Place(field).is_picture:
            names = value if isinstance(value, list) else [value]
            if len(names) != 1:
                message = f"{place} holds {len(names)} pictures where the task {task} has one"
                raise SampleError("wrong number of pictures", message)
            if not isinstance(names[0], str) or not names[0]:
                raise SampleError("no picture", f"{place} is {str(names[0])[:40]!r}; give the name of a file")
            return names[0]
        if field == OBJECTS:
            return spell_objects(value, place)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise SampleError("broken metadata", f"{place} is {str(value)[:40]!r}; give a text or a number")
        if not str(value).strip():
            lines = chain.from_iterable(self.wordings[task])
            is_answer = field == ANSWER or any(line.role == "assistant" and field in line.fields for line in lines)
            raise SampleError("empty answer" if is_answer else "empty text", f"{place} is empty")
        return str(value).strip()


def spell_objects(value: Any, place: str) -> str:
    """Objects with their boxes as text, `dog at location (10, 20) -> (60, 90), ...` (arXiv 2309.02591, table 5).

    Args:
        value: a list of `{"name": ..., "box": [left, top, right, bottom]}`, in pixels of the picture as it is trained
            on; fractions are rounded.
        place: names it in messages.

    Raises:
        SampleError: where it is not, or a box has no area.
    """
    if not isinstance(value, list) or not value:
        raise SampleError("broken box", f"{place} is no list, or empty; give one of name and box")
    spelled: list[str] = []
    for number, entry in enumerate(value, start=1):
        name, box = (entry.get("name"), entry.get("box")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name.strip():
            raise SampleError("broken box", f"{place}, object {number} has no name")
        left, top, right, bottom = map(round, sides_of(box, f"{place}, object {number}"))
        spelled.append(f"{name.strip()} at location ({left}, {top}) -> ({right}, {bottom})")
    return ", ".join(spelled)


def sides_of(box: Any, place: str) -> list[float]:
    """Left, top, right and bottom of a box.

    Raises:
        SampleError: where it has no area, or is none.
    """
    if isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box):
        left, top, right, bottom = box
        if 0 <= left < right < np.inf and 0 <= top < bottom < np.inf:
            return box
    raise SampleError("broken box", f"{place}: the box {str(box)[:60]} is not [left, top, right, bottom] in pixels")


def _pictures(wording: Wording, values: Mapping[str, str]) -> dict[str, bool]:
    """Files of the pictures of a wording, and whether they carry loss."""
    places = [(line, piece) for line in wording for piece in line.pieces if isinstance(piece, Place)]
    return {values[piece.field]: line.role in (None, "assistant") for line, piece in places if piece.is_picture}


def _text(text: str) -> list[Entry]:
    return [{"text": text.strip()}] if text.strip() else []


def _filled(wording: Wording, values: Mapping[str, str]) -> Entry:
    if wording[0].role is None:
        return {"parts": wording[0].fill(values)}
    return {"messages": [{"role": line.role, "parts": line.fill(values)} for line in wording]}


def _parse_task(task: Any, wordings: Any) -> list[Wording]:
    """The wordings of a task, each tried with a value in every place."""
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"task {task!r}: its name is no text; put it in quotes")
    if not isinstance(wordings, list) or not wordings:
        raise ValueError(f"task {task}: it has no wordings; give a list of them")
    parsed: list[Wording] = []
    for number, wording in enumerate(wordings, start=1):
        place = f"task {task}, wording {number}"
        found = _parse_wording(wording, place)
        fields = {field for line in found for field in line.fields}
        if not fields:
            raise ValueError(f"{place}: it has no place for a field, as {{caption}}")
        others = {field for line in (parsed or [found])[0] for field in line.fields}
        if fields != others:
            raise ValueError(
                f"{place}: it has {', '.join(sorted(fields))}, and wording 1 has {', '.join(sorted(others))}; all "
                "wordings of a task have the same fields"
            )
        if found[0].role is not None:
            try:
                parse_messages(_filled(found, dict.fromkeys(fields, "x"))["messages"], place)
            except SampleError as error:
                raise ValueError(str(error)) from error
        parsed.append(found)
    return parsed


def _parse_wording(wording: Any, place: str) -> Wording:
    if isinstance(wording, str):
        return (Line(None, _parse_text(wording, place)),)
    if not isinstance(wording, Sequence) or not wording:
        raise ValueError(f"{place}: it is {str(wording)[:60]!r}; give a list of messages, or one text")
    lines: list[Line] = []
    for number, message in enumerate(wording, start=1):
        entry = next(iter(message.items())) if isinstance(message, dict) and len(message) == 1 else ("", None)
        if entry[0] not in ROLES or not isinstance(entry[1], str):
            allowed = ", ".join(f"{{{role}: TEXT}}" for role in ROLES)
            raise ValueError(f"{place}, message {number} is {str(message)[:60]!r}; give one of {allowed}")
        lines.append(Line(entry[0], _parse_text(entry[1], f"{place}, message {number}")))
    return tuple(lines)


def _parse_text(text: str, place: str) -> tuple[str | Place, ...]:
    pieces: list[str | Place] = []
    try:
        for literal, field, spec, conversion in Formatter().parse(text):
            pieces += [literal] if literal else []
            if field is None:
                continue
            if not NAME.fullmatch(field) or spec or conversion:
                raise ValueError("a place is a name in braces, as {caption}, and braces of the text are doubled")
            pieces.append(Place(field))
    except ValueError as error:
        raise ValueError(f"{place}: {text[:60]!r}: {error}") from error
    return tuple(pieces)
