"""The stub model and a picture for it; no gradio."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from stub_model import StubModel


@pytest.fixture
def stub() -> StubModel:
    return StubModel()


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """The file of a picture of 60 x 40 pixels."""
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((60, 40)).save(path)
    return str(path)
