"""The demo tasks: edits of, questions about and captions for the demo pictures, as records of `kind: tasks`.

A record is held out where it shows a held-out pair of concept and style; of an edit's held-out records only the result
is such a pair, and what is edited is a picture that training shows.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.config import check_least
from mixmodal.data.shards import read_samples
from mixmodal.quickstart.art import SKIN_TONES, STYLES, find_translations, without_tone

LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese", "zh": "Chinese"}
"""Languages of captions beside English, by code."""
YELLOW = "yellow"
GENDERS = {"man": {"1f469": "1f468", "2640": "2642"}, "woman": {"1f468": "1f469", "2642": "2640"}}
"""How the code points of the other one become those of this one."""
ORDINALS = ("first", "second")
GROUPS = {"style": "edits", "skin_tone": "edits", "gender": "edits", "drawing": "drawings"}
"""The file of a task; the others are `texts`."""
TRAIN, HELDOUT = "train", "heldout"
Record = dict[str, Any]
Pair = tuple[str, str]
"""(code point, style)"""


@dataclass(frozen=True, kw_only=True)
class DemoTasksConfig:
    """Which records there are.

    Args:
        kinds: answers to "what kind is it?": regular expressions by kind, of which the first that has a match in the
            concept's name counts; a concept without one is not asked about.
        languages: of captions, beside English: some of de, es, fr, it, pt, zh.
        comparisons: questions "which of the two", for each picture.
        seed: of the pictures that stand beside another in these.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ("de", "es")
    comparisons: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.languages if name not in LANGUAGES]:
            raise ValueError(f"languages: {unknown[0]!r} is unknown; take some of {', '.join(LANGUAGES)}")
        check_least(self, 0, "comparisons")
        for kind, pattern in self.kinds.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"kinds.{kind}: {pattern!r} is no regular expression: {error}") from error

    def kind_of(self, concept: str) -> str | None:
        return next((kind for kind, pattern in self.kinds.items() if re.search(pattern, concept)), None)


class Shown(NamedTuple):
    """One demo picture: what it shows, in which style, and whether that pair is held out."""

    code_point: str
    concept: str
    style: str
    caption: str
    heldout: bool

    @property
    def key(self) -> str:
        return f"{self.code_point}_{self.style}"

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.key}.png"

    @property
    def family(self) -> str:
        return without_tone(self.code_point)

    @property
    def tone(self) -> str:
        return next((SKIN_TONES[part] for part in self.code_point.split("-") if part in SKIN_TONES), YELLOW)


class Task(NamedTuple):
    """A record and whether it is held out."""

    record: Record
    heldout: bool


def write_tasks(data: Path, out: Path, config: DemoTasksConfig) -> dict[str, int]:
    """Writes `SPLIT_GROUP.jsonl` for both splits and the groups `edits`, `drawings` and `texts`, and the pictures.

    Args:
        data: the demo corpus, with the folders `train` and `heldout`.
        out: folder of the files.

    Returns:
        Numbers of records by file.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for split in (TRAIN, HELDOUT):
        for sample in read_samples(data / split):
            known = {name: sample.metadata[name] for name in ("code_point", "concept", "style")}
            pictures.append(Shown(**known, caption=sample.texts[0], heldout=split == HELDOUT))
            (out / pictures[-1].file).write_bytes(sample.pictures[0].data)
    lines: dict[str, list[str]] = defaultdict(list)
    for record, heldout in build_tasks(pictures, config):
        group = GROUPS.get(record["task"], "texts")
        lines[f"{HELDOUT if heldout else TRAIN}_{group}"].append(json.dumps(record, ensure_ascii=False) + "\n")
    for name, records in lines.items():
        (out / f"{name}.jsonl").write_text("".join(records), encoding="utf-8")
    return {name: len(records) for name, records in sorted(lines.items())}


def build_tasks(pictures: Sequence[Shown], config: DemoTasksConfig) -> Iterator[Task]:
    """All records of the demo pictures; each has a `key`, a `task`, the fields of the task and, as `target`, the key of
    the picture that it is about or that answers it."""
    names = find_translations(config.languages)
    yield from _edits({(picture.code_point, picture.style): picture for picture in pictures})
    for picture in pictures:
        yield _about(picture, "drawing", {"caption": picture.caption})
        if kind := config.kind_of(picture.concept):
            yield _about(picture, "category", {"answer": kind})
        captions = {"English": picture.concept}
        translated = names.get(picture.code_point, {})
        captions |= {LANGUAGES[code]: translated[code] for code in config.languages if code in translated}
        for language, caption in captions.items():
            yield _about(picture, "captions", {"language": language, "caption": caption}, f"captions-{language}")
    yield from _comparisons(pictures, config)


def _about(picture: Shown, task: str, fields: Record, name: str = "") -> Task:
    key = f"{name or task}-{picture.key}"
    return Task({"key": key, "task": task, "image": picture.file, "target": picture.key, **fields}, picture.heldout)


def _edits(shown: Mapping[Pair, Shown]) -> Iterator[Task]:
    """To the other style, to other tones of the skin, and to the other gender."""
    families: dict[Pair, list[Shown]] = defaultdict(list)
    for picture in shown.values():
        families[picture.family, picture.style].append(picture)
    for (code_point, style), picture in shown.items():
        for other in STYLES:
            if other != style and (code_point, other) in shown:
                yield from _edit("style", picture, shown[code_point, other], f"Draw it in {other} style.")
        for other in families[picture.family, style]:
            if other.tone != picture.tone:
                yield from _edit("skin_tone", picture, other, f"Make the skin {other.tone}.")
        for gender, changes in GENDERS.items():
            changed = "-".join(changes.get(part, part) for part in code_point.split("-"))
            if changed != code_point and (changed, style) in shown:
                yield from _edit("gender", picture, shown[changed, style], f"Make it a {gender}.")


def _edit(task: str, before: Shown, after: Shown, edit: str) -> Iterator[Task]:
    """Nothing where a held-out picture would be edited."""
    if not before.heldout:
        fields = {"image1": before.file, "edit": edit, "caption": after.caption, "image2": after.file}
        key = f"{task}-{before.key}-{after.key}"
        yield Task({"key": key, "task": task, **fields, "target": after.key}, after.heldout)


def _comparisons(pictures: Iterable[Shown], config: DemoTasksConfig) -> Iterator[Task]:
    """Which of two pictures of one style shows a concept; the other picture is one that training shows."""
    rng = np.random.default_rng(config.seed)
    pictures = list(pictures)
    known = {style: [one for one in pictures if one.style == style and not one.heldout] for style in STYLES}
    for picture in pictures:
        others = [one for one in known[picture.style] if one.family != picture.family]
        for number in range(config.comparisons if others else 0):
            other = others[int(rng.integers(len(others)))]
            place = int(rng.integers(2))
            first, second = (picture, other) if place == 0 else (other, picture)
            fields = {"image1": first.file, "image2": second.file, "name": picture.concept}
            answer = {"answer": ORDINALS[place], "target": picture.key}
            yield Task({"key": f"which-{picture.key}-{number}", "task": "which", **fields, **answer}, picture.heldout)
