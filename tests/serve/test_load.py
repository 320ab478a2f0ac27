"""The benchmark of the page under load, with few requests: how they end is told apart."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


@pytest.mark.slow  # starts a server
@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
def test_all_at_once_are_answered_or_told_that_the_page_is_busy(load: Callable[[str], ModuleType]) -> None:
    benchmark, found = load("serve_load"), {}

    def write(name: str, subject: str, values: list[float], unit: str, kind: str, config: dict[str, Any]) -> None:
        assert (name, kind, config["max_queue"]) == ("serve_load", "cpu", 4)
        found[subject] = values[0]

    benchmark.measure(benchmark.build_parser().parse_args(["--requests", "40", "--max_queue", "4"]), write)
    assert found["at once: answered"] + found["at once: busy"] == 40
    assert found["at once: busy"] >= 30
    assert found["served: visitors that left half-way"] >= 4
    assert found["served: memory after 40 answers"] - found["served: memory after 4 answers"] < 60


def test_a_request_that_ends_in_another_way_ends_the_benchmark(load: Callable[[str], ModuleType]) -> None:
    tally = load("serve_load").Tally()

    class Page:
        def ask(self, visitor: str, *, leaves: bool) -> str:
            if visitor == "second":
                raise RuntimeError("status 500: no")
            return "answered"

    tally.add(Page(), "first")
    tally.check()
    tally.add(Page(), "second")
    assert tally.ends == {"answered": 1, "failed": 1}
    with pytest.raises(SystemExit, match="1 requests failed; the first: RuntimeError: status 500: no"):
        tally.check()
