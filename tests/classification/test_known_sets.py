"""Miniatures of common sets in the layouts in which they are distributed."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.classification.datasets import NamedClass, read_cues
from mixmodal.classification.known_sets import KnownSet, choose_classes, find_set, read_set
from mixmodal.data.skipping import SkipCounter

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
ROWS = PICTURES.transpose(0, 3, 1, 2).reshape(2, 3072)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def find(path: Path) -> KnownSet:
    found = find_set(path)
    assert found is not None
    return found


def check(found: KnownSet, labels: list[str], pictures: np.ndarray = PICTURES) -> None:
    assert found.pictures is not None
    assert [one.label for one in found.pictures] == labels
    for one, wanted in zip(found.pictures, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(one.open()), wanted)


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_in_pickles(tmp_path: Path, protocol: int) -> None:
    data = {"data": ROWS, "fine_labels": [1, 0], "filenames": ["a", "b"]}
    write(tmp_path / "test", pickle.dumps(data, protocol) if protocol == 4 else old_pickle())
    write(tmp_path / "meta", pickle.dumps({"fine_label_names": ["cat", "maple_tree"]}, protocol))
    found = find(tmp_path)
    check(found, ["maple_tree", "cat"])
    assert found.classes == [NamedClass("cat", "cat"), NamedClass("maple_tree", "maple tree")]


def old_pickle() -> bytes:
    """As Python 2 wrote it, with bytes as strings."""
    size = len(ROWS.tobytes()).to_bytes(4, "little")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n"
    )
    array += b"(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + size
    return b"\x80\x02}(U\x04data" + array + ROWS.tobytes() + b"tbU\x0bfine_labels](K\x01K\x00eu."


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def test_a_pickle_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "batches.meta", pickle.dumps({"label_names": ["cat"]}))
    path = write(tmp_path / "test_batch", pickle.dumps({"data": Evil()}))
    with pytest.raises(ValueError, match=r"test_batch: this pickle is refused, it asks for builtins\.eval"):
        find_set(tmp_path)
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    with pytest.raises(ValueError, match="test_batch: this pickle is refused, it writes to place 4294967295"):
        find_set(tmp_path)


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_in_binary(tmp_path: Path, fine: bool) -> None:
    records = b"".join((b"\x07" if fine else b"") + bytes([1 - n]) + ROWS[n].tobytes() for n in range(2))
    path = write(tmp_path / ("test.bin" if fine else "test_batch.bin"), records)
    names = write(tmp_path / ("fine_label_names.txt" if fine else "batches.meta.txt"), "cat\ndog\n\n")
    check(find(tmp_path), ["dog", "cat"])
    path.write_bytes(records[:-1])
    with pytest.raises(ValueError, match=r"\.bin: it is missing, empty or cut off"):
        find_set(tmp_path)
    path.write_bytes(records)
    names.write_text("cat\n")
    with pytest.raises(ValueError, match="beyond the 1 names"):
        find_set(tmp_path)


def test_digits_in_idx_files(tmp_path: Path) -> None:
    grey = PICTURES[:, :28, :28, 0]
    data = b"\0\0\x08\x03" + np.array(grey.shape, ">u4").tobytes() + grey.tobytes()
    path = write(tmp_path / "raw/t10k-images-idx3-ubyte.gz", gzip.compress(data))
    write(tmp_path / "raw/t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x02\x07\x00")
    check(find(tmp_path), ["7", "0"], np.repeat(grey[..., None], 3, 3))
    with pytest.raises(ValueError, match="names no classes; give --classes"):
        choose_classes(tmp_path, find_set(tmp_path))
    path.write_bytes(gzip.compress(data[:-1]))
    with pytest.raises(ValueError, match="it tells of 1568 bytes and holds 1567"):
        find_set(tmp_path)


def test_stl_has_columns_before_rows_and_labels_from_1(tmp_path: Path) -> None:
    wanted = np.random.default_rng(1).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    write(tmp_path / "test_X.bin", wanted.transpose(0, 3, 2, 1).tobytes())
    write(tmp_path / "test_y.bin", b"\x02\x01")
    write(tmp_path / "class_names.txt", "airplane\nbird\n")
    check(find(tmp_path), ["bird", "airplane"], wanted)


def test_wordnet_ids_get_names(tmp_path: Path) -> None:
    for label in ("n02012849", "n03126707", "n01440764"):
        write(tmp_path / f"val/{label}/1.png", "")
    assert find(tmp_path / "val").classes == []
    lines = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, hoist\nn09999999 other\n"
    path = write(tmp_path / "LOC_synset_mapping.txt", lines)
    captions = [one.caption for one in find(tmp_path / "val").classes]
    assert captions == ["tench", "crane", "crane, hoist"]
    found = read_set(tmp_path / "val", find(tmp_path / "val").classes, SkipCounter())
    assert [one.label for one in found] == ["n01440764", "n02012849", "n03126707"]
    path.write_text(lines.partition("\n")[0])
    with pytest.raises(ValueError, match="does not name the class n02012849"):
        find_set(tmp_path / "val")
    path.unlink()
    index = {str(n): [label, f"a_{n}"] for n, label in enumerate(["n01440764", "n02012849", "n03126707"])}
    write(tmp_path / "val/imagenet_class_index.json", json.dumps(index))
    assert [one.caption for one in find(tmp_path / "val").classes] == ["a 0", "a 1", "a 2"]


LISTS = {
    "pets": (
        {"annotations/test.txt": "Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1", "annotations/trainval.txt": ""},
        ["images/Abyssinian_1.jpg", "images/great_pyrenees_2.jpg"],
        [("Abyssinian", "Abyssinian"), ("great_pyrenees", "great pyrenees")],
    ),
    "food": (
        {"meta/test.txt": "apple_pie/1\nwaffles/2", "meta/classes.txt": "apple_pie\nwaffles"}
        | {"meta/labels.txt": "Apple pie\nWaffles"},
        ["images/apple_pie/1.jpg", "images/waffles/2.jpg"],
        [("apple_pie", "Apple pie"), ("waffles", "Waffles")],
    ),
    "textures": (
        {"labels/test1.txt": "banded/banded_1.jpg\nwoven/woven_2.jpg", "labels/train1.txt": ""},
        ["images/banded/banded_1.jpg", "images/woven/woven_2.jpg"],
        [("banded", "banded"), ("woven", "woven")],
    ),
    "aircraft": (
        {"data/images_variant_test.txt": "0000001 707-320\n2 DC 10", "data/variants.txt": "707-320\nDC 10"},
        ["data/images/0000001.jpg", "data/images/2.jpg"],
        [("707-320", "707-320"), ("DC 10", "DC 10")],
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_test_pictures(tmp_path: Path, name: str) -> None:
    files, pictures, classes = LISTS[name]
    for file, text in files.items():
        write(tmp_path / file, text)
    for shade, file in enumerate(pictures):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", (2, 2), (shade * 100,) * 3).save(tmp_path / file)
    found = find(tmp_path)
    assert found.classes == [NamedClass(*one) for one in classes]
    wanted = np.array([0, 100], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    check(found, [label for label, _ in classes], wanted)
    with pytest.raises(ValueError, match="which the classes do not have"):
        read_set(tmp_path, [NamedClass("other", "other")], SkipCounter())


def test_cue_conflict_as_it_is_distributed(tmp_path: Path) -> None:
    write(tmp_path / "airplane/airplane1-bear2.png", "")
    (one,) = read_cues(tmp_path, [NamedClass("airplane", "plane"), NamedClass("bear", "bear")], SkipCounter())
    assert (one.label, one.texture) == ("airplane", "bear")
