"""Labelled pictures and their classes, as folders, CSV files and shards hold them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image as Picture

from mixmodal.classification.packed_sets import Pixels, read_names
from mixmodal.classification.templates import check_places
from mixmodal.config import suggestion
from mixmodal.data.shards import PictureFile, read_samples
from mixmodal.data.skipping import SkipCounter
from mixmodal.files import stays_inside
from mixmodal.tokenization.preprocessing import MAX_PIXELS, open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DIGITS = "0123456789"


class NamedClass(NamedTuple):
    """A class: the label that data carry, and the words for it in a prompt."""

    label: str
    caption: str


class LabelledPicture(NamedTuple):
    """A picture that is opened when needed.

    Args:
        key: names it within its data, the same whoever reads them.
        source: its file, its bytes, or its pixels.
        label: of a class, or None where it is not known; of a picture of two cues, the class of its shape.
        texture: of a picture of two cues, the class of its texture.
    """

    key: str
    source: Path | PictureFile | Pixels
    label: str | None
    texture: str | None = None

    def open(self) -> Picture:
        """Decodes to RGB.

        Raises:
            PictureError: naming it, where it is broken, too large or not there.
        """
        if isinstance(self.source, Path):
            return open_picture(self.source, str(self.source))
        return self.source.open(MAX_PIXELS)


Read = Callable[[Path, Sequence[NamedClass], SkipCounter], Iterator[LabelledPicture]]
"""Of `read_pictures` and `read_cues`."""


def read_classes(path: Path) -> list[NamedClass]:
    """Classes from a text file: on each line a caption, or a label, a tab and a caption.

    Raises:
        ValueError: naming the file, for fewer than two classes, or a label that comes twice.
    """
    classes = []
    for line in _read_lines(path, "classes: there is no file {}; write one caption a line"):
        label, _, caption = line.partition("\t")
        classes.append(NamedClass(label.strip(), caption.strip() or label.strip()))
    if len(classes) < 2:
        raise ValueError(f"classes: {path} has {len(classes)} of them; at least two are needed, one a line")
    if twice := _twice(one.label for one in classes):
        raise ValueError(f"classes: {path} has the class {twice!r} more than once")
    return classes


def read_templates(path: Path) -> list[str]:
    """Prompt templates from a text file, one a line; they are not checked.

    Raises:
        ValueError: naming the file, where there is none.
    """
    return _read_lines(path, "templates: there is no file {}; write one template a line, as `a photo of {{}}`")


def check_templates(templates: Sequence[str]) -> None:
    """Whether texts can be prompt templates: there is at least one, all differ, and each has a `{}` for the class.

    Raises:
        ValueError: naming the first that is none.
    """
    check_places(templates)
    if twice := _twice(templates):
        raise ValueError(f"template {twice!r} is there more than once; leave all but one out")


def read_pictures(
    path: Path, classes: Sequence[NamedClass], counter: SkipCounter, option: str = "data"
) -> Iterator[LabelledPicture]:
    """Pictures of a folder, where a subfolder's name is the label, of shards, or of a CSV file.

    A CSV file has a line of names with the columns `path`, relative to its folder, and `label`, which may be empty. In
    shards the label is the `label` of a sample's JSON, or its text where that is a label or a caption of `classes`.
    Folders and files whose names begin with a dot are left out.

    Args:
        path: a folder of pictures or of shards, a single shard (*.tar), or a CSV file.
        counter: takes what shards have lost. The pictures themselves are not opened here.
        option: that the path was given as, for messages.

    Raises:
        ValueError: where there are no pictures, in the whole or for a class, or a label is not among the classes; of
            folders and CSV files at once.
    """
    if path.suffix.lower() == ".csv":
        return iter(check_labels(_from_csv(path, option, "label", None), path, classes, option))
    if path.suffix.lower() == ".tar" and path.is_file():
        return _from_shards(path, classes, counter, option)
    shards, files = _list_folder(path, option)
    if shards and files:
        raise ValueError(
            f"{option}: {path} holds both shards and pictures ({files[0]}, for one); give a folder of one kind"
        )
    if shards:
        return _from_shards(path, classes, counter, option)
    return iter(check_labels(_from_files(path, files, option), path, classes, option))


def read_cues(path: Path, classes: Sequence[NamedClass], counter: SkipCounter) -> Iterator[LabelledPicture]:
    """Pictures with the shape of one class and the texture of another (arXiv 1811.12231, section 2.2).

    Args:
        path: a folder of files with names such as `cat1-clock3.png`, first the shape, in whichever subfolders; or a
            CSV file with the columns `path`, `shape` and `texture`.
        counter: not needed here; the files are not opened.

    Raises:
        ValueError: as `read_pictures`, and for a name that does not tell shape and texture.
    """
    if path.suffix.lower() == ".csv":
        return iter(check_labels(_from_csv(path, "cues", "shape", "texture"), path, classes, "cues"))
    shards, files = _list_folder(path, "cues")
    if shards:
        raise ValueError(f"cues: {path} holds shards, which tell no shape and texture; give files or a CSV file")
    labels = {one.label for one in classes}
    found = []
    for file in files:
        shape, texture = _parse_cues(file, labels)
        found.append(LabelledPicture(file.relative_to(path).as_posix(), file, shape, texture))
    return iter(check_labels(found, path, classes, "cues"))


def _read_lines(path: Path, missing: str) -> list[str]:
    """As `read_names`, with a message of its own where there is no file."""
    if not path.is_file():
        raise ValueError(missing.format(path))
    return read_names(path)


def _twice(texts: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            return text
        seen.add(text)
    return None


def _list_folder(folder: Path, option: str) -> tuple[list[Path], list[Path]]:
    """Shards and pictures."""
    if not folder.is_dir():
        raise ValueError(f"{option}: there is no folder {folder}")
    shards = sorted(folder.glob("*.tar"))
    inside = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    files = sorted(path for path in inside if not any(one.startswith(".") for one in path.relative_to(folder).parts))
    if not shards and not files:
        raise ValueError(f"{option}: {folder} holds neither pictures ({', '.join(SUFFIXES)}) nor shards (*.tar)")
    return shards, files


def _from_files(folder: Path, files: Sequence[Path], option: str) -> list[LabelledPicture]:
    parts = [path.relative_to(folder).parts for path in files]
    filled = {one[0] for one in parts if len(one) > 1}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in filled:
            raise ValueError(f"{option}: the folder {path} holds no pictures; fill it, or remove it")
    return [
        LabelledPicture("/".join(names), path, names[0] if len(names) > 1 else None)
        for path, names in zip(files, parts, strict=True)
    ]


def _from_csv(path: Path, option: str, label: str, texture: str | None) -> list[LabelledPicture]:
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")
    needed, found, lines = [one for one in ("path", label, texture) if one], [], {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
                names = ", ".join(reader.fieldnames or ["none"])
                raise ValueError(f"{path}: there is no column {missing[0]!r} among its columns, which are {names}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                cells = {name: (row[name] or "").strip() for name in needed}
                if not cells["path"]:
                    raise ValueError(f"{where}: the path is empty")
                if not stays_inside(cells["path"]):
                    raise ValueError(f"{where}: the path {cells['path']!r} leads out of the file's folder")
                key = Path(cells["path"]).as_posix()
                if (first := lines.setdefault(key, reader.line_num)) != reader.line_num:
                    raise ValueError(f"{where}: the path {key!r} stands on line {first}, too")
                if texture and not (cells[label] and cells[texture]):
                    raise ValueError(f"{where}: both {label} and {texture} are needed")
                second = cells[texture] if texture else None
                found.append(LabelledPicture(key, path.parent / key, cells[label] or None, second))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: it can not be read as CSV in UTF-8 ({error})") from error
    if not found:
        raise ValueError(f"{option}: {path} lists no pictures")
    return found


def _from_shards(
    path: Path, classes: Sequence[NamedClass], counter: SkipCounter, option: str
) -> Iterator[LabelledPicture]:
    labels = {one.caption: one.label for one in classes} | {one.label: one.label for one in classes}
    known, seen = {one.label: None for one in classes}, set()
    for sample in read_samples(path, counter):
        text = " ".join(sample.texts)
        label = sample.metadata.get("label", labels.get(text))
        for number, file in enumerate(sample.pictures):
            key = sample.key if len(sample.pictures) == 1 else f"{sample.key}.{number}"
            if key in seen:  # in another shard
                key = f"{Path(sample.source.removesuffix(f':{sample.key}')).name}/{key}"
            seen.add(key)
            one = LabelledPicture(key, file, None if label is None else str(label))
            _check_label(one.label, f"{option}: {sample.source}", known)
            yield one


def check_labels(
    pictures: list[LabelledPicture], path: Path, classes: Sequence[NamedClass], option: str
) -> list[LabelledPicture]:
    """The same pictures.

    Raises:
        ValueError: naming the first whose label the classes do not have.
    """
    known = {one.label: None for one in classes}
    for one in pictures:
        for label in (one.label, one.texture):
            _check_label(label, f"{option}: {one.key} of {path}", known)
    return pictures


def _check_label(label: str | None, what: str, known: dict[str, None]) -> None:
    if label is not None and label not in known:
        close = suggestion(label, known)
        raise ValueError(f"{what} is labelled {label!r}, which the classes do not have{close}")


def _parse_cues(path: Path, labels: set[str]) -> tuple[str, str]:
    """Shape and texture of a name such as `cat1-clock3`; labels may hold hyphens themselves."""
    words, found = path.stem.split("-"), set()
    for place in range(1, len(words)):
        sides = []
        for side in ("-".join(words[:place]), "-".join(words[place:])):
            sides.append([one for one in dict.fromkeys((side, side.rstrip(DIGITS).rstrip("_"))) if one in labels][:1])
        found.update((shape, texture) for shape in sides[0] for texture in sides[1])
    if len(found) != 1:
        several = "tells more than one" if found else "tells none"
        raise ValueError(
            f"cues: {path} must be named SHAPE-TEXTURE.png, as cat1-clock3.png, by two labels of the classes; it "
            f"{several} such pair: rename it, or give a CSV file with the columns path, shape and texture"
        )
    return found.pop()
