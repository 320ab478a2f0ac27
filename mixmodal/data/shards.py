"""Shards in the img2dataset layout: tar files whose members share a key.

A pair is `KEY.png` (or jpg, webp, ...), `KEY.txt` and `KEY.json`. A document of any other order of parts is
`KEY.json` with `{"parts": [{"text": "..."}, {"image": "0.png"}, ...]}` and the members `KEY.0.png` and so on; a
conversation has `messages` in the place of `parts`, and a pair of answers also `chosen` and `rejected`, see
`mixmodal.data.conversations` and `mixmodal.data.preferences`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mixmodal.data.conversations import Message, check_task
from mixmodal.data.preferences import KEYS, dump_conversation, parse_conversation
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter, TooManySkipped, may_be_cut
from mixmodal.files import read_object, stays_inside, write_whole
from mixmodal.tokenization.preprocessing import open_picture

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
INDEX_NAME = "shards.json"
"""The shards of a folder with their numbers of samples, written last."""
UNFINISHED_NAME = ".unfinished"
"""Stands in a folder while `write_shards` fills it, and stays where that broke off: only then are shards removed."""
WRITABLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)
TAR_END = bytes(1024)


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture that is decoded when needed.

    Args:
        data: the bytes of the file.
        suffix: its format as a file suffix without the dot.
        name: names file and key in messages.
    """

    data: bytes = field(repr=False)
    suffix: str
    name: str

    def open(self, max_pixels: int) -> Image.Image:
        """Decodes to RGB; see `open_picture`.

        Raises:
            PictureError: where the picture is broken or too large.
        """
        return open_picture(self.data, self.name, max_pixels)


@dataclass(frozen=True)
class Sample:
    """Texts and pictures in order; a captioned picture is its text and then its picture.

    Args:
        key: names the sample within its shards.
        parts: strings and encoded pictures.
        metadata: what else is known, as plain JSON data.
        source: names shard and key in what is said about it.
        messages: of a conversation, whose the parts are, in order; otherwise none. `task` is in the metadata.
    """

    key: str
    parts: tuple[str | PictureFile, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        assert not self.messages or len(self.losses) == len(self.parts), "messages do not share out the parts"

    @property
    def losses(self) -> tuple[bool, ...]:
        """Which parts are trained on; all of them where the sample is no conversation."""
        if not self.messages:
            return (True,) * len(self.parts)
        return tuple(flag for message in self.messages for flag in message.loss)

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def pictures(self) -> list[PictureFile]:
        return [part for part in self.parts if isinstance(part, PictureFile)]


def find_shards(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """Tar files of folders (sorted by name) and single tar files, in the order given.

    Raises:
        ValueError: for a path that does not exist or a folder without shards.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path}: there are no shards; write them with `mixmodal prepare`")
        inside = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: the folder holds no *.tar; give a folder of shards or write one first")
        found += inside
    return found


def write_shards(
    samples: Iterable[Sample],
    folder: Path | str,
    shard_size: int = 1000,
    describe: Callable[[], Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Writes `00000.tar`, `00001.tar`, ... and the index of the folder.

    Each shard appears whole or not at all. Where `samples` raises, what came before is in the folder, without index
    and marked as unfinished.

    Args:
        samples: keys are letters, digits, `-` and `_`.
        folder: created where needed; it must not hold shards.
        shard_size: samples a shard.
        describe: called when all samples are written; what it returns goes into the index as `job`.

    Raises:
        ValueError: where the folder holds shards already, or for a key that can not be written.
    """
    folder = Path(folder)
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; it must be at least 1")
    if folder.exists() and any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: the folder holds shards already; remove it or choose another one")
    mark_unfinished(folder)
    stream = iter(samples)
    index: list[dict[str, Any]] = []
    for number in itertools.count():
        path = folder / f"{number:05d}.tar"
        written = _write_shard(itertools.islice(stream, shard_size), path)
        if not written:
            break
        index.append({"name": path.name, "samples": written})
    content = {"shards": index, **({"job": dict(describe())} if describe else {})}
    write_whole(folder / INDEX_NAME, json.dumps(content, indent=1).encode())
    (folder / UNFINISHED_NAME).unlink()
    return [folder / entry["name"] for entry in index]


def _write_shard(samples: Iterator[Sample], path: Path) -> int:
    """Number of samples written; no file where there is none."""
    from webdataset.writer import TarWriter

    part, keys = path.with_name(path.name + ".part"), set()
    try:
        with open(part, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                if sample.key in keys:
                    raise ValueError(f"{path}: the key {sample.key!r} comes twice; keys of a shard must differ")
                writer.write(_members(sample))
                keys.add(sample.key)
    except OSError as error:  # a full disk, say, which names no file: what is there has no proper end
        part.unlink(missing_ok=True)
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if keys and part.exists():
            os.replace(part, path)
        part.unlink(missing_ok=True)
    return len(keys)


def mark_unfinished(folder: Path) -> None:
    """Marks a folder that is about to be filled, or whose shards are to be written again, and removes its index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED_NAME).touch()
    (folder / INDEX_NAME).unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes the shards of a `write_shards` that broke off; a folder with index is left alone.

    Raises:
        ValueError: where the folder holds shards without index that are not marked as unfinished: someone else's.
    """
    if (folder / INDEX_NAME).is_file():
        return
    shards = sorted(folder.glob("*.tar"))
    if not (folder / UNFINISHED_NAME).is_file():
        if shards:
            raise ValueError(
                f"{folder}: holds {shards[0].name} and neither {INDEX_NAME} nor {UNFINISHED_NAME}, so these shards are "
                f"not of an unfinished job and are kept; move them or choose another folder"
            )
        return
    for path in [*shards, *folder.glob("*.part")]:
        path.unlink()


def _members(sample: Sample) -> dict[str, Any]:
    """Suffix -> bytes, as `webdataset.TarWriter` takes it."""
    if not WRITABLE_KEY.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r}: a key to write has 1 to 80 letters, digits, '-' or '_'")
    members: dict[str, Any] = {"__key__": sample.key}
    metadata = dict(sample.metadata)
    if not sample.messages and [type(part) for part in sample.parts] == [str, PictureFile]:
        text, picture = sample.parts
        members |= {picture.suffix: picture.data, "txt": text.encode()}  # type: ignore[union-attr]
    else:
        entries: list[dict[str, Any]] = []
        for number, part in enumerate(sample.parts):
            if isinstance(part, str):
                entries.append({"text": part})
            else:
                members[f"{number}.{part.suffix}"] = part.data
                entries.append({"image": f"{number}.{part.suffix}"})
        metadata |= dump_conversation(sample.messages, entries) if sample.messages else {"parts": entries}
    members["json"] = json.dumps(metadata, sort_keys=True).encode()
    return members


def read_samples(
    paths: Path | str | Sequence[Path | str], counter: SkipCounter | None = None, limits: SampleLimits | None = None
) -> Iterator[Sample]:
    """Samples of shards in order; pictures stay encoded.

    Args:
        paths: folders of shards or single shards.
        counter: takes the bad samples; without it the first bad one raises. Good ones are for the caller to count,
            who has yet to decode the pictures.
        limits: the longest text, for one.

    Raises:
        ValueError: where there are no shards.
        TooManySkipped: when the counter has had enough.
    """
    counter = counter or SkipCounter(min_samples=1)
    limits = limits or SampleLimits()
    for path in find_shards(paths):
        found = 0
        for members in _read_members(path, counter):
            found += 1
            try:
                sample = parse_members(members, f"{path}:{members['__key__']}", counter, limits)
            except SampleError as error:
                counter.skip(error)
            else:
                yield sample
        _check_index(path, found, counter)


def _read_members(path: Path, counter: SkipCounter) -> Iterator[dict[str, Any]]:
    """Groups of members as suffix -> bytes with `__key__`; trouble with the archive goes to the counter."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    seen: set[str] = set()

    def note(error: Exception) -> bool:
        """Counts a broken archive once, and other trouble each time; the counter's own word passes through."""
        if isinstance(error, TooManySkipped):  # webdataset adds what it was reading to the arguments of every error
            raise TooManySkipped(str(error.args[0]).rsplit(" @ <", 1)[0]) from None
        broken = isinstance(error, BROKEN_TAR)
        text = str(error.args[0]).split(" @ ")[0] if error.args else type(error).__name__
        if not broken or "broken shard" not in seen:
            counter.skip(SampleError("broken shard", f"{path}: {text}; samples behind this place are lost"))
        seen.update({"broken shard"} if broken else ())
        return True

    def is_safe(name: str) -> bool:
        if stays_inside(name):
            return True
        pure = PurePosixPath(name.replace("\\", "/"))
        key = f"{pure.parent}/{pure.name.split('.')[0]}"
        if key not in seen:
            counter.skip(SampleError("unsafe name", f"{path}: the member name {name!r} leads out of the folder"))
        seen.add(key)
        return False

    with open(path, "rb") as file:  # webdataset leaves files that it opens itself to the garbage collector
        stream = [{"url": str(path), "stream": file}]
        yield from group_by_keys(tar_file_expander(stream, handler=note, select_files=is_safe), handler=note)
    if "broken shard" not in seen and not _has_end(path):
        note(tarfile.ReadError("the end of the archive is missing, it is truncated"))


def _has_end(path: Path) -> bool:
    """Whether a tar file ends with the zeros that close it; readers stop without a word at a broken header."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(TAR_END), 0))
        return file.read() == TAR_END


def _check_index(path: Path, found: int, counter: SkipCounter) -> None:
    """Compares with the index of the folder, where one lists the shard; a ValueError names it where it is none."""
    index = path.parent / INDEX_NAME
    if not index.is_file():
        return
    try:
        expected = {entry["name"]: entry["samples"] for entry in read_object(index)["shards"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index}: it lists no shards ({error!r}); write them again, or remove it") from error
    for _ in range(found, expected.get(path.name, found)):
        message = f"{path}: {found} samples where {index} lists {expected[path.name]}"
        counter.skip(SampleError("lost sample", message))


def parse_members(members: Mapping[str, Any], source: str, counter: SkipCounter, limits: SampleLimits) -> Sample:
    """Members of one key as a sample.

    Raises:
        SampleError: where a part is missing, empty or not what it claims to be.
    """
    metadata = _metadata(members.get("json", b"{}"), source)
    messages: tuple[Message, ...] = ()
    if "messages" in metadata:
        check_task(metadata.get("task"), source)
        messages, entries = parse_conversation(metadata, source)
        metadata = {key: value for key, value in metadata.items() if key not in KEYS}
        parts = tuple(_part(entry, members, source) for entry in entries)
    elif isinstance(metadata.get("parts"), list):
        parts = tuple(_part(part, members, source) for part in metadata.pop("parts"))
    else:
        pictures = [suffix for suffix in PICTURE_SUFFIXES if suffix in members]
        if len(pictures) != 1:
            raise SampleError("no picture", f"{source}: {len(pictures)} pictures instead of one")
        caption = _decode(members["txt"], source) if "txt" in members else metadata.get("caption")
        if not isinstance(caption, str):
            raise SampleError("no caption", f"{source}: neither a .txt nor a caption in the .json")
        parts = (caption.strip(), PictureFile(members[pictures[0]], pictures[0], f"{source}.{pictures[0]}"))
    if not parts:
        raise SampleError("empty document", f"{source}: the list of parts is empty")
    cut = may_be_cut(messages, metadata)
    parts = tuple(check_text(part, source, counter, limits, cut) if isinstance(part, str) else part for part in parts)
    return Sample(members["__key__"], parts, metadata, source, messages)


def _metadata(data: bytes, source: str) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except ValueError as error:
        raise SampleError("broken metadata", f"{source}: the .json can not be read ({error})") from error
    if not isinstance(metadata, dict):
        raise SampleError("broken metadata", f"{source}: the .json is not an object")
    return metadata


def _part(part: Any, members: Mapping[str, Any], source: str) -> str | PictureFile:
    """One entry of an interleaved document."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    name = part.get("image") if isinstance(part, dict) else None
    if not isinstance(name, str) or name.startswith("__"):
        raise SampleError("broken metadata", f"{source}: the part {str(part)[:80]!r} is neither a text nor an image")
    if name.lower() not in members:
        raise SampleError("no picture", f"{source}: the member {name[:80]!r} is missing")
    return PictureFile(members[name.lower()], name.rsplit(".", 1)[-1].lower(), f"{source}.{name}")


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SampleError("broken text", f"{source}: the text is not UTF-8 ({error})") from error


def check_text(text: str, source: str, counter: SkipCounter, limits: SampleLimits, cut: bool = True) -> str:
    """The text, cut to the longest that is allowed where `cut` is set.

    Raises:
        SampleError: for an empty text, one that UTF-8 can not hold, or one that is too long and may not be cut.
    """
    if not text.strip():
        raise SampleError("empty text", f"{source}: the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("broken text", f"{source}: lone surrogate at character {error.start}") from error
    words = list(itertools.islice(re.finditer(r"\S+", text), limits.max_caption_words + 1))
    if len(words) > limits.max_caption_words:
        if not cut:
            told = f"{source}: a text has more than {limits.max_caption_words} words; raise limits.max_caption_words"
            raise SampleError("text too long", told)
        message = f"{source}: cut to the first {limits.max_caption_words} words"
        counter.alter("truncated text", message)
        return text[: words[-2].end()]
    return text
