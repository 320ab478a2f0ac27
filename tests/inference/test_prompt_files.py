"""Files of prompts: what a line may say, and how a wrong one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PIL

from mixmodal.config import UsageError, parse
from mixmodal.document import Mask
from mixmodal.pipeline.generate import GenerateConfig, generate
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.prompt_files import NamedPrompt, read_prompts
from mixmodal.pipeline.prompt_parts import PromptPart
from mixmodal.records import Shard

WHOLE = Shard()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts" / "pictures").mkdir(parents=True)
    PIL.new("RGB", (9, 8), "red").save(tmp_path / "prompts" / "pictures" / "red.png")
    PIL.new("RGB", (9, 8), "blue").save(tmp_path / "outside.png")
    return tmp_path / "prompts"


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    spelled = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in spelled))
    return path


def read(path: Path, shard: Shard = WHOLE) -> list[NamedPrompt]:
    return list(read_prompts(path, 3, 4, shard))


def test_lines_in_both_forms(folder: Path) -> None:
    parts = [{"text": "caf\u00e9"}, {"image": "pictures/red.png"}]
    path = write(folder, b'\xef\xbb\xbf{"prompt": "pear"}', b"", {"key": "b-1", "parts": parts, "seed": 0, "num": 1})
    first, second = read(path)
    assert (first.key, first.seed, first.num, first.parts) == ("000001", 4, 3, (PromptPart(text="pear"),))
    assert (second.key, second.seed, second.num, second.described) == ("b-1", 0, 1, parts)
    assert second.name == f"{path}:3 (b-1)"
    text, picture = second.open()
    assert text == "caf\u00e9"
    assert picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', ":2: the line is not JSON"),
        (b'{"prompt": "caf\xe9"}', ":2: the line is not UTF-8"),
        (b"[" * 100_000, ":2: the line is not JSON"),
        ([], ":2: the line must be an object"),
        ({"key": "a", "prompt": "b"}, ":2 (a): line 1 has this key, too"),
        ({"key": "A", "prompt": "b"}, ":2 (A): line 1 has this key, too (case does not count)"),
        ({"key": "../a", "prompt": "b"}, ":2: key is '../a'; it begins the names of files"),
        ({"key": "", "prompt": "b"}, ":2: key is ''"),
        ({"key": "a" * 81, "prompt": "b"}, ":2: key is 'aaa"),
        ({"key": 7, "prompt": "b"}, ":2: key is '7'"),
        ({"key": "b", "promt": "b"}, ":2 (b): there is no key 'promt'; did you mean prompt?"),
        ({"key": "b"}, ":2 (b): give either prompt, a text, or parts"),
        ({"key": "b", "prompt": "b", "parts": []}, ":2 (b): give either prompt, a text, or parts"),
        ({"key": "b", "parts": []}, ":2 (b): parts must be a list"),
        ({"key": "b", "parts": {"text": "a"}}, ":2 (b): parts must be a list"),
        ({"key": "b", "prompt": " "}, ":2 (b): there is nothing but white space"),
        ({"key": "b", "prompt": ""}, ":2 (b): text is ''; it must be a string that is not empty"),
        ({"key": "b", "parts": [{"text": "a"}, "b"]}, "part 1 of "),
        ({"key": "b", "parts": [{"text": "a", "image": "b"}]}, "it must have either a text, an image or a mask"),
        ({"key": "b", "prompt": "\ud800"}, "half a surrogate pair"),
        ({"key": "b", "prompt": "b", "num": 0}, ":2 (b): num is 0; it must be a whole number of at least 1"),
        ({"key": "b", "prompt": "b", "num": True}, ":2 (b): num is True"),
        ({"key": "b", "prompt": "b", "seed": -1}, ":2 (b): seed is -1; it must be a whole number of at least 0"),
        ({"key": "b", "prompt": "b", "seed": 1.5}, ":2 (b): seed is 1.5"),
        ({"key": "b", "parts": [{"image": "../outside.png"}]}, "'../outside.png' leads out of the folder"),
        ({"key": "b", "parts": [{"image": "pictures/..\\..\\outside.png"}]}, "leads out of the folder"),
        ({"key": "b", "parts": [{"image": "/outside.png"}]}, "leads out of the folder"),
        ({"key": "b", "parts": [{"image": "C:\\outside.png"}]}, "leads out of the folder"),
        ({"key": "b", "parts": [{"text": "a"}, {"image": "no.png"}]}, ":2 (b): there is no picture at"),
        ({"key": "b", "parts": [{"image": "pictures"}]}, ":2 (b): there is no picture at"),
    ],
)
def test_a_wrong_line_is_named_before_a_model_is_loaded(folder: Path, line: Any, message: str) -> None:
    path = write(folder, {"key": "a", "prompt": "pear"}, line)
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2") as caught:
        generate(GenerateConfig(model="none", out=folder / "out", prompts=path))
    assert message in str(caught.value)
    assert not (folder / "out").exists()


RED = {"image": "pictures/red.png"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"text": "a"}], ":2 (b): there is no hole for the output infill"),
        ([RED], ":2 (b): there is no hole for the output infill"),
        ([{"mask": 0}, {"text": "a"}, {"mask": 0}], ":2 (b): mask 0 stands there twice"),
        ([{"mask": "0"}], ":2 (b): mask is '0'; it must be a whole number of at least 0"),
        ([{"mask": -1}], ":2 (b): mask is -1"),
        ([{"mask": True}], ":2 (b): mask is True"),
        ([{"mask": 0, "text": "a"}], "it must have either a text, an image or a mask"),
        ([{"box": [0, 0, 4, 4]}], "it must have either a text, an image or a mask"),
        ([{"text": "a", "box": [0, 0, 4, 4]}], ":2 (b): box says what of an image is drawn anew"),
        ([{"mask": 0, "region": "pictures/red.png"}], ":2 (b): region says what of an image is drawn anew"),
        ([{**RED, "box": [0, 0, 4, 4], "region": "pictures/red.png"}], ":2 (b): give either box, in pixels, or region"),
        ([{**RED, "box": [0, 0, 4]}], ":2 (b): box is [0, 0, 4]; it must be [left, top, right, bottom]"),
        ([{**RED, "box": [0, 0, 4, "4"]}], ":2 (b): box is [0, 0, 4, '4']"),
        ([{**RED, "box": [4, 0, 4, 4]}], ":2 (b): box is [4, 0, 4, 4]; it must be [left, top, right, bottom]"),
        ([{**RED, "region": "no.png"}], ":2 (b): there is no picture at"),
        ([{**RED, "region": "../outside.png"}], ":2 (b): region: the path '../outside.png' leads out of the folder"),
        ([{**RED, "region": 3}], ":2 (b): region is 3; it must be a string"),
        ([{**RED, "regoin": "m.png"}], ":2 (b): there is no key 'regoin'; did you mean region?"),
        ([{**RED, "box": [0, 0, 4, 4]}, {"mask": 0}], ":2 (b): there are masks in texts and a region of a picture"),
        ([{**RED, "box": [0, 0, 4, 4]}, {"text": "a"}], ":2 (b): part 0 is a picture with a region, which must be the"),
        ([{**RED, "box": [0, 0, 4, 4]}] * 2, ":2 (b): parts 0 and 1 are both pictures with a region"),
    ],
)
def test_wrong_holes_are_named_before_a_model_is_loaded(folder: Path, parts: list[Any], message: str) -> None:
    path = write(folder, {"key": "a", "parts": [{"text": "a"}, {"mask": 0}]}, {"key": "b", "parts": parts})
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2") as caught:
        generate(GenerateConfig(model="none", out=folder / "out", prompts=path, output="infill", shard="0/2"))
    assert message in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("hole", [{"mask": 0}, {**RED, "box": [0, 0, 4, 4]}, {**RED, "region": "pictures/red.png"}])
def test_holes_are_for_infill_alone(folder: Path, hole: Any) -> None:
    path = write(folder, {"key": "a", "prompt": "a"}, {"key": "b", "parts": [{"text": "a"}, hole]})
    common: dict[str, Any] = {"model": "none", "out": folder / "out", "prompts": path}
    for output in ("text", "image", "mixed"):
        message = rf"jsonl:2 \(b\): .* can not be filled by the output {output}; take the output infill"
        with pytest.raises(ValueError, match=message):
            generate(GenerateConfig(output=output, **common))


def test_what_steers_pictures_is_refused_for_masks(folder: Path) -> None:
    path = write(folder, {"key": "b", "parts": [{"text": "a"}, {"mask": 0}]})
    common: dict[str, Any] = {"model": "none", "out": folder / "out", "prompts": path, "output": "infill"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"guidance_scale": 2.0}, "guidance acts on pictures alone"),
        ({"contrast_k": 2}, "guidance acts on pictures alone"),
        ({"order": "masks"}, "order masks acts on regions of pictures alone"),
        ({"memory": Path("m"), "retrieve": 2}, "no documents are read before masks in texts"),
    ]
    for options, message in changes:
        with pytest.raises(ValueError, match=rf"jsonl:1 \(b\): {message}"):
            generate(GenerateConfig(**common, **options))


def test_holes_are_opened_as_they_were_given(folder: Path) -> None:
    masked = [{"text": "a "}, {"mask": 5}, {"text": " "}, {"mask": 0}, {"image": "pictures/red.png"}]
    boxed = [{"image": "pictures/red.png", "box": [0, 0, 9, 4]}]
    drawn = [{"text": "a"}, {"image": "pictures/red.png", "region": "pictures/red.png"}]
    found = read(write(folder, *({"parts": parts} for parts in (masked, boxed, drawn))))
    assert [prompt.described for prompt in found] == [masked, boxed, drawn]
    assert found[0].open()[1] == Mask(5)
    (box,), (_, region) = found[1].open(), found[2].open()
    assert isinstance(box, PartialPicture)
    assert (box.picture.size, box.region) == ((9, 8), (0, 0, 9, 4))
    assert isinstance(region, PartialPicture)
    assert isinstance(region.region, PIL.Image)


def test_a_file_without_prompts_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.jsonl: there is no prompt in the file"):
        read(write(folder, b"", b"  "))
    with pytest.raises(OSError, match=r"none\.jsonl"):
        read(folder / "none.jsonl")


def test_a_huge_picture_is_named_with_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = read(write(folder, {"key": "b", "parts": [{"image": "pictures/red.png"}]}))
    monkeypatch.setattr("mixmodal.pipeline.prompt_parts.open_picture.__defaults__", (71,))
    with pytest.raises(ValueError, match=r"part 0 of .*prompts\.jsonl:1 \(b\).*9x8 pixels are more than the 71"):
        prompt.open()


def test_shards_take_turns_and_check_every_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"key": key, "prompt": key} for key in "abcde"]
    path = write(folder, *lines[:2], b"", *lines[2:])
    assert ["".join(prompt.key for prompt in read(path, Shard(index, 3))) for index in range(3)] == ["ad", "be", "c"]
    assert Shard.launched() == WHOLE
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.launched() == Shard.parse("2/3") == Shard(2, 3)
    with pytest.raises(ValueError, match="num is 0"):
        read(write(folder, *lines, {"prompt": "a", "num": 0}), Shard(0, 3))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "a.jsonl", "--prompt", "a"], "give either prompts, a file, or one prompt"),
        (["--prompts", "a.jsonl", "--shard", "4/4"], "shard is '4/4'; it must be INDEX/COUNT"),
        (["--prompts", "a.jsonl", "--shard", "1"], "shard is '1'"),
        (["--prompt", "a", "--shard", "0/4"], "shard is 0/4, which can not act on one prompt"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(GenerateConfig, ["--model", "m", "--out", "o", *argv])


def test_a_call_without_a_prompt_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"there is no prompt; give --prompt TEXT"):
        generate(GenerateConfig(model="m", out=Path("o")))
