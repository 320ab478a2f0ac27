"""Tiny pipelines with random weights, built once each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest

Build = Callable[[str], Any]


@pytest.fixture(scope="session")
def tiny(load: Callable[[str], ModuleType]) -> ModuleType:
    """What builds the pipelines, and replays their steps."""
    pytest.importorskip("diffusers")
    return load("tiny_diffusion")


@pytest.fixture(scope="session")
def build_pipeline(tiny: ModuleType) -> Build:
    """A function of a family: its pipeline, which tests must not change."""
    return cache(tiny.build)


@pytest.fixture(scope="session")
def fresh_pipeline(tiny: ModuleType) -> Build:
    """A function of a family: a pipeline of one's own."""
    return tiny.build
