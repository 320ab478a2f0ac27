"""The benchmark of drawing pictures compares like with like."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")


@pytest.mark.slow  # imports transformers
def test_both_networks_draw_the_same_codes(load: Callable[[str], ModuleType]) -> None:
    decode, found = load("decode"), {}

    def write(
        benchmark: str, subject: str, values: list[float], unit: str, kind: str, settings: dict[str, Any]
    ) -> None:
        assert (benchmark, kind) == ("decode", "cpu")
        assert settings["codes"] in (16, 32)
        found[subject] = values

    options = decode.build_parser().parse_args(["--shape", "tiny", "--turns", "1", "--batch_sizes", "2"])
    comparison = decode.Comparison(options, write)
    assert decode.difference(comparison.model, comparison.peer) < 1e-5  # worst seen 3e-7
    comparison.check()
    comparison.compare_uncached()
    comparison.compare(2)
    comparison.compare_mixed(2)
    assert found["tiny, batch of 1: equal codes of ours and transformers at temperature 0"] == [100.0]
    assert len(found) == 9
    assert all(value > 0 for values in found.values() for value in values)
