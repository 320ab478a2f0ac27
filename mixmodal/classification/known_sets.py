"""Common classification sets in the layouts in which they are distributed, found by what lies in the folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mixmodal.classification.datasets import LabelledPicture, NamedClass, check_labels, read_pictures
from mixmodal.classification.packed_sets import (
    Packed,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_names,
    read_stl,
)
from mixmodal.data.skipping import SkipCounter
from mixmodal.files import stays_inside

WORDNET = re.compile(r"n\d{8}")


class KnownSet(NamedTuple):
    """A set whose layout is known: its name, its classes where it has names for them, and its test pictures.

    Without pictures it is read as any folder.
    """

    layout: str
    classes: list[NamedClass]
    pictures: list[LabelledPicture] | None


def find_set(path: Path) -> KnownSet | None:
    """The set that a folder holds, or None where it is of no layout known here.

    Raises:
        ValueError: naming the file, where one of the set is broken.
    """
    if not path.is_dir():
        return None
    for needed, read in LAYOUTS.items():
        if all((path / name).is_file() for name in needed):
            return read(path)
    return _find_idx(path) or _find_imagenet(path)


def read_set(
    path: Path, classes: Sequence[NamedClass], counter: SkipCounter, option: str = "data"
) -> Iterator[LabelledPicture]:
    """As `read_pictures`, of sets whose layout is known, too."""
    found = find_set(path)
    if found is None or found.pictures is None:
        return read_pictures(path, classes, counter, option)
    return iter(check_labels(found.pictures, path, classes, option))


def choose_classes(path: Path, known: KnownSet | None) -> list[NamedClass]:
    """The classes of a set that names them.

    Raises:
        ValueError: where it does not.
    """
    if known is None or not known.classes:
        what = "is of no layout that names its classes" if known is None else f"({known.layout}) names no classes"
        raise ValueError(f"data: {path} {what}; give --classes FILE, on each line a label, a tab and a caption")
    return known.classes


def _name(names: Sequence[str]) -> list[NamedClass]:
    return [NamedClass(one, " ".join(one.replace("_", " ").split())) for one in names]


def _unpack(layout: str, packed: Packed, has_names: bool = True) -> KnownSet:
    pairs = enumerate(packed.pairs())
    pictures = [LabelledPicture(f"test/{place:05d}", source, label) for place, (source, label) in pairs]
    return KnownSet(layout, _name(packed.names) if has_names else [], pictures)


def _list(
    layout: str, split: Path, rows: Sequence[tuple[str, str]], images: Path, classes: list[NamedClass]
) -> KnownSet:
    """Of pictures that a text file lists, as (name with suffix, label)."""
    for name, _ in rows:
        if not stays_inside(name):
            raise ValueError(f"{split}: the path {name!r} leads out of the set's folder")
    if not rows:
        raise ValueError(f"{split}: it lists no pictures")
    return KnownSet(layout, classes, [LabelledPicture(name, images / name, label) for name, label in rows])


def _split(path: Path, separator: str) -> list[tuple[str, str]]:
    """Lines cut in two at the first separator."""
    found = []
    for line in read_names(path):
        first, _, second = line.partition(separator)
        if not first or not second:
            raise ValueError(f"{path}: the line {line!r} has no {separator!r} between two parts")
        found.append((first, second))
    return found


def _read_pets(path: Path) -> KnownSet:
    split = path / "annotations/test.txt"
    names = [line.split()[0] for line in read_names(split) if not line.startswith("#")]
    rows = [(f"{name}.jpg", name.rpartition("_")[0]) for name in names]
    if bad := [name for name, label in rows if not label]:
        raise ValueError(f"{split}: the name {bad[0]!r} is not BREED_NUMBER")
    classes = _name(sorted({label for _, label in rows}))
    return _list("Oxford-IIIT Pets, test", split, rows, path / "images", classes)


def _read_food(path: Path) -> KnownSet:
    split, labels, names = path / "meta/test.txt", read_names(path / "meta/classes.txt"), path / "meta/labels.txt"
    classes = [NamedClass(*pair) for pair in zip(labels, read_names(names))]
    if len(classes) != len(labels) or len(read_names(names)) != len(labels):
        raise ValueError(f"{names}: it must name each of the {len(labels)} classes of classes.txt")
    rows = [(f"{folder}/{name}.jpg", folder) for folder, name in _split(split, "/")]
    return _list("Food-101, test", split, rows, path / "images", classes)


def _read_textures(path: Path) -> KnownSet:
    split = path / "labels/test1.txt"
    rows = [(f"{folder}/{name}", folder) for folder, name in _split(split, "/")]
    return _list("DTD, test 1", split, rows, path / "images", _name(sorted({label for _, label in rows})))


def _read_aircraft(path: Path) -> KnownSet:
    split = path / "images_variant_test.txt"
    rows = [(f"{name}.jpg", label) for name, label in _split(split, " ")]
    return _list("FGVC-Aircraft, test", split, rows, path / "images", _name(read_names(path / "variants.txt")))


def _find_idx(path: Path) -> KnownSet | None:
    for folder in (path, path / "raw"):
        pictures, labels = (
            next((file for suffix in ("", ".gz") if (file := folder / f"{name}{suffix}").is_file()), None)
            for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
        )
        if pictures and labels:
            return _unpack("MNIST's IDX files, test", read_idx(pictures, labels), has_names=False)
    return None


def _find_imagenet(path: Path) -> KnownSet | None:
    """Subfolders of WordNet ids; their captions are the first synonym, or all where two classes share the first."""
    labels = sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not labels or not all(WORDNET.fullmatch(label) for label in labels):
        return None
    for name, separator in (("LOC_synset_mapping.txt", " "), ("words.txt", "\t"), ("imagenet_class_index.json", "")):
        for file in (path / name, path.parent / name):
            if file.is_file():
                names = dict(_split(file, separator)) if separator else _read_index(file)
                if missing := [label for label in labels if label not in names]:
                    raise ValueError(f"{file}: it does not name the class {missing[0]} of {path}")
                return KnownSet("ImageNet's WordNet ids", _shorten(labels, names), None)
    return KnownSet("ImageNet's WordNet ids", [], None)


def _shorten(labels: Sequence[str], names: dict[str, str]) -> list[NamedClass]:
    first = {label: names[label].split(",")[0].strip().replace("_", " ") for label in labels}
    counts = Counter(first.values())
    return [NamedClass(label, first[label] if counts[first[label]] == 1 else names[label]) for label in labels]


def _read_index(path: Path) -> dict[str, str]:
    try:
        return {str(label): str(name) for label, name in json.loads("\n".join(read_names(path))).values()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: it is not of the form {{"0": ["n01440764", "tench"], ...}} ({error})') from error


LAYOUTS: dict[tuple[str, ...], Callable[[Path], KnownSet]] = {
    ("test_batch", "batches.meta"): lambda path: _unpack(
        "CIFAR-10 (python), test",
        read_cifar_pickle(path / "test_batch", path / "batches.meta", "labels", "label_names"),
    ),
    ("test", "meta"): lambda path: _unpack(
        "CIFAR-100 (python), test",
        read_cifar_pickle(path / "test", path / "meta", "fine_labels", "fine_label_names"),
    ),
    ("test_batch.bin", "batches.meta.txt"): lambda path: _unpack(
        "CIFAR-10 (binary), test", read_cifar_binary(path / "test_batch.bin", path / "batches.meta.txt", 1)
    ),
    ("test.bin", "fine_label_names.txt"): lambda path: _unpack(
        "CIFAR-100 (binary), test", read_cifar_binary(path / "test.bin", path / "fine_label_names.txt", 2)
    ),
    ("test_X.bin", "test_y.bin", "class_names.txt"): lambda path: _unpack(
        "STL-10, test", read_stl(path / "test_X.bin", path / "test_y.bin", path / "class_names.txt")
    ),
    ("annotations/test.txt", "annotations/trainval.txt"): _read_pets,
    ("meta/test.txt", "meta/classes.txt", "meta/labels.txt"): _read_food,
    ("labels/test1.txt", "labels/train1.txt"): _read_textures,
    ("images_variant_test.txt", "variants.txt"): _read_aircraft,
    ("data/images_variant_test.txt", "data/variants.txt"): lambda path: _read_aircraft(path / "data"),
}
"""By files that must all be there."""
