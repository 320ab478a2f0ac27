"""The three commands of docs/tutorial.md, as they stand there, on 500 pictures that no part of the quickstart has seen.

    python benchmarks/own_pictures.py runs/quickstart runs/own_pictures --sheet docs/own_pictures.png

Draws coloured shapes as a folder of the kind that people have (PNG, JPEG with EXIF rotation, WebP and transparent
files of many sizes in nested folders, captions beside them, and six files that are no use), runs the commands, and
records how long each takes and what the model draws for "a red circle" and the like. Six of the thirty kinds of things
are in no picture: they are held out. What is drawn shows the thing whose picture, redrawn by the image tokenizer, is
the nearest.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from record import record

from mixmodal import MixedModal
from mixmodal.data.synthetic import SHAPES, CaptionedPicture, Scene, Thing, all_scenes, draw
from mixmodal.evaluation.concepts import nearest_pictures, redraw
from mixmodal.evaluation.sheet import draw_captioned
from mixmodal.tokenization.preprocessing import to_tensor

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES, DRAWN_EACH, VIEWS = 500, 8, 6
SHOWN_OF = {"trained": 3, "held out": 1}
"""Of so many prompts the sheet shows one."""
ROTATED = 0x0112, 6
"""The EXIF tag of orientation, and the value of a picture that is to be turned by 90 degrees clockwise."""


def held_out() -> list[Thing]:
    """A fifth of the things, each colour among them."""
    things = [scene.first for scene in all_scenes(1)]
    return [*things[:: len(SHAPES) + 1], things[-1]]


def pictures() -> Iterator[CaptionedPicture]:
    """Scenes without a thing that is held out, half of them with two things, of 120 to 900 pixels."""
    unseen = held_out()
    scenes = [
        [scene for scene in all_scenes(number) if not {scene.first, scene.second} & {*unseen}] for number in (1, 2)
    ]
    for index in range(NUM_PICTURES):
        rng = np.random.default_rng((7, index))
        own = scenes[index % 2]
        scene = own[int(rng.integers(len(own)))]
        yield CaptionedPicture(f"{index:03d}", draw(scene, int(rng.integers(120, 900)), rng), scene.caption)


def write_folder(folder: Path) -> None:
    """The pictures in four formats, and six files that are no use."""
    for index, (key, picture, caption) in enumerate(pictures()):
        path = folder / ("holiday 2024" if index % 3 else "Räume/old") / f"IMG {key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        wide = ImageOps.expand(picture, (int(picture.width * (index % 5) / 20), 0), "white")
        if index % 4 == 0:
            wide.save(path.with_suffix(".png"))
        elif index % 4 == 1:
            exif = Image.Exif()
            exif[ROTATED[0]] = ROTATED[1]
            wide.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".JPG"), "jpeg", quality=85, exif=exif)
        elif index % 4 == 2:
            wide.save(path.with_suffix(".webp"), quality=80)
        else:
            see_through = wide.convert("RGBA")
            see_through.putalpha(ImageOps.invert(wide.convert("L")).point(lambda grey: 255 if grey > 20 else 0))
            see_through.save(path.with_suffix(".png"))
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    whole = next(folder.rglob("*.JPG")).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_text("<html>404</html>")
    (folder / "nothing said.jpg").write_bytes(whole)
    (folder / "blank.jpg").write_bytes(whole)
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    for name, text in {"cut": "a cut", "empty": "an empty file", "page": "a page", "blank": ""}.items():
        (folder / f"{name}.txt").write_text(text)


def commands() -> list[list[str]]:
    """The block below the heading of the page."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    block = re.search(r"## Three commands\n+```sh\n(.*?)```", page, re.DOTALL)
    assert block is not None, "docs/tutorial.md has no block of three commands"
    found = [shlex.split(line) for line in block[1].splitlines()]
    assert [words[:2] for words in found] == [["mixmodal", name] for name in ("prepare", "pretrain", "generate")]
    return found


def judge(model: MixedModal, drawn: Sequence[Picture]) -> list[Thing]:
    """What each picture shows."""
    size, things = model.codec.image_tokenizer.config.image_size, [scene.first for scene in all_scenes(1)]
    views = [
        to_tensor(draw(Scene(thing), size, np.random.default_rng((9, view))))
        for thing in things
        for view in range(VIEWS)
    ]
    known = redraw(model.codec, torch.stack(views))
    found = nearest_pictures(torch.stack([to_tensor(picture.resize((size, size))) for picture in drawn]), known)
    return [things[index // VIEWS] for index in found.indices.tolist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a finished quickstart")
    parser.add_argument("work", type=Path, help="a folder that is not there yet")
    parser.add_argument("--sheet", type=Path, help="PNG of what was drawn")
    arguments = parser.parse_args()
    (arguments.work / "runs").mkdir(parents=True)
    (arguments.work / "runs" / "quickstart").symlink_to(arguments.quickstart.resolve())
    (arguments.work / "configs").symlink_to(ROOT / "configs")
    write_folder(arguments.work / "pictures")
    settings = {"pictures": NUM_PICTURES, "broken": 6}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for words in commands():
        start = time.perf_counter()
        subprocess.run(words, cwd=arguments.work, env=environment, check=True)
        record("own_pictures", f"{words[1]}: time", [time.perf_counter() - start], "s", "cpu", settings)
    model = MixedModal.from_pretrained(arguments.work / "runs" / "own" / "pretrain" / "export", "cpu")
    unseen, columns = held_out(), {}
    for split in SHOWN_OF:
        things = [scene.first for scene in all_scenes(1) if (scene.first in unseen) == (split == "held out")]
        prompts = [f"a {thing}" for thing in things]
        drawn = model.generate_batch(prompts, "image", num=DRAWN_EACH, seed=0)
        pairs = [(thing, picture) for thing, own in zip(things, drawn, strict=True) for picture in own]
        found = judge(model, [picture for _, picture in pairs])
        wanted = [thing for thing, _ in pairs]
        rates = {
            "thing": [one == other for one, other in zip(wanted, found, strict=True)],
            "colour": [one.color == other.color for one, other in zip(wanted, found, strict=True)],
            "shape": [one.shape == other.shape for one, other in zip(wanted, found, strict=True)],
        }
        for name, hits in rates.items():
            of = {**settings, "drawn": len(hits), "kinds": len(things)}
            record("own_pictures", f"right {name}, {split}", [float(np.mean(hits))], "share", "cpu", of)
        chosen = list(zip(prompts, drawn, strict=True))[:: SHOWN_OF[split]]
        columns |= {f"{prompt} ({split})": own[:3] for prompt, own in chosen}
    if arguments.sheet is not None:
        draw_captioned([*columns], *zip(*columns.values(), strict=True)).save(arguments.sheet, optimize=True)
