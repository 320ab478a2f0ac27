"""Two towers, one for texts and one for pictures, whose features of length 1 are compared: CLIP or SigLIP.

The towers are those of transformers; here is the small config that they are built from, and what training needs.

Shape suffixes: B batch, T tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.extras import import_extra

EncoderKind = Literal["clip", "siglip"]

FIRST_TEMPERATURE = {"clip": 0.07, "siglip": 0.1}
"""Where training begins (arXiv 2103.00020, section 2.5; arXiv 2303.15343, section 3.2)."""
MAX_SCALE = {"clip": 100.0, "siglip": None}
"""The most that cosines are multiplied by (arXiv 2103.00020, section 2.5); SigLIP bounds it not."""
FIRST_BIAS = -10.0
"""Of SigLIP's logits at the start: nearly all pairs do not match (arXiv 2303.15343, section 3.2)."""
NUM_SPECIAL = {"clip": 2, "siglip": 1}
"""Tokens that the text tower knows beside pieces of text: begin and end, or end alone, which is the padding too."""
NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A transformer encoder.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: of attention; they divide the width.
        ffn_dim: width of the feed-forward layers.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 512


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """A two-tower encoder.

    Args:
        kind: `clip`: trained by InfoNCE, the text tower sees what stands before a token, its feature is that of the end
            token; `siglip`: trained by the pairwise sigmoid loss, the text tower sees all tokens, padding among them.
        image_size: side of the pictures in pixels.
        patch_size: side of the patches in pixels that the image tower sees as tokens; it divides the image size.
        image: the image tower.
        text: the text tower.
        vocab_size: the most tokens of the text tower, of which 256 are bytes; few captions give fewer.
        max_text_tokens: longest text in tokens, begin and end among them; longer ones are cut.
        projection_dim: length of the features; null is the width of the image tower, which it always is for `siglip`.
    """

    kind: EncoderKind = "clip"
    image_size: int = 32
    patch_size: int = 4
    image: TowerConfig = field(default_factory=TowerConfig)
    text: TowerConfig = field(default_factory=TowerConfig)
    vocab_size: int = 2048
    max_text_tokens: int = 32
    projection_dim: int | None = None

    def __post_init__(self) -> None:
        problems = [problem for name in ("image", "text") for problem in tower_problems(getattr(self, name), name)]
        for name, least in (("image_size", 1), ("patch_size", 1), ("max_text_tokens", 3)):
            if getattr(self, name) < least:
                problems.append(f"model.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.patch_size > 0 and self.image_size % self.patch_size:
            problems.append(
                f"model.image_size is {self.image_size}, which is not a multiple of model.patch_size {self.patch_size}"
            )
        least = NUM_BYTES + NUM_SPECIAL[self.kind]
        if self.vocab_size < least:
            problems.append(
                f"model.vocab_size is {self.vocab_size}; it must be at least {least}: {NUM_BYTES} bytes and "
                f"{NUM_SPECIAL[self.kind]} tokens of {self.kind}"
            )
        if self.projection_dim is not None and self.projection_dim < 1:
            problems.append(f"model.projection_dim is {self.projection_dim}; it must be at least 1")
        if self.kind == "siglip" and self.projection_dim not in (None, self.image.dim):
            problems.append(
                f"model.projection_dim can not act where model.kind is siglip, whose features have the width of the "
                f"image tower, {self.image.dim}; leave it out"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def feature_dim(self) -> int:
        return self.projection_dim or self.image.dim

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def tower_problems(tower: TowerConfig, name: str) -> Iterator[str]:
    for key in ("dim", "num_layers", "num_heads", "ffn_dim"):
        if getattr(tower, key) < 1:
            yield f"model.{name}.{key} is {getattr(tower, key)}; it must be at least 1"
    if tower.num_heads > 0 and tower.dim % tower.num_heads:
        yield f"model.{name}.dim is {tower.dim}, which is not a multiple of model.{name}.num_heads {tower.num_heads}"


class TextIds(NamedTuple):
    """What the text tower has to know of its tokenizer: number of tokens, and ids of begin (-1: none) and end."""

    vocab_size: int
    begin: int
    end: int


class Features(NamedTuple):
    """Features of length 1 of a batch of pairs, float32, and how they are compared.

    Args:
        text_BD: of the texts.
        image_BD: of the pictures.
        log_scale: scalar, logarithm of the inverse temperature, not clamped.
        bias: scalar, added to all logits; 0 where there is none.
    """

    text_BD: Tensor
    image_BD: Tensor
    log_scale: Tensor
    bias: Tensor


class TwoTower(nn.Module):
    """A `CLIPModel` or `SiglipModel` as training calls it.

    Args:
        config: which, and how large.
        ids: of the tokenizer that its texts are spelled with.
    """

    def __init__(self, config: TwoTowerConfig, ids: TextIds) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = build_encoder(config, ids)

    def forward(self, tokens_BT: Tensor, images: Tensor) -> Features:
        """
        Args:
            tokens_BT: ids, padded to `max_text_tokens`.
            images: `(B, 3, H, W)` in [-1, 1].
        """
        log_scale = self.encoder.logit_scale.float().sum()  # of one element; a view would be tied to the weight
        bias = self.encoder.logit_bias.float().sum() if self.config.kind == "siglip" else log_scale.new_zeros(())
        return Features(self.encode_text(tokens_BT), self.encode_image(images), log_scale, bias)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Features `(B, D)` of length 1, float32."""
        return F.normalize(self.encoder.get_text_features(input_ids=tokens_BT).pooler_output.float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features `(B, D)` of length 1, float32, of images `(B, 3, H, W)` in [-1, 1]."""
        return F.normalize(self.encoder.get_image_features(pixel_values=images).pooler_output.float(), dim=-1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both towers."""
        return [*self.encoder.text_model.encoder.layers, *self.encoder.vision_model.encoder.layers]


def import_transformers() -> Any:
    """
    Raises:
        ValueError: where transformers is not installed.
    """
    return import_extra("transformers", "retrieval", "encoders need")


def build_encoder(config: TwoTowerConfig, ids: TextIds) -> nn.Module:
    """A fresh `CLIPModel` or `SiglipModel`; weights come from the global generator.

    Raises:
        ValueError: where transformers is not installed.
    """
    transformers = import_transformers()
    text = {
        **tower_settings(config.text),
        "vocab_size": ids.vocab_size,
        "max_position_embeddings": config.max_text_tokens,
        "bos_token_id": ids.begin if ids.begin >= 0 else None,
        "eos_token_id": ids.end,
        "pad_token_id": ids.end,
    }
    image = {**tower_settings(config.image), "image_size": config.image_size, "patch_size": config.patch_size}
    first = math.log(1 / FIRST_TEMPERATURE[config.kind])
    if config.kind == "clip":
        dim = config.feature_dim
        settings = transformers.CLIPConfig(
            text_config={**text, "projection_dim": dim},
            vision_config={**image, "projection_dim": dim},
            projection_dim=dim,
            logit_scale_init_value=first,
        )
        model = transformers.CLIPModel(settings)
        # DeepSpeed sends no scalar to other ranks
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
        return model
    settings = transformers.SiglipConfig(
        text_config={**text, "projection_size": config.feature_dim}, vision_config=image
    )
    model = transformers.SiglipModel(settings)
    with torch.no_grad():
        model.logit_scale.fill_(first)
        model.logit_bias.fill_(FIRST_BIAS)
    return model


def tower_settings(tower: TowerConfig) -> dict[str, Any]:
    """In the words of transformers."""
    return {
        "hidden_size": tower.dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.ffn_dim,
    }
