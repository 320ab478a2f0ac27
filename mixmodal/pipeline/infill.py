"""The infill command: a region of a picture drawn anew."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Pictures

from mixmodal.pipeline.drawing_config import DrawingConfig
from mixmodal.pipeline.infilling import Order, Region
from mixmodal.pipeline.results import (
    RESULTS,
    SHEET,
    files_of,
    write_documents,
    write_results,
    write_sample,
    write_sheet,
)
from mixmodal.tokenization.preprocessing import open_picture


@dataclass(frozen=True, kw_only=True)
class InfillConfig(DrawingConfig):
    """Draws a region of a picture anew, with a prompt before it, as its caption.

    Further options are those of `DrawingConfig`.

    Args:
        picture: file of the picture.
        box: what is drawn anew, in pixels `[left, top, right, bottom]`.
        mask: in its place a file of the picture's size, white where it is drawn anew.
        prompt: text before the picture; empty is none.
        order: `raster` draws code by code and knows what stands before each; `masks` reads all that is known of the
            picture, which takes a model that was trained with masks in pictures (CM3).
    """

    picture: Path
    box: tuple[int, int, int, int] | None = None
    mask: Path | None = None
    prompt: str = ""
    order: Order = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_guidance(follows_text=bool(self.prompt))
        if (self.box is None) == (self.mask is None):
            raise ValueError("give either box, in pixels, or mask, a picture: what is drawn anew")


def infill(config: InfillConfig) -> None:
    """Draws the samples, writes them with `results.json`, and says where.

    Raises:
        ValueError: for a picture or mask that can not be read, or what `MixedModal.infill` raises.
    """
    picture = read_picture(config.picture, "picture")
    region: Region | None = config.box if config.mask is None else read_picture(config.mask, "mask")
    assert region is not None
    model, prompt = config.load(), [config.prompt] if config.prompt else []
    before = model.retrieve([prompt], config.retrieve, random_seed=config.random_seed)[0] if config.retrieve else []
    started = time.perf_counter()
    found = model.infill(
        picture,
        region,
        prompt,
        num=config.num,
        seed=config.seed,
        order=config.order,
        before=before,
        **config.options(),
    )
    seconds = time.perf_counter() - started
    described = {
        "model": config.model,
        "picture": str(config.picture),
        "region": list(config.box) if config.box is not None else str(config.mask),
        "prompt": config.prompt,
        "order": config.order,
        "seed": config.seed,
        "settings": config.options(),
        **config.describe(),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    listed = {"retrieved": write_documents(model, before, config.out)} if before else {}
    samples = [write_sample(one, number, config.out, "", described) for number, one in enumerate(found)]
    write_results(config.out / f"{RESULTS}.json", {**described, **listed, "samples": samples})
    names = files_of(samples, "image")
    write_sheet(config.out / f"{SHEET}.png", [(config.out / name, config.prompt) for name in names])
    print(f"{len(found)} pictures in {config.out}, {seconds:.1f} s, listed in {config.out / RESULTS}.json")


def read_picture(path: Path, name: str) -> Pictures.Image:
    """A picture from its file.

    Raises:
        ValueError: naming the option and the file.
    """
    if not path.is_file():
        raise ValueError(f"{name}: there is no picture at {path}")
    return open_picture(path, f"{name} ({path})")
