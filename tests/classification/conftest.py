from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pipeline(load: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk."""
    pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("pipeline")
    load("tiny_diffusion").build("sd_epsilon").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, save_tiny_encoder: Callable[..., Path]) -> Path:
    """A tiny CLIP on disk."""
    return save_tiny_encoder("clip", tmp_path_factory.mktemp("clip"))
