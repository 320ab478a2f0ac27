"""Tiny pipelines with random weights, built once each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest

Build = Callable[[str], Any]


@pytest.fixture(scope="session")
def build_pipeline(load: Callable[[str], ModuleType]) -> Build:
    """A function of a family: its pipeline, which tests must not change."""
    pytest.importorskip("diffusers")
    return cache(load("tiny_diffusion").build)


@pytest.fixture(scope="session")
def fresh_pipeline(load: Callable[[str], ModuleType]) -> Build:
    """A function of a family: a pipeline of one's own."""
    pytest.importorskip("diffusers")
    return load("tiny_diffusion").build
