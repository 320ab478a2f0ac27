"""The generate command: arguments in, files out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.config import UsageError, parse
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.generate import GenerateConfig, PromptPart, generate
from mixmodal.sampling.rules import TokenSampling


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_parts_keep_the_order_of_the_command_line(tmp_path: Path) -> None:
    argv = ["--prompt", "first: --x", "--image=a.png", "--num", "2", "--prompt=--last", "--image", "b c.png"]
    config = parse(GenerateConfig, ["--model", "m", "--out", str(tmp_path), *argv])
    assert config.num == 2
    assert config.parts == [
        PromptPart(text="first: --x"),
        PromptPart(image=Path("a.png")),
        PromptPart(text="--last"),
        PromptPart(image=Path("b c.png")),
    ]


def test_holes_keep_their_place_and_a_region_is_of_the_picture_before_it(tmp_path: Path) -> None:
    argv = ["--prompt", "a ", "--mask", "3", "--image", "a.png", "--box", "[0, 1,2,3]", "--seed=1", "--mask=0"]
    argv += ["--image=b.png", "--region", "m.png", "--output", "infill"]
    config = parse(GenerateConfig, ["--model", "m", "--out", str(tmp_path), *argv])
    assert config.seed == 1
    assert config.parts == [
        PromptPart(text="a "),
        PromptPart(mask=3),
        PromptPart(image=Path("a.png"), box=(0, 1, 2, 3)),
        PromptPart(mask=0),
        PromptPart(image=Path("b.png"), region=Path("m.png")),
    ]


def test_prompts_that_look_like_other_things_stay_text() -> None:
    texts = ["null", "1", "{a: b}", "caf\u00e9 \u201cquoted\u201d", "two\nlines"]
    argv = [word for text in texts for word in ("--prompt", text)]
    config = parse(GenerateConfig, ["--model", "m", "--out", "o", *argv])
    assert [part.text for part in config.parts] == texts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt"], "--prompt needs a value"),
        (["--image", "--num", "3"], "--image needs a value"),
        (["--prompt", "a", "--parts=[]"], "either by --prompt and --image or by --parts"),
        (["--mask"], "--mask needs a value"),
        (["--mask", "m.png"], "--mask is 'm.png'; it must be the number of a mask in a text"),
        (["--box", "0,0,4,4"], "--box 0,0,4,4 says what of a picture is drawn anew; give it right behind --image"),
        (["--image", "a", "--prompt", "a", "--region", "m"], "--region m says what of a picture is drawn anew"),
        (["--image", "a", "--box", "0,0,4"], "--box is '0,0,4'; it must be left,top,right,bottom"),
        (["--image", "a", "--box", "0,0,4,4", "--region", "m"], "--region m: the picture before it has a region"),
    ],
)
def test_half_given_prompts_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(GenerateConfig, ["--model", "m", "--out", "o", *argv])
    with pytest.raises(UsageError, match=r"text_sampling\.top_k"):
        parse(GenerateConfig, ["--model", "m", "--out", "o", "--text_sampling.topk", "3"])


def test_generate_writes_pictures_that_say_how_they_were_made(
    exported: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [PromptPart(text="caf\u00e9"), PromptPart(image=pictures / "unknown.png")]
    config = GenerateConfig(
        model=str(exported), out=tmp_path / "out", parts=parts, num=3, seed=4, guidance_scale=2.0, device="cpu"
    )
    generate(config)
    results = read(tmp_path / "out" / "results.json")
    assert results["samples"][1] == {"sample": 1, "parts": [{"image": "0001.png"}]}
    assert results["prompt"] == [{"text": "caf\u00e9"}, {"image": str(pictures / "unknown.png")}]
    written = PIL.open(tmp_path / "out" / "0001.png")
    assert json.loads(written.text["prompt"]) == results["prompt"]
    assert (written.text["seed"], written.text["sample"]) == ("4", "1")
    assert json.loads(written.text["settings"])["guidance_scale"] == 2.0
    prompt = ["caf\u00e9", PIL.open(pictures / "unknown.png")]
    again = MixedModal.from_pretrained(exported, "cpu").generate(prompt, num=2, seed=4, guidance_scale=2.0)[1]
    # worst seen 0; decoders round differently by how many pictures they decode
    np.testing.assert_allclose(np.asarray(again, int), np.asarray(written, int), atol=1)
    assert str(tmp_path / "out" / "results.json") in capsys.readouterr().out


@pytest.mark.parametrize("output", ["text", "mixed"])
def test_generate_lists_every_file_it_writes(exported: Path, tmp_path: Path, output: str) -> None:
    common = {"model": str(exported), "out": tmp_path / "out", "num": 6, "device": "cpu", "max_new_tokens": 40}
    generate(GenerateConfig(parts=[PromptPart(text="pear")], output=output, **common))
    listed = set()
    for sample in read(tmp_path / "out" / "results.json")["samples"]:
        for part in sample["parts"]:
            listed.add(part["file"] if "text" in part else part["image"])
            if "text" in part:
                assert (tmp_path / "out" / part["file"]).read_text(encoding="utf-8") == part["text"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*listed, "results.json"}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (PromptPart(), "part 0 of the prompt must have either"),
        (PromptPart(text="a", image=Path("b")), "either a text, an image or a mask"),
        (PromptPart(image=Path("none.png")), "there is no picture at none.png"),
    ],
)
def test_a_part_that_is_none_is_named(part: PromptPart, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(GenerateConfig(model="m", out=tmp_path, parts=[part]))


@pytest.mark.parametrize(("output", "idle"), [("text", "image_sampling"), ("image", "text_sampling")])
def test_sampling_of_what_is_not_made_is_refused(output: str, idle: str) -> None:
    with pytest.raises(ValueError, match=f"{idle} can not act where output is {output}"):
        GenerateConfig(model="model", out=Path("out"), output=output, **{idle: TokenSampling(top_k=7)})
