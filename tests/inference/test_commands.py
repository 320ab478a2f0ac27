"""The generate and classify commands: arguments in, files out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.classification.evaluate import NamedClass, read_classes, read_pictures, summarise
from mixmodal.config import UsageError, parse
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SkipCounter, TooManySkipped
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.pipeline.generate import GenerateConfig, PromptPart, generate
from mixmodal.sampling.rules import TokenSampling

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures in a folder a label, and one without a label."""
    folder = tmp_path / "pictures"
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(2):
            PIL.new("RGB", (20 + number, 16), colour).save(folder / label / f"{number}.png")
    PIL.new("RGB", (16, 16)).save(folder / "unknown.png")
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("red\ta red apple\ngreen\ta green apple\n\nblue\n")
    return tmp_path / "classes.txt"


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


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_classify_scores_every_picture_of_a_folder(
    exported: Path, tmp_path: Path, pictures: Path, classes: Path, method: str
) -> None:
    out = tmp_path / "deep" / "report.json"
    options = {"debias": 0.5, "length_normalise": True} if method == "text_given_image" else {}
    config = ClassifyConfig(
        model=str(exported), data=pictures, classes=classes, out=out, method=method, template="{}!", **options
    )
    classify(config)
    report = read(out)
    assert report["num_pictures"] == 7
    assert report["num_labelled"] == 6
    assert [one["caption"] for one in report["classes"]] == ["a red apple!", "a green apple!", "blue!"]
    rows = {entry["key"]: entry for entry in report["pictures"]}
    assert rows["red/0.png"]["label"] == "red"
    assert rows["unknown.png"]["label"] is None
    correct = sum(entry["prediction"] == entry["label"] for entry in report["pictures"] if entry["label"])
    assert report["accuracy"] == pytest.approx(correct / 6)
    assert np.array(report["confusion"]).sum() == 6
    assert np.trace(report["confusion"]) == correct
    model = MixedModal.from_pretrained(exported, "cpu")
    picture = PIL.open(pictures / "blue" / "1.png")
    found = model.score_classes([picture], ["a red apple!", "a green apple!", "blue!"], method, **options)
    np.testing.assert_allclose(rows["blue/1.png"]["probabilities"], found.probabilities[0], atol=1e-5)  # worst seen 0


def test_labels_of_shards_are_their_metadata_or_their_text(tmp_path: Path, pictures: Path, classes: Path) -> None:
    data = (pictures / "unknown.png").read_bytes()
    file = PictureFile(data, "png", "x")
    samples = [
        Sample("a", ("a red apple", file)),
        Sample("b", ("blue", file)),
        Sample("c", ("something", file)),
        Sample("d", ("something", file), {"label": "green"}),
    ]
    write_shards(samples, tmp_path / "shards")
    found = read_pictures(tmp_path / "shards", read_classes(classes), SkipCounter())
    assert [(one.key, one.label) for one in found] == [("a", "red"), ("b", "blue"), ("c", None), ("d", "green")]


def test_broken_pictures_are_counted_and_too_many_fail(
    exported: Path, tmp_path: Path, pictures: Path, classes: Path
) -> None:
    (pictures / "red" / "2.png").write_bytes(b"no picture")
    common = {"model": str(exported), "data": pictures, "classes": classes, "out": tmp_path / "report.json"}
    with pytest.raises(TooManySkipped, match="1 broken picture"):
        classify(ClassifyConfig(**common))
    assert not (tmp_path / "report.json").exists()
    classify(ClassifyConfig(max_skipped_share=0.2, **common))
    assert read(tmp_path / "report.json")["skipped"]["skipped"] == {"broken picture": 1}


def test_a_tie_earns_its_share() -> None:
    entries = [
        {"label": "a", "prediction": "a", "tied": ["a", "b"]},
        {"label": "b", "prediction": "b", "tied": ["b"]},
        {"label": "a", "prediction": "b", "tied": ["b"]},
        {"label": None, "prediction": "a", "tied": ["a"]},
    ]
    found = summarise(entries, ["a", "b"])
    assert (found["num_correct"], found["accuracy"], found["num_ties"]) == (1.5, 0.5, 1)
    assert found["confusion"] == [[1, 1], [0, 1]]
    assert summarise(entries[3:], ["a", "b"])["accuracy"] is None


def test_classes_and_data_that_do_not_fit_are_refused(tmp_path: Path, pictures: Path, classes: Path) -> None:
    twice, single = tmp_path / "twice.txt", tmp_path / "single.txt"
    twice.write_text("a\nb\na\n")
    single.write_text("a\n")
    for path, message in ((twice, "'a' more than once"), (single, "has 1 of them"), (tmp_path / "no.txt", "no file")):
        with pytest.raises(ValueError, match=message):
            read_classes(path)
    with pytest.raises(ValueError, match=r"has no \{\}"):
        read_classes(classes, "a photo")
    for folder, message in ((tmp_path / "none", "there is no folder"), (tmp_path, "neither pictures")):
        with pytest.raises(ValueError, match=message):
            list(read_pictures(folder if folder != tmp_path else empty(tmp_path), read_classes(classes), SkipCounter()))
    with pytest.raises(ValueError, match="is labelled 'blue', which the classes do not have"):
        list(read_pictures(pictures, [NamedClass("red", "red"), NamedClass("green", "green")], SkipCounter()))


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_a_method_of_a_later_version_says_what_there_is(tmp_path: Path) -> None:
    config = ClassifyConfig(model="m", data=tmp_path, classes=tmp_path, out=tmp_path, method="diffusion")
    with pytest.raises(ValueError, match="not part of this version; choose image_given_text or text_given_image"):
        classify(config)
