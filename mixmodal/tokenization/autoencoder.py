"""The convolutional encoder and decoder of an image tokenizer, in VQGAN's terms (arXiv 2012.09841).

Shapes: B batch, C channels, H W pixels, h w code grid. Stage 0 is the finest, the last stage has the code grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.models import winograd

Block = Literal["res", "attention", "transformer"]
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Widths and depths; the defaults are VQGAN's f16.

    Args:
        channels: width that the multipliers multiply.
        decoder_channels: the same for the decoder; 0 is `channels`.
        channel_multipliers: width of each stage; each stage after the first halves height and width.
        num_res_blocks: ResBlocks of each encoder stage; one number is for all stages.
        num_decoder_res_blocks: the same for the decoder, finest stage first; VQGAN has one more than in the encoder.
        patch_size: pixels; a stem that folds patches into channels, for cheap small models; 1 is none.
        resample: between stages, strided and nearest-neighbour convolutions (`conv`, VQGAN) or folding 2x2 pixels into
            channels (`pixel_shuffle`).
        mid_blocks: blocks on the code grid, between the stages and the latents of both halves.
        attention_stages: stages with an attention block behind each ResBlock.
        latent_channels: channels between the convolutions and VQGAN's 1x1 convolutions around the quantizer; 0 leaves
            the 1x1 convolutions out.
        head_dim: of the heads of `transformer` blocks; `attention` blocks have one head.
        norm_groups: groups of each GroupNorm.
        norm_eps: added to variances.
    """

    channels: int = 128
    decoder_channels: int = 0
    channel_multipliers: tuple[float, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 2
    num_decoder_res_blocks: int | tuple[int, ...] = 3
    patch_size: int = 1
    resample: Literal["conv", "pixel_shuffle"] = "conv"
    mid_blocks: tuple[Block, ...] = ("res", "attention", "res")
    attention_stages: tuple[int, ...] = ()
    latent_channels: int = 0
    head_dim: int = 32
    norm_groups: int = 32
    norm_eps: float = 1e-6

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


def depths(num_blocks: int | tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """ResBlocks of each stage."""
    return (num_blocks,) * num_stages if isinstance(num_blocks, int) else tuple(num_blocks)


def check_autoencoder(config: AutoencoderConfig, image_size: int, key: str = "autoencoder") -> None:
    """Complain about values that can not work.

    Raises:
        ValueError: naming the key.
    """
    num_stages = len(config.channel_multipliers)
    if not num_stages:
        raise ValueError(f"{key}.channel_multipliers is empty; give one for each stage")
    if config.resample not in ("conv", "pixel_shuffle"):
        raise ValueError(f"{key}.resample is {config.resample!r}; choose conv or pixel_shuffle")
    for block in config.mid_blocks:
        if block not in ("res", "attention", "transformer"):
            raise ValueError(f"{key}.mid_blocks names {block!r}; choose res, attention or transformer")
    if config.patch_size < 1 or image_size < 1 or image_size % config.downsampling:
        raise ValueError(
            f"image_size {image_size} is no multiple of {config.downsampling}, the pixels of a code "
            f"({key}.patch_size {config.patch_size}, {num_stages} stages of {key}.channel_multipliers)"
        )
    for name in ("channels", "head_dim", "norm_groups"):
        if getattr(config, name) < 1:
            raise ValueError(f"{key}.{name} is {getattr(config, name)}; it must be at least 1")
    if config.norm_eps <= 0:
        raise ValueError(f"{key}.norm_eps is {config.norm_eps}; it must be above 0")
    for name in ("num_res_blocks", "num_decoder_res_blocks"):
        value = depths(getattr(config, name), num_stages)
        if len(value) != num_stages or min(value) < 0:
            raise ValueError(f"{key}.{name} is {value}; give one number or one for each of the {num_stages} stages")
        for stage, depth in enumerate(value):
            multipliers = (1, *config.channel_multipliers, config.channel_multipliers[-1])
            before = multipliers[stage] if name == "num_res_blocks" else multipliers[stage + 2]
            if not depth and config.resample == "conv" and before != multipliers[stage + 1]:
                raise ValueError(f"{key}.{name}: stage {stage} changes the width, so it needs a ResBlock")
    for name in ("channels", "decoder_channels"):
        widths = [(getattr(config, name) or config.channels) * multiplier for multiplier in config.channel_multipliers]
        for width in widths:
            if width != int(width) or width < 1 or width % config.norm_groups:
                raise ValueError(f"{key}.{name}: a stage {width:g} wide is no multiple of {key}.norm_groups")
        if "transformer" in config.mid_blocks and widths[-1] % config.head_dim:
            raise ValueError(f"{key}.{name}: the last stage, {widths[-1]:g} wide, is no multiple of {key}.head_dim")
    for stage in config.attention_stages:
        if stage not in range(num_stages):
            raise ValueError(f"{key}.attention_stages names stage {stage}; there are 0 .. {num_stages - 1}")
    if config.latent_channels < 0:
        raise ValueError(f"{key}.latent_channels is {config.latent_channels}; 0 leaves the 1x1 convolutions out")


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the sum starts as the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, config)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_silu_conv(self.norm1, self.conv1, x)
        y = norm_silu_conv(self.norm2, self.conv2, y, inplace=True)
        x = self.shortcut(x)
        return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else y.add_(x)


class AttentionBlock(nn.Module):
    """VQGAN's: one head over all positions, without position embeddings."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, hw, C)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.out(y)


class TransformerBlock(nn.Module):
    """Attention with heads and learned positions, then a feed-forward layer (ViT-VQGAN, arXiv 2110.04627)."""

    def __init__(self, channels: int, grid: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.num_heads = channels // config.head_dim
        self.positions = nn.Parameter(0.02 * torch.randn(grid * grid, channels))
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.norm2 = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = zeroed(nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        qkv = self.qkv(self.norm1(tokens + self.positions))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, N, hw, H)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(y)
        tokens = tokens + self.down(F.gelu(self.up(self.norm2(tokens))))
        return tokens.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halves height and width as VQGAN does: a strided convolution, padded right and below.

    Padding by 2 all around and leaving out the first line and column gives the same and spares a padded copy.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.conv(x)[:, :, 1:, 1:])


class Upsample(nn.Module):
    """Doubles height and width as VQGAN does: nearest neighbour, then a convolution.

    Each of the four pixels that share a source sees 2x2 sources only, so one transposed convolution with the summed
    weights gives the same with 4/9 of the multiplications. CPUs compute it where no gradient is asked for.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        if torch.is_grad_enabled() or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # which of the 3 weights meet where output 2i + t - 1 takes from source i
        sums = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ta,sb,oiab->iots", sums, sums, weight)
        return F.conv_transpose2d(x, kernel.contiguous(), self.conv.bias, stride=2, padding=1)


class Encoder(nn.Module):
    """Pictures `(B, 3, H, W)` to latents `(B, latent_dim, h, w)`."""

    def __init__(self, config: AutoencoderConfig, image_size: int, latent_dim: int) -> None:
        super().__init__()
        widths = [int(config.channels * multiplier) for multiplier in config.channel_multipliers]
        width = widths[0] if config.resample == "pixel_shuffle" else config.channels
        self.patches = nn.PixelUnshuffle(config.patch_size)
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, width, 3, padding=1)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths(config.num_res_blocks, len(widths))):
            blocks, width = stage_blocks(width, widths[stage], depth, stage, config)
            if stage + 1 < len(widths) and config.resample == "conv":
                blocks.append(Downsample(width))
            elif stage + 1 < len(widths):
                blocks += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width, widths[stage + 1], 1)]
                width = widths[stage + 1]
            self.stages.append(nn.Sequential(*blocks))
        self.mid = mid_blocks(width, image_size // config.downsampling, config)
        self.norm_out = group_norm(width, config)
        self.conv_out = nn.Conv2d(width, config.latent_channels or latent_dim, 3, padding=1)
        self.to_latents = nn.Conv2d(config.latent_channels, latent_dim, 1) if config.latent_channels else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(channels_last(self.patches(images)))
        for stage in self.stages:
            x = stage(x)
        x = self.conv_out(silu(self.norm_out(self.mid(x))))
        return self.to_latents(x)


class Decoder(nn.Module):
    """Latents `(B, latent_dim, h, w)` to pictures `(B, 3, H, W)`; the mirror of the encoder."""

    def __init__(self, config: AutoencoderConfig, image_size: int, latent_dim: int) -> None:
        super().__init__()
        channels = config.decoder_channels or config.channels
        widths = [int(channels * multiplier) for multiplier in config.channel_multipliers]
        width, in_channels = widths[-1], config.latent_channels or latent_dim
        self.from_latents = nn.Conv2d(latent_dim, in_channels, 1) if config.latent_channels else nn.Identity()
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = mid_blocks(width, image_size // config.downsampling, config)
        self.stages = nn.ModuleList()  # coarsest first
        for stage, depth in reversed([*enumerate(depths(config.num_decoder_res_blocks, len(widths)))]):
            blocks, width = stage_blocks(width, widths[stage], depth, stage, config)
            if stage and config.resample == "conv":
                blocks.append(Upsample(width))
            elif stage:
                blocks += [nn.Conv2d(width, 4 * widths[stage - 1], 1), nn.PixelShuffle(2)]
                width = widths[stage - 1]
            self.stages.append(nn.Sequential(*blocks))
        self.norm_out = group_norm(width, config)
        self.conv_out = nn.Conv2d(width, 3 * config.patch_size**2, 3, padding=1)
        self.patches = nn.PixelShuffle(config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(channels_last(self.from_latents(latents))))
        for stage in self.stages:
            x = stage(x)
        return self.patches(self.conv_out(silu(self.norm_out(x))))


def stage_blocks(
    width: int, out_width: int, depth: int, stage: int, config: AutoencoderConfig
) -> tuple[list[nn.Module], int]:
    """The blocks of one stage and the width behind them."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        blocks.append(ResBlock(width, out_width, config))
        width = out_width
        if stage in config.attention_stages:
            blocks.append(AttentionBlock(width, config))
    return blocks, width


def mid_blocks(width: int, grid: int, config: AutoencoderConfig) -> nn.Sequential:
    """The blocks on the code grid, `grid` codes a side."""
    blocks: list[nn.Module] = []
    for kind in config.mid_blocks:
        if kind == "res":
            blocks.append(ResBlock(width, width, config))
        elif kind == "attention":
            blocks.append(AttentionBlock(width, config))
        else:
            blocks.append(TransformerBlock(width, grid, config))
    return nn.Sequential(*blocks)


def group_norm(channels: int, config: AutoencoderConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, inplace: bool = False) -> Tensor:
    """Half of a ResBlock; CPUs compute wide ones with fewer products, without gradients, and may do so in place."""
    if winograd.pays(x, conv.weight):
        return winograd.norm_silu_conv(x, norm, conv, inplace)
    return conv(silu(norm(x)))


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds; in its place where no gradient is asked for."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def zeroed(layer: Layer) -> Layer:
    """The last layer of a residual branch starts at zero: every block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def channels_last(x: Tensor) -> Tensor:
    """The memory order in which CPUs and tensor cores convolve fastest."""
    return x.contiguous(memory_format=torch.channels_last)
