"""Prompts with holes through the queue: each is filled as it is alone, and what can not be filled fails alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.document import Mask
from mixmodal.pipeline import queue
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.masked_text import FilledText
from mixmodal.pipeline.queue import Ask, Drawn, Failed

BOX = (0, 8, 16, 16)
PICTURE = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASKED = {
    "one": ["a red ", Mask(0), ", flat style"],
    "three": [Mask(2), " apple", PICTURE, "a ", Mask(0), Mask(1)],
}
REGIONS = {"caption": ["pear", PartialPicture(PICTURE, BOX)], "bare": [PartialPicture(PICTURE, BOX)]}
REGIONS["pictures"] = ["pear", PICTURE, PartialPicture(PICTURE, PIL.new("L", (16, 16), 255))]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "WINDOW_BATCHES", 2)


def bytes_of(sample: Any) -> Any:
    return sample.tobytes() if isinstance(sample, PIL.Image) else sample


def fill(exported: Path, asks: list[Ask], batch_size: int, **options: Any) -> dict[tuple[str, int], Any]:
    model = MixedModal.from_pretrained(exported, "cpu", batch_size=batch_size)
    found = list(model.generate_each(asks, "infill", **options))
    assert all(isinstance(one, Drawn) for one in found), found
    return {(one.key, one.number): one.sample for one in found if isinstance(one, Drawn)}


def test_masks_and_regions_are_filled_as_from_python_whatever_is_drawn_beside_them(exported: Path) -> None:
    prompts = {**MASKED, **REGIONS}
    asks = [Ask(key, parts, num=2, seed=seed) for seed, (key, parts) in enumerate(prompts.items())]
    small, large = (fill(exported, some, size, max_new_tokens=6) for some, size in ((asks, 2), (asks[::-1], 64)))
    assert {name: bytes_of(one) for name, one in small.items()} == {name: bytes_of(one) for name, one in large.items()}
    model = MixedModal.from_pretrained(exported, "cpu")
    for ask in asks:
        if ask.key in MASKED:
            wanted = model.fill_masks(ask.prompt, num=2, seed=ask.seed, max_new_tokens=6)  # type: ignore[arg-type]
            assert [list(small[ask.key, number].masks.values()) for number in range(2)] == wanted
            continue
        *before, last = ask.prompt
        assert isinstance(last, PartialPicture)
        for number, one in enumerate(model.infill(last.picture, last.region, before, num=2, seed=ask.seed)):  # type: ignore[arg-type]
            found = small[ask.key, number]
            # worst seen 1; decoders round differently by how many pictures they decode
            np.testing.assert_allclose(np.asarray(found, int), np.asarray(one, int), atol=1)
    assert len({bytes_of(small[key, number]) for key in REGIONS for number in range(2)}) == 6


def test_a_region_is_drawn_in_the_order_of_masks_and_guided(exported: Path) -> None:
    ask = Ask("a", REGIONS["caption"], seed=3)
    found = fill(exported, [ask], 4, order="masks", guidance_scale=3.0)["a", 0]
    model = MixedModal.from_pretrained(exported, "cpu")
    wanted = [model.infill(PICTURE, BOX, "pear", seed=3, order="masks", guidance_scale=scale)[0] for scale in (3.0, 1)]
    assert found.tobytes() == wanted[0].tobytes()
    assert found.tobytes() != wanted[1].tobytes()


def test_the_whole_text_has_what_stands_for_its_masks(exported: Path) -> None:
    asks = [Ask(key, parts, seed=2) for key, parts in MASKED.items()]
    found = fill(exported, asks, 4, max_new_tokens=4)
    one, three = found["one", 0], found["three", 0]
    assert isinstance(one, FilledText)
    assert (one.text, list(one.masks)) == (f"a red {one.masks[0]}, flat style", [0])
    assert list(three.masks) == [2, 0, 1]
    assert three.text == f"{three.masks[2]} apple\na {three.masks[0]}{three.masks[1]}"


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (["a red apple"], {}, "there is no hole for the output infill"),
        ([Mask(1), "a", Mask(1)], {}, "mask 1 stands there twice"),
        ([Mask(8)], {}, "there is no mask 8; the model has 8, from 0 to 7"),
        ([Mask(0), *REGIONS["bare"]], {}, "masks in texts and a region of a picture"),
        ([*REGIONS["bare"], *REGIONS["bare"]], {}, "parts 0 and 1 are both pictures with a region"),
        ([*REGIONS["bare"], "pear"], {}, "part 0 is a picture with a region, which must be the last part"),
        ([PartialPicture(PICTURE, (0, 0, 17, 4))], {}, "the box (0, 0, 17, 4) does not lie in the picture of 16x16"),
        ([PartialPicture(PICTURE, PIL.new("L", (9, 9), 255))], {}, "the mask has 9x9 pixels, the picture 16x16"),
        ([Mask(0)], {"guidance_scale": 2.0}, "guidance acts on pictures alone"),
        ([Mask(0)], {"order": "masks"}, "order masks acts on regions of pictures alone"),
        ([Mask(0)], {"retrieve": 1}, "no documents are read before masks in texts"),
        (["a" * 200, Mask(0)], {}, "too few for the output 'infill'"),
    ],
)
def test_what_can_not_be_filled_leaves_the_others_alone(
    exported: Path, parts: list[Any], options: dict[str, Any], message: str
) -> None:
    model = MixedModal.from_pretrained(exported, "cpu", batch_size=2)
    (found,) = model.generate_each([Ask("a", parts)], "infill", **options)
    assert isinstance(found, Failed)
    assert message in str(found.error)
    if not options:
        rest = [Ask("b", MASKED["one"]), Ask("a", parts), Ask("c", REGIONS["bare"])]
        both = list(model.generate_each(rest, "infill", max_new_tokens=3))
        assert sorted((one.key, isinstance(one, Drawn)) for one in both) == [("a", False), ("b", True), ("c", True)]


def test_stretches_beyond_the_masks_are_refused(exported: Path) -> None:
    model = MixedModal.from_pretrained(exported, "cpu")
    corners = PIL.new("L", (16, 16))
    for column in (0, 8):
        for row in range(0, 16, 4):
            corners.paste(255, (column, row, column + 4, row + 4))
    (found,) = model.generate_each([Ask("a", ["pear", PartialPicture(PICTURE, corners)])], "infill", order="masks")
    assert isinstance(found, Failed)
    assert "the region has 8 stretches of codes, and the model 7 masks" in str(found.error)


def test_other_outputs_leave_a_region_alone_and_options_that_can_not_act_are_refused(exported: Path) -> None:
    model = MixedModal.from_pretrained(exported, "cpu")
    (found,) = model.generate_each([Ask("a", REGIONS["caption"])], "image")
    assert isinstance(found, Failed)
    assert "the region of part 1 can not be filled by the output image; take the output infill" in str(found.error)
    for output, options in (("infill", {"best_of": 2}), ("image", {"order": "masks"})):
        with pytest.raises(ValueError, match="best_of can not act on the output infill, nor order on any other"):
            model.generate_each([], output, **options)
