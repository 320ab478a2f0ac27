"""The exported folder of an encoder: plain transformers, with the same features and the same pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mixmodal.interop.two_tower import PREPROCESS, build_processor, save_two_tower
from mixmodal.models.two_tower import TowerConfig, TwoTower, TwoTowerConfig
from mixmodal.tokenization.captions import (
    build_caption_tokenizer,
    encode_captions,
    text_ids,
    train_caption_tokenizer,
)
from mixmodal.tokenization.preprocessing import open_picture, resize_and_crop, to_tensor

TOWER = TowerConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=24)
TEXTS = ["a red circle", "a blue square above a red cross", "b"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def trained(request: pytest.FixtureRequest):
    config = TwoTowerConfig(
        kind=request.param, image_size=16, patch_size=4, image=TOWER, text=TOWER, vocab_size=280, max_text_tokens=12
    )
    contents = train_caption_tokenizer(TEXTS * 3, config.kind, config.vocab_size)
    tokenizer = build_caption_tokenizer(contents, config.kind, config.max_text_tokens)
    torch.manual_seed(0)
    return TwoTower(config, text_ids(tokenizer)).eval(), tokenizer


def noise(mode: str, width: int, height: int) -> Image.Image:
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "LA": (2,)}[mode]
    values = np.random.default_rng(width).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode=None)


def test_transformers_loads_the_folder_and_finds_the_same_features(trained, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    model, tokenizer = trained
    save_two_tower(model, tokenizer, tmp_path, "# card\n")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "README.md",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    options = {"local_files_only": True, "trust_remote_code": False}
    loaded = AutoModel.from_pretrained(tmp_path, use_safetensors=True, **options).eval()
    assert type(loaded) is type(model.encoder)
    processor = AutoProcessor.from_pretrained(tmp_path, **options)
    pictures = [noise("RGB", width, 20) for width in (20, 31, 47)]
    padding = True if model.config.kind == "clip" else "max_length"
    expected_shapes = {name: value.shape for name, value in type(loaded)(loaded.config).state_dict().items()}
    saved = {name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert saved == expected_shapes
    inputs = processor(text=TEXTS, images=pictures, padding=padding, truncation=True, return_tensors="pt")
    images = torch.stack([to_tensor(resize_and_crop(picture, 16, PREPROCESS)) for picture in pictures])
    with torch.no_grad():
        found = loaded(**inputs)
        expected = model(encode_captions(tokenizer, TEXTS, model.config), images)
    torch.testing.assert_close(found.text_embeds, expected.text_BD, rtol=0, atol=1e-6)  # worst seen: 0
    torch.testing.assert_close(found.image_embeds, expected.image_BD, rtol=0, atol=1e-6)  # worst seen: 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (31, 20), (20, 47), (9, 13), (100, 30)])
def test_the_image_processor_does_what_training_did(trained, mode: str, size: tuple[int, int]) -> None:
    processor = build_processor(trained[0].config, trained[1])
    picture = noise(mode, *size)
    found = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    expected = to_tensor(resize_and_crop(open_picture(picture, "picture"), 16, PREPROCESS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # worst seen: 0


def test_an_exported_temperature_lies_within_its_bound(trained, tmp_path: Path) -> None:
    model, tokenizer = trained
    with torch.no_grad():
        before = model.encoder.logit_scale.clone()
        model.encoder.logit_scale.fill_(9.0)
    save_two_tower(model, tokenizer, tmp_path, "", max_scale=100.0)
    with torch.no_grad():
        model.encoder.logit_scale.copy_(before)
    assert float(load_file(tmp_path / "model.safetensors")["logit_scale"]) == pytest.approx(math.log(100))


def test_the_folder_says_nothing_of_us_and_holds_no_code(trained, tmp_path: Path) -> None:
    save_two_tower(*trained, tmp_path, "")
    for path in tmp_path.glob("*.json"):
        content = path.read_text()
        assert "mixmodal" not in content
        assert "auto_map" not in json.loads(content)


def test_writing_a_folder_shows_no_bar(trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

    enable_progress_bar()
    save_two_tower(*trained, tmp_path, "")
    assert capfd.readouterr() == ("", "")
    assert is_progress_bar_enabled()  # as before
