"""A denoiser of pictures that is told a class or a text: a U-Net of diffusers and, for texts, a small encoder of them.

Pictures are pixels in [-1, 1]. Which noise is at which time is said by a scheduler of diffusers (arXiv 2006.11239,
section 2; squared cosine: arXiv 2102.09672, section 3.2).

Shape suffixes: B batch, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixmodal.extras import import_extra

NoiseSchedule = Literal["linear", "squaredcos_cap_v2"]
Prediction = Literal["epsilon", "v_prediction"]

PADDING, BEGIN = 0, 1
"""Tokens of texts beside pieces: what fills a row up and is not seen, and what each text begins with."""
NUM_SPECIAL = 2


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The transformer that makes features of a text; it is trained with the denoiser, and sees all of the text.

    Args:
        dim: width, and length of the features.
        num_layers: blocks; 0 leaves embeddings of pieces and places.
        num_heads: of attention; they divide the width.
        ffn_dim: width of the feed-forward layers.
        max_text_tokens: longest text in tokens, its begin among them; longer ones are cut.
    """

    dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    ffn_dim: int = 384
    max_text_tokens: int = 32

    def __post_init__(self) -> None:
        least = {"dim": 1, "num_layers": 0, "num_heads": 1, "ffn_dim": 1, "max_text_tokens": 2}
        problems = [
            f"model.text.{name} is {getattr(self, name)}; it must be at least {limit}"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        if not problems and self.dim % self.num_heads:
            problems.append(
                f"model.text.dim is {self.dim}, which is not a multiple of model.text.num_heads {self.num_heads}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """A denoiser.

    Args:
        image_size: side of the pictures in pixels.
        block_channels: channels of each level of the U-Net; every level but the first halves the side.
        layers_per_block: residual blocks of a level on the way down; there is one more on the way up.
        attention_levels: levels that attend, counted from 0, the one of full size; the middle always does.
        head_dim: channels of an attention head.
        norm_groups: of group norms.
        dropout: in residual blocks, 0 .. 1.
        text: the encoder of texts, where texts are the condition.
        num_timesteps: times of the noise schedule.
        schedule: of the noise; `linear` goes from 1e-4 to 0.02.
        prediction: what the U-Net says: the noise, or the velocity `a noise - s picture` (arXiv 2202.00512, section 4).
    """

    image_size: int = 32
    block_channels: tuple[int, ...] = (64, 128, 128)
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] = (1, 2)
    head_dim: int = 32
    norm_groups: int = 8
    dropout: float = 0.0
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    num_timesteps: int = 1000
    schedule: NoiseSchedule = "squaredcos_cap_v2"
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name in ("image_size", "layers_per_block", "head_dim", "norm_groups"):
            if getattr(self, name) < 1:
                yield f"model.{name} is {getattr(self, name)}; it must be at least 1"
        if self.num_timesteps < 2:
            yield f"model.num_timesteps is {self.num_timesteps}; it must be at least 2"
        if not 0 <= self.dropout < 1:
            yield f"model.dropout is {self.dropout}; it must lie in [0, 1)"
        num_levels = len(self.block_channels)
        if not num_levels:
            yield "model.block_channels is empty; give the channels of each level"
            return
        halvings = 2 ** (num_levels - 1)
        if self.image_size % halvings:
            yield (
                f"model.image_size is {self.image_size}, which can not be halved {num_levels - 1} times, as the "
                f"{num_levels} levels of model.block_channels ask; make it a multiple of {halvings}"
            )
        wrong = [level for level in self.attention_levels if not 0 <= level < num_levels]
        if wrong:
            yield f"model.attention_levels has {wrong[0]}; the levels are 0 .. {num_levels - 1}"
        for channels in self.block_channels:
            for name in ("head_dim", "norm_groups"):
                unit = getattr(self, name)
                if unit > 0 and (channels < 1 or channels % unit):
                    yield f"model.block_channels has {channels}, which is not a multiple of model.{name} {unit}"


class TextEncoder(nn.Module):
    """Embeddings of tokens and places, and a transformer over them.

    Args:
        config: how large.
        num_pieces: of the tokenizer, whose piece p is the token `p + NUM_SPECIAL`.
    """

    def __init__(self, config: TextEncoderConfig, num_pieces: int) -> None:
        super().__init__()
        self.config, self.num_pieces = config, num_pieces
        self.embedding = nn.Embedding(num_pieces + NUM_SPECIAL, config.dim)
        self.places = nn.Embedding(config.max_text_tokens, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        layer = {"dim_feedforward": config.ffn_dim, "dropout": 0.0, "activation": "gelu", "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(config.dim, config.num_heads, batch_first=True, **layer)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Features `(B, T, D)` of ids `(B, T)`; those of padding mean nothing."""
        hidden_BTD = self.embedding(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, src_key_padding_mask=tokens_BT == PADDING)
        return self.norm(hidden_BTD)


class Denoiser(nn.Module):
    """A U-Net with what makes its inputs of conditions, as training calls it. Weights come from the global generator.

    A condition is a class `(B,)`, where `num_classes` stands for none, or the tokens `(B, T)` of a text, where the
    empty text stands for none: `BEGIN` and padding.

    Args:
        config: how large.
        num_classes: to be told; 0 where texts are.
        num_pieces: of the text tokenizer; 0 where classes are the condition.

    Raises:
        ValueError: where diffusers is not installed.
    """

    def __init__(self, config: DenoiserConfig, *, num_classes: int = 0, num_pieces: int = 0) -> None:
        super().__init__()
        assert bool(num_classes) != bool(num_pieces)
        self.config = config
        self.text_encoder = TextEncoder(config.text, num_pieces) if num_pieces else None
        self.unet: Any = build_unet(config, num_classes)

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """What the scheduler's `prediction_type` names, float32 `(B, 3, H, W)`.

        Args:
            noisy: float `(B, 3, H, W)`.
            timesteps: int64 `(B,)`, 0 .. num_timesteps - 1.
            conditions: int64 `(B,)` or `(B, T)`.
        """
        found = self.unet(noisy.to(self.unet.dtype), timesteps, **condition_inputs(conditions, self.text_encoder))
        return found.sample.float()

    @property
    def blocks(self) -> list[nn.Module]:
        """Levels of the U-Net, with the middle."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]


def condition_inputs(conditions: Tensor, text_encoder: TextEncoder | None) -> dict[str, Tensor]:
    """What a U-Net is called with beside pictures and times: classes `(B,)`, or features of tokens `(B, T)`."""
    if text_encoder is None:
        return {"class_labels": conditions}
    return {
        "encoder_hidden_states": text_encoder(conditions),
        "encoder_attention_mask": conditions != PADDING,
    }


def empty_like(conditions: Tensor, num_classes: int) -> Tensor:
    """Conditions of the same shape, `(B,)` or `(B, T)`, that tell nothing; `num_classes` is 0 where texts are told."""
    if num_classes:
        return torch.full_like(conditions, num_classes)
    empty = torch.full_like(conditions, PADDING)
    empty[:, 0] = BEGIN
    return empty


def pad_tokens(texts: Sequence[Sequence[int]], max_text_tokens: int) -> Tensor:
    """Pieces of texts as tokens, int64 `(B, T)`: begun, cut and padded to `max_text_tokens`."""
    tokens = torch.full((len(texts), max_text_tokens), PADDING, dtype=torch.int64)
    tokens[:, 0] = BEGIN
    for row, pieces in zip(tokens, texts):
        kept = torch.tensor(pieces[: max_text_tokens - 1], dtype=torch.int64)
        row[1 : 1 + len(kept)] = kept + NUM_SPECIAL
    return tokens


def import_diffusers() -> Any:
    """
    Raises:
        ValueError: where diffusers is not installed.
    """
    return import_extra("diffusers", "diffusion", "denoisers need")


def build_unet(config: DenoiserConfig, num_classes: int) -> nn.Module:
    """A fresh `UNet2DModel` for classes, one more for none, or a `UNet2DConditionModel` for texts.

    Raises:
        ValueError: where diffusers is not installed.
    """
    diffusers = import_diffusers()
    attends = [level in config.attention_levels for level in range(len(config.block_channels))]
    attention = "Attn" if num_classes else "CrossAttn"
    settings = {
        "sample_size": config.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": config.block_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "down_block_types": tuple(f"{attention if one else ''}DownBlock2D" for one in attends),
        "up_block_types": tuple(f"{attention if one else ''}UpBlock2D" for one in reversed(attends)),
    }
    if num_classes:
        return diffusers.UNet2DModel(**settings, attention_head_dim=config.head_dim, num_class_embeds=num_classes + 1)
    # what diffusers calls the size of heads here is their number
    heads = tuple(channels // config.head_dim for channels in config.block_channels)
    return diffusers.UNet2DConditionModel(**settings, attention_head_dim=heads, cross_attention_dim=config.text.dim)


def build_scheduler(config: DenoiserConfig) -> Any:
    """The `DDPMScheduler` of a denoiser; pictures lie in [-1, 1], to which sampling clips.

    Raises:
        ValueError: where diffusers is not installed.
    """
    return import_diffusers().DDPMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_schedule=config.schedule,
        prediction_type=config.prediction,
    )
