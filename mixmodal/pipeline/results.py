"""What the generate command leaves: samples as files, `results.json`, and for many prompts a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Pictures
from PIL.Image import Image as Picture
from PIL.PngImagePlugin import PngInfo

from mixmodal.evaluation.sheet import draw_captioned
from mixmodal.files import append_line, replacing, write_whole
from mixmodal.pipeline.masked_text import FilledText
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.prompt_files import NamedPrompt
from mixmodal.retrieval.retriever import Retrieved

RESULTS, SHEET = "results", "contact_sheet"
"""Stems of files; those of a shard say which."""
OF_THE_SHARD = ("shard", "counts", "results")
"""What differs between the `results.json` of shards of one call."""
SHEET_PICTURES, SHEET_SIDE = 64, 256
"""Pictures on a contact sheet at most, and their side in pixels."""


def write_sample(sample: Any, number: int, folder: Path, key: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the parts of one sample, each file at once; gives its entry of `results.json`.

    Of masks that are filled the whole text is the part, and what stands for each is in the entry alone.

    Args:
        key: of its prompt; empty for the only one.
        described: what made it, for the PNG files.
    """
    if isinstance(sample, FilledText):
        masks = [{"mask": mask, "text": text} for mask, text in sample.masks.items()]
        return {**write_sample(sample.text, number, folder, key, described), "masks": masks}
    parts = sample if isinstance(sample, list) else [sample]
    entries: list[dict[str, str]] = []
    for place, part in enumerate(parts):
        stem = _stem(key, f"{number:04d}" if part is sample else f"{number:04d}_{place}")
        if isinstance(part, Picture):
            _save_picture(part, folder / f"{stem}.png", {**described, "sample": number})
            entries.append({"image": f"{stem}.png"})
        else:
            write_whole(folder / f"{stem}.txt", str(part).encode())
            entries.append({"text": str(part), "file": f"{stem}.txt"})
    return {"sample": number, "parts": entries}


def write_documents(
    model: MixedModal, documents: Sequence[Retrieved], folder: Path, key: str = ""
) -> list[dict[str, Any]]:
    """Writes the pictures of retrieved documents; gives their entries of `results.json`, in the order of reading."""
    contents = model.codec.from_documents([model.format.parse(one.ids) for one in documents])
    entries = [one.to_dict() for one in documents]
    for number, (entry, content) in enumerate(zip(entries, contents)):
        entry["parts"] = []
        for place, part in enumerate(content):
            if isinstance(part, Picture):
                several = sum(isinstance(one, Picture) for one in content) > 1
                name = f"retrieved_{number:02d}_{place}" if several else f"retrieved_{number:02d}"
                name = f"{_stem(key, name)}.png"
                _save_picture(part, folder / name, {})
                entry["parts"].append({"image": name})
            else:
                entry["parts"].append({"text": str(part)})
    return entries


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes a `results.json`; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def write_sheet(path: Path, pictures: Sequence[tuple[Path, str]]) -> None:
    """A contact sheet of the first picture files, each with its caption beneath; of a single one there is none."""
    if len(pictures) < 2:
        return
    shown = []
    for file, _ in pictures[:SHEET_PICTURES]:
        with Pictures.open(file) as picture:
            picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
            shown.append(picture.copy())
    with replacing(path) as part:
        draw_captioned([caption for _, caption in pictures[:SHEET_PICTURES]], shown).save(part, "png")


def files_of(samples: Sequence[Mapping[str, Any]], kind: str | None = None) -> Iterator[str]:
    """Names of the files of samples.

    Args:
        kind: `image` or `text`; None is both.
    """
    for sample in samples:
        for part in sample["parts"]:
            if kind is None or kind in part:
                yield part["file"] if "text" in part else part["image"]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Whether all that has been written to a folder is of the same settings.

    Raises:
        ValueError: naming the file and the setting that differs.
    """
    now = dict(_flat(settings))
    for path in sorted(folder.glob(f"{RESULTS}*.json")):
        before = dict(_flat({key: value for key, value in read_results(path).items() if key not in OF_THE_SHARD}))
        for name in [*now, *before]:
            if now.get(name) != before.get(name):
                raise ValueError(
                    f"{path}: {name} was {json.dumps(before.get(name))} when this was written and is "
                    f"{json.dumps(now.get(name))} now; give the same settings to go on, or another folder as out"
                )


def read_results(path: Path) -> dict[str, Any]:
    """A `results.json`.

    Raises:
        ValueError: naming it, where it is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: it can not be read ({error}); remove it, or give another folder as out") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it is not of this command; remove it, or give another folder as out")
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class ResultLines:
    """`results.jsonl`: a line for each prompt that is finished or has failed; a later one of the same prompt counts.

    Only the places of lines are held. A last line that a crash has torn is dropped.

    Args:
        path: that lines are added to; where others of the folder hold prompts of other shards, these are found, too.

    Raises:
        ValueError: naming file and line, for a broken line before the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[Path, int]] = {}
        for other in sorted(path.parent.glob(f"{RESULTS}*.jsonl")):
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
                    raise ValueError(f"{path}:{broken}: the line is broken; remove it, and its prompt is drawn again")
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

    def find(self, key: str) -> dict[str, Any] | None:
        """The last line of a prompt; None where there is none."""
        if key not in self._places:
            return None
        path, place = self._places[key]
        with open(path, "rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def samples(self, prompt: NamedPrompt) -> list[dict[str, Any]] | None:
        """The samples of a prompt that has been drawn before, all of their files there; None where it is to be drawn.

        Raises:
            ValueError: where another prompt of this key has been drawn.
        """
        entry = self.find(prompt.key)
        if entry is None or "error" in entry:
            return None
        for name, value in ("prompt", prompt.described), ("seed", prompt.seed), ("num", prompt.num):
            if entry[name] != value:
                raise ValueError(
                    f"{prompt.name}: {name} was {json.dumps(entry[name])} when it was drawn (see "
                    f"{self._places[prompt.key][0]}); give it another key, or another folder as out"
                )
        files = files_of(entry["samples"])
        return entry["samples"] if all((self.path.parent / name).is_file() for name in files) else None


def _stem(key: str, name: str) -> str:
    return f"{key}_{name}" if key else name


def _save_picture(picture: Picture, path: Path, described: Mapping[str, Any]) -> None:
    """A PNG file with what made it as text chunks."""
    info = PngInfo()
    for key, value in described.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with replacing(path) as part:
        picture.save(part, "png", pnginfo=info)
