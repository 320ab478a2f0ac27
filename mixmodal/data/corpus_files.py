"""Corpora in folders and in files of JSON lines, with the pictures beside them, as samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixmodal.data.shards import PICTURE_SUFFIXES, PictureFile, Sample, check_text
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.files import stays_inside

CAPTIONS_NAME = "captions.jsonl"
TEXT_KEYS = ("text", "caption")
IMAGE_KEYS = ("image", "file_name")
Reader = Callable[[Path, SkipCounter, SampleLimits], Iterator[Sample]]


def read_folder(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Pictures with a text file of the same name, at any depth in the order of their names, or `captions.jsonl`.

    Raises:
        ValueError: where the folder is none, or holds no picture.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: a corpus of kind folder must be a folder")
    if (path / CAPTIONS_NAME).is_file():
        yield from read_jsonl(path / CAPTIONS_NAME, counter, limits)
        return
    pictures = sorted(entry for entry in path.rglob("*") if entry.suffix[1:].lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise ValueError(f"{path}: the folder holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    for picture in pictures:
        try:
            yield _captioned(picture, counter, limits)
        except SampleError as error:
            counter.skip(error)


def _captioned(picture: Path, counter: SkipCounter, limits: SampleLimits) -> Sample:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise SampleError("no caption", f"{picture}: there is no {text.name} beside it")
    try:
        caption = text.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError("broken text", f"{text}: the text is not UTF-8 ({error})") from error
    parts = (check_text(caption, str(text), counter, limits), _read_picture(picture, str(picture)))
    return Sample(picture.stem, parts, {}, str(picture))


def read_jsonl(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Lines with a picture and its caption, or with parts.

    Raises:
        ValueError: where there is no such file.
    """
    yield from read_rows(path, "jsonl", counter, lambda row, at: _row_sample(row, path.parent, at, counter, limits))


def read_rows(
    path: Path, kind: str, counter: SkipCounter, build: Callable[[dict[str, Any], str], Sample]
) -> Iterator[Sample]:
    """Samples of the objects of a file: one a line, or, in a file that begins with `[`, one an entry of that list.

    Args:
        path: of the file.
        kind: of the corpus, for messages.
        counter: takes the bad ones.
        build: makes a sample of an object and of what names it: file, line (or entry) and, in brackets, its key.

    Raises:
        ValueError: where there is no such file, or its list is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path}: a corpus of kind {kind} must be a file")
    for source, line in _lines(path):
        try:
            row = _parse(line, source) if isinstance(line, bytes) else line
            if not isinstance(row, dict):
                raise SampleError("broken metadata", f"{source}: the line is not an object")
            key = next((row[name] for name in ("key", "id") if isinstance(row.get(name), str | int)), None)
            yield build(row, source if key is None else f"{source} ({str(key)[:80]})")
        except SampleError as error:
            counter.skip(error)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a file, or the entries of its list, with what names them."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
        if not start.startswith(b"[") or path.suffix == ".jsonl":
            file.seek(0)
            yield from ((f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip())
            return
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: it begins as a list of JSON objects, but is not JSON ({error})") from error
    yield from ((f"{path}, entry {number}", row) for number, row in enumerate(rows, start=1))


def _parse(line: bytes, source: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise SampleError("broken metadata", f"{source}: not JSON ({error})") from error


def _row_sample(row: dict[str, Any], folder: Path, source: str, counter: SkipCounter, limits: SampleLimits) -> Sample:
    used = {"parts", *TEXT_KEYS, *IMAGE_KEYS}
    entries = (
        row.get("parts") if "parts" in row else [{"text": first(row, TEXT_KEYS)}, {"image": first(row, IMAGE_KEYS)}]
    )
    if not isinstance(entries, list) or not entries:
        raise SampleError("empty document", f"{source}: parts is no list, or empty")
    parts = tuple(read_part(entry, folder, source, counter, limits) for entry in entries)
    return Sample(source, parts, {key: value for key, value in row.items() if key not in used}, source)


def first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of the keys that is there; None where none is."""
    return next((row[key] for key in keys if key in row), None)


def read_part(
    entry: Any, folder: Path, source: str, counter: SkipCounter, limits: SampleLimits, cut: bool = True
) -> str | PictureFile:
    """A text, cut to the longest that is allowed where `cut` is set, or the picture of a file in the folder.

    Raises:
        SampleError: for an empty text, one that is too long and may not be cut, a file that is missing or outside, or
            what is neither.
    """
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return check_text(entry["text"], source, counter, limits, cut)
    if isinstance(entry, dict) and isinstance(entry.get("image"), str):
        return read_picture(folder, entry["image"], source)
    if entry == {"text": None}:
        raise SampleError("no caption", f"{source}: none of the keys {', '.join(TEXT_KEYS)} is there")
    if entry == {"image": None}:
        raise SampleError("no picture", f"{source}: none of the keys {', '.join(IMAGE_KEYS)} is there")
    raise SampleError("broken metadata", f"{source}: the part {str(entry)[:80]!r} is neither a text nor an image")


def read_picture(folder: Path, name: str, source: str) -> PictureFile:
    """The picture of a file in the folder.

    Raises:
        SampleError: for a file that is missing or outside.
    """
    return _read_picture(_inside(folder, name, source), f"{source}:{name}")


def _inside(folder: Path, name: str, source: str) -> Path:
    """A path of a corpus file, which must not lead out of its folder."""
    if not stays_inside(name):
        raise SampleError("unsafe name", f"{source}: the path {name!r} leads out of the folder")
    return folder / name


def _read_picture(path: Path, name: str) -> PictureFile:
    suffix = path.suffix[1:].lower()
    try:  # decoders look at the bytes; the suffix only has to be one that readers of shards take for a picture
        return PictureFile(path.read_bytes(), suffix if suffix in PICTURE_SUFFIXES else "png", name)
    except OSError as error:
        raise SampleError("no picture", f"{name}: the file can not be read ({error.strerror})") from error
