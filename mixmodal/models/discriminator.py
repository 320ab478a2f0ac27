"""PatchGAN: a convolutional network that judges overlapping patches of a picture (arXiv 1611.07004, section 3.2.2).

The layers are those of pix2pix and of taming-transformers' `NLayerDiscriminator`; 4x4 convolutions, LeakyReLU. Norms
are GroupNorms where those have batch norms, with which the round of the discriminator, whose batch holds real and
reconstructed pictures, and that of the generator, whose batch holds the latter only, would judge a picture differently.

Shapes: B batch, C channels, H W pixels, h w patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

MAX_MULTIPLIER = 8
INIT_STD = 0.02
SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A PatchGAN; with pix2pix's defaults the convolutions of a judgement see 70x70 pixels.

    The statistics of the norms span the whole picture, and so a judgement does depend on what lies further away.

    Args:
        channels: of the first layer; each further one has twice as many, up to eight times.
        num_layers: convolutions of stride 2.
        norm_groups: groups of each GroupNorm; the layers between the first and the last have one.
    """

    channels: int = 64
    num_layers: int = 3
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"discriminator.{name} is {getattr(self, name)}; it must be at least 1")
        if 2 * self.channels % self.norm_groups:
            raise ValueError(
                f"discriminator.norm_groups is {self.norm_groups}; it must divide {2 * self.channels}, "
                "twice discriminator.channels"
            )

    @property
    def min_image_size(self) -> int:
        """Pixels a side below which no patch is left: two convolutions of stride 1 take a position each."""
        return 3 * 2**self.num_layers


def check_discriminator(config: DiscriminatorConfig, image_size: int) -> None:
    """Complain where pictures of `image_size` pixels a side leave no patch.

    Raises:
        ValueError: naming the key.
    """
    if image_size < config.min_image_size:
        raise ValueError(
            f"discriminator.num_layers is {config.num_layers}, which needs pictures of {config.min_image_size} pixels "
            f"a side, and these have {image_size}; lower num_layers"
        )


class PatchDiscriminator(nn.Module):
    """Pictures `(B, 3, H, W)` in [-1, 1] to a logit for each patch, `(B, 1, h, w)`; high is real.

    h is `H // 2**num_layers - 2`, w alike.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**layer, MAX_MULTIPLIER) for layer in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number, (narrow, wide) in enumerate(pairwise(widths), start=1):
            stride = 2 if number < config.num_layers else 1
            layers += [nn.Conv2d(narrow, wide, 4, stride=stride, padding=1), nn.GroupNorm(config.norm_groups, wide)]
            layers.append(nn.LeakyReLU(SLOPE))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the patches, in the precision of weights or autocast.

        Raises:
            ValueError: where the pictures are too small.
        """
        check_discriminator(self.config, min(images.shape[-2:]))
        return self.layers(images.contiguous(memory_format=torch.channels_last))


def init_weights(module: nn.Module) -> None:
    """Convolutions from N(0, 0.02) without biases, norms with weights from N(1, 0.02), as pix2pix starts."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INIT_STD)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
