"""`generate --output infill`: what fills the holes of prompts, one or many of them, and what it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmodal import MixedModal
from mixmodal.cli import main
from mixmodal.document import Mask
from mixmodal.pipeline.generate import GenerateConfig, generate

BOX = [0, 8, 16, 16]
PROMPTS: list[dict[str, Any]] = [
    {"key": "texts", "parts": [{"text": "a red "}, {"mask": 0}, {"text": ", flat style "}, {"mask": 3}]},
    {"key": "box", "parts": [{"text": "pear"}, {"image": "apple.png", "box": BOX}], "num": 1, "seed": 9},
    {"key": "shown", "parts": [{"mask": 1}, {"image": "apple.png"}], "seed": 2},
    {"key": "region", "parts": [{"image": "apple.png", "region": "lower.png"}]},
]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path, picture: Image.Image) -> Path:
    """With a picture, a region of its lower half, and prompts."""
    picture.save(tmp_path / "apple.png")
    lower = Image.new("L", (16, 16))
    lower.paste(255, (0, 8, 16, 16))
    lower.save(tmp_path / "lower.png")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return tmp_path


@pytest.fixture
def config(exported: Path, folder: Path) -> GenerateConfig:
    common = {"model": str(exported), "out": folder / "out", "prompts": folder / "prompts.jsonl", "device": "cpu"}
    return GenerateConfig(**common, output="infill", num=2, seed=4, batch_size=3, max_new_tokens=5)


def run(exported: Path, folder: Path, *options: str) -> dict[str, Any]:
    common = ["--model", str(exported), "--out", str(folder / "out"), "--device", "cpu", "--output", "infill"]
    main(["generate", *common, *options])
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def entries_of(*paths: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return {entry["key"]: entry for entry in lines}


def files_of(out: Path) -> dict[str, bytes]:
    """What each sample's file holds: pixels, or text."""
    texts = {path.name: path.read_bytes() for path in out.glob("*_0*.txt")}
    return texts | {path.name: Image.open(path).tobytes() for path in out.glob("*_0*.png")}


def test_every_prompt_is_filled_as_from_python(config: GenerateConfig, exported: Path, picture: Image.Image) -> None:
    generate(config)
    model, entries = MixedModal.from_pretrained(exported, "cpu"), entries_of(config.out / "results.jsonl")
    assert {key: entry["prompt"] for key, entry in entries.items()} == {one["key"]: one["parts"] for one in PROMPTS}
    wanted = model.fill_masks(["a red ", Mask(0), ", flat style ", Mask(3)], num=2, seed=4, max_new_tokens=5)
    for number, ((first, second), sample) in enumerate(zip(wanted, entries["texts"]["samples"], strict=True)):
        whole, file = f"a red {first}, flat style {second}", f"texts_000{number}.txt"
        masks = [{"mask": 0, "text": first}, {"mask": 3, "text": second}]
        assert sample == {"sample": number, "parts": [{"text": whole, "file": file}], "masks": masks}
        assert (config.out / file).read_bytes() == whole.encode()
    shown = model.fill_masks([Mask(1), picture], num=2, seed=2, max_new_tokens=5)
    assert [[one["text"] for one in sample["masks"]] for sample in entries["shown"]["samples"]] == shown
    for key, prompt, num, seed in (("box", "pear", 1, 9), ("region", (), 2, 4)):
        for number, one in enumerate(model.infill(picture, (0, 8, 16, 16), prompt, num=num, seed=seed)):
            found = Image.open(config.out / f"{key}_000{number}.png")
            # worst seen 1; decoders round differently by how many pictures they decode
            np.testing.assert_allclose(np.asarray(found, int), np.asarray(one, int), atol=1)
    results = json.loads((config.out / "results.json").read_text())
    assert results["counts"] == {"prompts": 4, "finished": 4, "failed": 0, "samples": 7}
    assert results["settings"]["order"] == "raster"
    assert (config.out / "contact_sheet.png").is_file()


def test_neither_batches_nor_shards_change_what_is_filled(config: GenerateConfig, folder: Path) -> None:
    generate(config)
    generate(replace(config, out=folder / "single", batch_size=1))
    for index in range(2):
        generate(replace(config, out=folder / "shared", shard=f"{index}/2"))
    assert files_of(config.out) == files_of(folder / "single") == files_of(folder / "shared")
    assert len(files_of(config.out)) == 7
    whole = entries_of(config.out / "results.jsonl")
    assert entries_of(*(folder / "shared" / f"results.{index}-of-2.jsonl" for index in range(2))) == whole


def test_finished_prompts_are_skipped_and_others_go_on(
    config: GenerateConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.prompts
    whole = config.prompts.read_text().splitlines(keepends=True)
    config.prompts.write_text("".join(whole[:2]))
    generate(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.glob("*_0*")}
    assert len(before) == 3
    config.prompts.write_text("".join(whole))
    generate(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    generate(replace(config, out=folder / "once"))
    assert files_of(config.out) == files_of(folder / "once")
    (config.out / "texts_0001.txt").unlink()
    generate(config)
    assert files_of(config.out) == files_of(folder / "once")
    with pytest.raises(ValueError, match=r"settings\.order was .raster. when this was written"):
        generate(replace(config, order="masks"))
    monkeypatch.setattr(MixedModal, "from_pretrained", lambda *_: pytest.fail("a model is loaded"))
    generate(config)


@pytest.mark.parametrize("order", ["raster", "masks"])
def test_a_box_behind_its_picture_on_the_command_line(
    exported: Path, folder: Path, picture: Image.Image, order: str
) -> None:
    given = ["--prompt", "pear", "--image", str(folder / "apple.png"), "--box", "0,8,16,16", "--order", order]
    results = run(exported, folder, *given, "--num", "2", "--seed", "3")
    model = MixedModal.from_pretrained(exported, "cpu")
    wanted = model.infill(picture, (0, 8, 16, 16), "pear", num=2, seed=3, order=order)  # type: ignore[arg-type]
    found = [Image.open(folder / "out" / part["image"]) for one in results["samples"] for part in one["parts"]]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one, int), np.asarray(other, int), atol=1)  # worst seen 0
    assert results["prompt"] == [{"text": "pear"}, {"image": str(folder / "apple.png"), "box": BOX}]
    assert results["settings"]["order"] == order
    assert json.loads(found[0].text["prompt"]) == results["prompt"]  # type: ignore[attr-defined]
    assert (folder / "out" / "contact_sheet.png").is_file()


def test_a_region_stands_for_a_box_and_masks_for_texts(exported: Path, folder: Path) -> None:
    image = ["--image", str(folder / "apple.png")]
    run(exported, folder, *image, "--box=[0, 8, 16, 16]")
    box = Image.open(folder / "out" / "0000.png").tobytes()
    results = run(exported, folder, *image, "--region", str(folder / "lower.png"))
    assert Image.open(folder / "out" / "0000.png").tobytes() == box
    assert results["prompt"] == [{"image": str(folder / "apple.png"), "region": str(folder / "lower.png")}]
    given = ["--prompt", "a red ", "--mask", "2", "--prompt=, flat style", *image, "--max_new_tokens", "4"]
    results = run(exported, folder, *given)
    wanted = ["a red ", Mask(2), ", flat style", Image.open(folder / "apple.png")]
    ((text,),) = MixedModal.from_pretrained(exported, "cpu").fill_masks(wanted, max_new_tokens=4)
    assert results["samples"][0]["masks"] == [{"mask": 2, "text": text}]
    assert results["samples"][0]["parts"] == [{"text": f"a red {text}, flat style", "file": "0000.txt"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "pear"], "the prompt: there is no hole for the output infill"),
        (["--mask", "0", "--prompt", "a", "--mask", "0"], "the prompt: mask 0 stands there twice"),
        (["--image", "apple.png", "--box", "0,0,17,4"], "part 0 of the prompt: the box (0, 0, 17, 4) does not lie in"),
        (["--image", "apple.png", "--box", "4,0,4,4"], "box is [4, 0, 4, 4]; it must be [left, top, right, bottom]"),
        (["--image", "apple.png", "--region", "none.png"], "part 0 of the prompt: there is no picture at none.png"),
        (["--image", "apple.png", "--region", "small.png"], "the mask has 9x8 pixels, the picture 16x16"),
        (["--image", "broken.png", "--box", "0,0,4,4"], "part 0 of the prompt (broken.png): not a picture"),
        (["--mask", "0", "--guidance_scale", "2"], "guidance acts on pictures alone"),
        (["--mask", "0", "--order", "masks"], "order masks acts on regions of pictures alone"),
        (["--mask", "0", "--image_sampling.top_k", "3"], "image_sampling can not act where masks are filled"),
        (["--image", "apple.png", "--box=0,0,4,4", "--text_sampling.top_k=3"], "text_sampling can not act where a reg"),
        (["--image", "apple.png", "--box=0,0,4,4", "--max_new_tokens=3"], "max_new_tokens can not act where a region"),
        (["--image", "apple.png", "--box=0,0,4,4", "--unconditional=drop"], "unconditional can not act"),
        (["--mask", "0", "--memory", "m", "--retrieve", "1"], "no documents are read before masks in texts"),
        (["--mask", "0", "--best_of", "2"], "best_of can not act where output is infill"),
        (["--output=text", "--prompt", "a", "--mask", "0"], "the prompt: mask 0 can not be filled by the output text"),
        (["--output=image", "--image=apple.png", "--box=0,0,4,4"], "the region of part 0 can not be filled by the out"),
        (["--output=image", "--prompt", "a", "--order", "masks"], "order can not act where output is image"),
    ],
)
def test_what_can_not_be_filled_is_refused_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    Image.new("L", (9, 8), 255).save(folder / "small.png")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(MixedModal, "from_pretrained", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        run(folder, folder, *options)
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_prompt_of_a_file_that_can_not_be_filled_is_listed_with_its_line(
    config: GenerateConfig, folder: Path
) -> None:
    lines = [
        {"key": "wide", "parts": [{"image": "apple.png", "box": [0, 0, 17, 4]}]},
        {"key": "mask", "parts": [{"text": "a"}, {"mask": 8}]},
        {"key": "size", "parts": [{"image": "apple.png", "region": "small.png"}]},
        {"key": "stretches", "parts": [{"text": "pear"}, {"image": "apple.png", "region": "corners.png"}]},
    ]
    Image.new("L", (9, 8), 255).save(folder / "small.png")
    corners = np.zeros((4, 4), np.uint8)
    corners[:, ::2] = 255
    Image.fromarray(corners.repeat(4, axis=0).repeat(4, axis=1)).save(folder / "corners.png")
    path = folder / "prompts.jsonl"

    def errors(config: GenerateConfig, some: list[dict[str, Any]]) -> list[str]:
        path.write_text("".join(json.dumps(line) + "\n" for line in [*some, PROMPTS[1]]))
        with pytest.raises(ValueError, match="prompts failed, see"):
            generate(config)
        entries = entries_of(config.out / "results.jsonl")
        assert [key for key, entry in entries.items() if "samples" in entry] == ["box"]
        return [entries[line["key"]]["error"] for line in some]

    first, second, third = errors(config, lines[:3])
    assert first == f"part 0 of {path}:1 (wide): the box (0, 0, 17, 4) does not lie in the picture of 16x16 pixels"
    assert second == f"{path}:2 (mask): there is no mask 8; the model has 8, from 0 to 7"
    assert third == f"part 0 of {path}:3 (size): the mask has 9x8 pixels, the picture 16x16"
    (fourth,) = errors(replace(config, order="masks", out=folder / "masks"), lines[3:])
    assert fourth.startswith(f"{path}:1 (stretches): the region has 8 stretches of codes, and the model 7 masks")
