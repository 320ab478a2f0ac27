"""Two-tower encoders from a small config: what transformers makes of it, and what can not be."""

import math
import sys
from typing import Any

import pytest
import torch

from mixmodal.models.two_tower import TextIds, TowerConfig, TwoTower, TwoTowerConfig
from mixmodal.objectives.contrastive import gather_pairs, infonce_loss, sigmoid_loss

TOWER = TowerConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=24)
IDS = {"clip": TextIds(300, 0, 1), "siglip": TextIds(300, -1, 0)}


def build(kind: Any, **options: Any) -> TwoTower:
    torch.manual_seed(0)
    config = TwoTowerConfig(
        kind=kind, image_size=8, patch_size=4, image=TOWER, text=TOWER, max_text_tokens=6, **options
    )
    return TwoTower(config, IDS[kind]).eval()


def inputs(kind: Any, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    begin, end = IDS[kind][1:]
    tokens = torch.randint(5, 300, (count, 6), generator=generator)
    tokens[:, 4:] = end
    if begin >= 0:
        tokens[:, 0] = begin
    return tokens, torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_give_the_logits_and_the_loss_of_transformers(kind: str) -> None:
    model, (tokens, images) = build(kind), inputs(kind)
    with torch.no_grad():
        found = model(tokens, images)
        assert not any(value.requires_grad for value in found)
        expected = model.encoder(input_ids=tokens, pixel_values=images, return_loss=True)
    scale = found.log_scale.exp()
    logits = scale * found.text_BD @ found.image_BD.T + found.bias
    torch.testing.assert_close(logits, expected.logits_per_text, rtol=0, atol=1e-5)  # worst seen: 1.4e-6
    pairs = gather_pairs(found.text_BD, found.image_BD)
    total = infonce_loss(pairs, scale) if kind == "clip" else sigmoid_loss(pairs, scale, found.bias)
    assert float(total) / 5 == pytest.approx(float(expected.loss), rel=1e-6)  # worst seen: 4e-8


def test_training_begins_where_the_papers_begin() -> None:
    clip, siglip = build("clip").encoder, build("siglip").encoder
    assert float(clip.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    assert float(siglip.logit_scale.detach()) == pytest.approx(math.log(10))
    assert float(siglip.logit_bias.detach()) == -10


def test_clip_takes_the_feature_of_the_first_end_token() -> None:
    model, (tokens, _) = build("clip"), inputs("clip")
    with torch.no_grad():
        before = model.encode_text(tokens)
        changed = tokens.clone()
        changed[:, 5] = 17  # behind the end
        assert torch.equal(model.encode_text(changed), before)
        changed[:, 3] = 17
        assert (model.encode_text(changed) - before).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "dim"), [("clip", {}, 16), ("clip", {"projection_dim": 10}, 10), ("siglip", {}, 16)]
)
def test_features_have_the_length_that_the_config_says(kind: str, options: dict[str, int], dim: int) -> None:
    model = build(kind, **options)
    found = model(*inputs(kind))
    assert model.config.feature_dim == dim
    for features in (found.text_BD, found.image_BD):
        assert features.shape == (5, dim)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 30, "patch_size": 4},
            r"model\.image_size is 30, which is not a multiple of model\.patch_size 4",
        ),
        ({"vocab_size": 257}, r"model\.vocab_size is 257; it must be at least 258"),
        ({"kind": "siglip", "vocab_size": 256}, r"model\.vocab_size is 256; it must be at least 257"),
        ({"kind": "siglip", "projection_dim": 64}, r"model\.projection_dim can not act where model\.kind is siglip"),
        ({"projection_dim": 0}, r"model\.projection_dim is 0"),
        ({"patch_size": 0}, r"model\.patch_size is 0"),
        ({"max_text_tokens": 2}, r"model\.max_text_tokens is 2"),
        (
            {"text": TowerConfig(dim=30, num_heads=4)},
            r"model\.text\.dim is 30, which is not a multiple of .*num_heads 4",
        ),
        ({"image": TowerConfig(num_layers=0)}, r"model\.image\.num_layers is 0"),
    ],
)
def test_config_errors_name_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoTowerConfig(**options)


def test_without_transformers_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"encoders need transformers: pip install 'mixmodal\[retrieval\]'"):
        build("clip")
