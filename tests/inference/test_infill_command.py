"""The infill command: what it draws, what it leaves, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmodal import MixedModal
from mixmodal.cli import main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "apple.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def run(exported: Path, picture: Path, *options: str) -> None:
    main(["infill", "--model", str(exported), "--picture", str(picture), "--device", "cpu", *options])


@pytest.mark.parametrize("order", ["raster", "masks"])
def test_pictures_are_those_of_the_model_and_listed(exported: Path, picture: Path, tmp_path: Path, order: str) -> None:
    out = tmp_path / "out"
    given = ["--box", "[0,8,16,16]", "--prompt", "pear", "--num", "2", "--seed", "3", "--order", order]
    run(exported, picture, *given, "--out", str(out))
    model = MixedModal.from_pretrained(exported, "cpu")
    with Image.open(picture) as opened:
        wanted = model.infill(opened, (0, 8, 16, 16), "pear", num=2, seed=3, order=order)  # type: ignore[arg-type]
    results = json.loads((out / "results.json").read_text())
    files = [part["image"] for sample in results["samples"] for part in sample["parts"]]
    assert [np.asarray(Image.open(out / file)).tolist() for file in files] == [
        np.asarray(one).tolist() for one in wanted
    ]
    assert (results["region"], results["prompt"], results["order"]) == ([0, 8, 16, 16], "pear", order)
    assert Image.open(out / files[0]).text["prompt"] == "pear"  # type: ignore[attr-defined]
    assert (out / "contact_sheet.png").is_file()


def test_a_mask_picture_stands_for_a_box(exported: Path, picture: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    mask.save(tmp_path / "mask.png")
    for name, region in (("box", ["--box", "[0,8,16,16]"]), ("mask", ["--mask", str(tmp_path / "mask.png")])):
        run(exported, picture, *region, "--out", str(tmp_path / name))
    found = [(tmp_path / name / "0000.png") for name in ("box", "mask")]
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either box, in pixels, or mask"),
        (["--box", "[0,0,4,4]", "--mask", "mask.png"], "give either box, in pixels, or mask"),
        (["--mask", "none.png"], "mask: there is no picture at none.png"),
        (["--box", "[0,0,17,4]"], r"the box (0, 0, 17, 4) does not lie in the picture of 16x16 pixels"),
        (["--box", "[0,0,4,4]", "--guidance_scale", "2"], "strengthen the prompt's text, and it has none"),
        (["--box", "[0,0,4,4]", "--unconditional", "drop"], "unconditional can not act"),
    ],
)
def test_what_can_not_be_drawn_is_refused(
    exported: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(exported, picture, "--out", str(tmp_path / "out"), *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run(exported, tmp_path / "broken.png", "--box", "[0,0,4,4]", "--out", str(tmp_path / "out"))
    assert "broken.png" in capsys.readouterr().err
