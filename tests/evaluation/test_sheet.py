"""The contact sheet."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.evaluation.sheet import DECODED, MARGIN, ORIGINAL, draw_sheet, save_sheet


def shades(values: list[float], size: int) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def pair(originals: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, torch.Tensor]:
    return {ORIGINAL: originals, DECODED: reconstructions}


def patches(sheet: Image.Image) -> list[list[int]]:
    """Shades of the pictures in each row of the sheet, read at their centres: what is neither white nor text."""
    pixels = np.asarray(sheet.convert("L"))[:, MARGIN:]
    rows = [line for line in pixels if (line != 255).any()]
    found: list[list[int]] = []
    for line in rows:
        runs = [
            int(value) for place, value in enumerate(line) if value != 255 and (place == 0 or line[place - 1] == 255)
        ]
        if not found or found[-1] != runs:
            found.append(runs)
    return found


def test_originals_stand_above_their_reconstructions() -> None:
    originals, reconstructions = shades([-1.0, -0.8, -0.6, -0.4, -0.2], 8), shades([-0.9, -0.7, -0.5, -0.3, -0.1], 8)
    grey = [
        [round((v + 1) * 127.5) for v in values]
        for values in ([-1, -0.8, -0.6, -0.4, -0.2], [-0.9, -0.7, -0.5, -0.3, -0.1])
    ]
    found = patches(draw_sheet(pair(originals, reconstructions), columns=3))
    expected = [grey[0][:3], grey[1][:3], grey[0][3:], grey[1][3:]]
    assert [len(row) for row in found] == [3, 3, 2, 2]
    assert np.allclose(list(chain(*found)), list(chain(*expected)), atol=1)


@pytest.mark.parametrize(("size", "shown"), [(32, 96), (64, 128), (256, 256)])
def test_small_pictures_are_enlarged_to_be_readable(size: int, shown: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    save_sheet(pair(images, -images), tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        top = next(row for row, line in enumerate(np.asarray(sheet)[:, MARGIN]) if (line != 255).any())
        cell = np.asarray(sheet.crop((MARGIN, top, MARGIN + shown, top + shown)))
    pixels = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(cell[:: shown // size, :: shown // size], pixels)


def test_rows_are_labelled() -> None:
    sheet = np.asarray(draw_sheet(pair(shades([1.0], 64), shades([1.0], 64))).convert("L"))[:, : MARGIN - 4]
    dark = (sheet < 128).any(1)
    assert dark[: len(dark) // 2].any()
    assert dark[len(dark) // 2 :].any()


def test_several_rows_stand_below_one_another_beside_labels_of_any_length() -> None:
    rows = {"original": shades([-1.0], 96), "a label that needs more room": shades([-0.6], 96), "c": shades([-0.2], 96)}
    sheet = np.asarray(draw_sheet(rows).convert("L"))
    assert sheet.shape[1] > MARGIN + 96 + 100
    column = sheet[:, -20]
    shown = [int(value) for place, value in enumerate(column) if value != 255 and column[place - 1] == 255]
    assert shown == [0, 51, 102]


def test_pictures_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="contact sheet"):
        draw_sheet(pair(shades([0.0], 8), shades([0.0, 0.0], 8)))
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet(pair(torch.empty(0, 3, 8, 8), torch.empty(0, 3, 8, 8)))
