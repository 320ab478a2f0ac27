"""Labelled pictures out of folders, CSV files and shards, and what is said about bad ones."""

from pathlib import Path

import pytest
from PIL import Image as PIL

from mixmodal.classification.datasets import (
    NamedClass,
    check_templates,
    read_classes,
    read_cues,
    read_pictures,
    read_templates,
)
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SkipCounter
from mixmodal.tokenization.preprocessing import PictureError

CLASSES = [NamedClass("red", "a red apple"), NamedClass("green", "a green apple"), NamedClass("sky-blue", "blue")]


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.new("RGB", (4, 3)).save(path)
    return path


def listed(path: Path) -> list[tuple[str, str | None]]:
    return [(one.key, one.label) for one in read_pictures(path, CLASSES, SkipCounter())]


def cues(path: Path) -> list[tuple[str, str | None, str | None]]:
    return [(one.key, one.label, one.texture) for one in read_cues(path, CLASSES, SkipCounter())]


def test_classes_have_a_label_and_a_caption(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfred\t a red apple\n\n  blue \n")
    assert read_classes(tmp_path / "c.txt") == [NamedClass("red", "a red apple"), NamedClass("blue", "blue")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\na\tc\n", r"c\.txt has the class 'a' more than once"),
        (b"a\n", r"c\.txt has 1 of them; at least two"),
        (b"a\n\xff\n", r"c\.txt: the file is not UTF-8"),
    ],
)
def test_classes_that_are_none_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "c.txt")
    with pytest.raises(ValueError, match=r"there is no file .*none\.txt; write one caption a line"):
        read_classes(tmp_path / "none.txt")


def test_templates_differ_and_have_a_place_for_the_class(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo of {}\n\nmy {}\n")
    assert read_templates(tmp_path / "t.txt") == ["a photo of {}", "my {}"]
    for templates, message in (([], "there is none"), (["{}", "a"], r"'a' has no \{\}"), (["{}", "{}"], "more than")):
        with pytest.raises(ValueError, match=message):
            check_templates(templates)
    with pytest.raises(ValueError, match=r"none\.txt; write one template a line, as `a photo of \{\}`"):
        read_templates(tmp_path / "none.txt")


def test_the_label_is_the_first_folder(tmp_path: Path) -> None:
    for name in ("red/b/2.png", "red/1.JPG", "0.png", ".hidden/x.png", "green/._1.png", "green/1.png"):
        draw(tmp_path / name)
    (tmp_path / "red" / "notes.txt").write_text("no picture")
    assert listed(tmp_path) == [("0.png", None), ("green/1.png", "green"), ("red/1.JPG", "red"), ("red/b/2.png", "red")]


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        listed(tmp_path / "none")
    with pytest.raises(ValueError, match="holds neither pictures"):
        listed(tmp_path)
    draw(tmp_path / "red" / "1.png")
    (tmp_path / "green").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*green holds no pictures"):
        listed(tmp_path)
    draw(tmp_path / "green" / "1.png")
    draw(tmp_path / "gren" / "1.png")
    with pytest.raises(ValueError, match=r"gren/1\.png of .* is labelled 'gren', .* did you mean green\?"):
        read_pictures(tmp_path, CLASSES, SkipCounter())  # before the first picture is asked for
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match="both shards and pictures"):
        listed(tmp_path)


def test_a_broken_picture_is_told_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no picture")
    (one,) = read_pictures(tmp_path, CLASSES, SkipCounter())
    with pytest.raises(PictureError, match=r"1\.png: not a picture"):
        one.open()


def test_a_csv_file_lists_paths_and_labels(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "d.csv").write_text('\ufefflabel,path,more\nred,a/1.png,x\n,"a/2, b.png",y\n', encoding="utf-8")
    assert listed(tmp_path / "d.csv") == [("a/1.png", "red"), ("a/2, b.png", None)]
    first, second = read_pictures(tmp_path / "d.csv", CLASSES, SkipCounter())
    assert first.open().size == (4, 3)
    with pytest.raises(PictureError, match="there is no file"):
        second.open()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\n1.png\n", r"d\.csv: there is no column 'label' among its columns, which are path"),
        ("", r"there is no column 'path' among its columns, which are none"),
        ("path,label\n", r"data: .*d\.csv lists no pictures"),
        ("path,label\n1.png,red\n../2.png,red\n", r"d\.csv:3: the path '\.\./2\.png' leads out"),
        ("path,label\n/etc/1.png,red\n", r"d\.csv:2: .* leads out"),
        ("path,label\n,red\n", r"d\.csv:2: the path is empty"),
        ("path,label\n1.png,red\n./1.png,green\n", r"d\.csv:3: the path '1\.png' stands on line 2, too"),
        ("path,label\n1.png,purple\n", r"1\.png of .*d\.csv is labelled 'purple'"),
        ('path,label\n"1.png,red\n', r"d\.csv: it can not be read as CSV"),
    ],
)
def test_a_csv_file_that_does_not_fit_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        listed(tmp_path / "d.csv")
    with pytest.raises(ValueError, match="there is no file"):
        listed(tmp_path / "none.csv")


def test_labels_of_shards_are_their_metadata_or_their_text(tmp_path: Path) -> None:
    file = PictureFile(draw(tmp_path / "x.png").read_bytes(), "png", "x")
    samples = [
        Sample("a", ("a red apple", file)),
        Sample("b", ("sky-blue", file)),
        Sample("c", ("something", file)),
        Sample("d", ("something", file), {"label": "green"}),
        Sample("e", (file, "a red apple", file)),
    ]
    write_shards(samples, tmp_path / "shards")
    expected = [("a", "red"), ("b", "sky-blue"), ("c", None), ("d", "green"), ("e.0", "red"), ("e.1", "red")]
    assert listed(tmp_path / "shards") == expected
    assert listed(tmp_path / "shards" / "00000.tar") == expected


def test_equal_keys_of_two_shards_are_told_apart(tmp_path: Path) -> None:
    file = PictureFile(draw(tmp_path / "x.png").read_bytes(), "png", "x")
    for name in ("one", "two"):
        write_shards([Sample("a", ("red", file))], tmp_path / name)
        (tmp_path / name / "00000.tar").rename(tmp_path / f"{name}.tar")
    (tmp_path / "x.png").unlink()
    for name in ("one", "two"):
        (tmp_path / name / "shards.json").unlink()
    assert listed(tmp_path) == [("a", "red"), ("two.tar/a", "red")]


def test_an_unknown_label_of_a_shard_names_the_sample(tmp_path: Path) -> None:
    file = PictureFile(draw(tmp_path / "x.png").read_bytes(), "png", "x")
    write_shards([Sample("a", ("x", file), {"label": "grey"})], tmp_path / "s")
    with pytest.raises(ValueError, match=r"00000\.tar:a is labelled 'grey'"):
        listed(tmp_path / "s")


def test_names_of_files_tell_shape_and_texture(tmp_path: Path) -> None:
    for name in ("red/red1-green2.png", "sky-blue3-red.png", "green_1-sky-blue12.png"):
        draw(tmp_path / name)
    assert cues(tmp_path) == [
        ("green_1-sky-blue12.png", "green", "sky-blue"),
        ("red/red1-green2.png", "red", "green"),
        ("sky-blue3-red.png", "sky-blue", "red"),
    ]
    draw(tmp_path / "red1-gren2.png")
    with pytest.raises(ValueError, match=r"red1-gren2\.png must be named SHAPE-TEXTURE\.png.* tells none"):
        cues(tmp_path)


def test_a_csv_file_tells_shape_and_texture(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("path,shape,texture\n1.png,red,green\n")
    assert cues(path) == [("1.png", "red", "green")]
    for row, message in (("1.png,red,", r"d\.csv:2: both shape and texture"), ("1.png,red,x", "labelled 'x'")):
        path.write_text(f"path,shape,texture\n{row}\n")
        with pytest.raises(ValueError, match=message):
            cues(path)
    path.write_text("path,label\n1.png,red\n")
    with pytest.raises(ValueError, match="there is no column 'shape'"):
        cues(path)
