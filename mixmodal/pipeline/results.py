"""What the generate command leaves: samples as files, `results.json`, and for many prompts a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Pictures
from PIL.Image import Image as Picture
from PIL.PngImagePlugin import PngInfo

from mixmodal.document import EndOfTurn
from mixmodal.evaluation.sheet import draw_captioned
from mixmodal.files import replacing, write_whole
from mixmodal.pipeline.masked_text import FilledText
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.prompt_files import NamedPrompt
from mixmodal.records import RecordLines, check_settings
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
                entry["parts"].append({"end_of_turn": True} if isinstance(part, EndOfTurn) else {"text": str(part)})
    return entries


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


def check_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """`check_settings` of all shards in a folder."""
    check_settings(sorted(folder.glob(f"{RESULTS}*.json")), settings, OF_THE_SHARD)


class ResultLines(RecordLines):
    """`results.jsonl`: a line for each prompt that is finished or has failed."""

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
                    f"{self.file_of(prompt.key)}); give it another key, or another folder as out"
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
