"""The picture of curves that benchmarks draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("value", [0.5, 1.0, 1e6 / 3, 0.0, -2.0])
def test_a_panel_of_equal_values_is_drawn(
    value: float, logarithmic: bool, load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load("curves").draw_curves({"one": {"arm": [[(0, value), (9, value)]]}}, tmp_path / "p.png", 1, logarithmic)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("value", [0.5, 1e6 / 3, 0.0, -2.0])
def test_the_axis_of_one_value_has_it_within(value: float, load: Callable[[str], ModuleType]) -> None:
    ticks = load("curves").axis(value, value, False)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] < value < ticks[-1]
