"""GroupNorm, SiLU and a wide 3x3 convolution in one pass over a picture, with fewer products than direct convolution.

Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308) in the vertical direction alone, F(6, 3): six lines of
outputs take 8 horizontal convolutions of three weights instead of 18. Taken in both directions it would save more
products, but the transforms, which are passes over memory, would take what is saved. In float32 the results differ
from those of a direct convolution by about 1e-5 of their size. Shapes: B batch, C and O channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE, WINDOW = 6, 8
"""Lines of outputs of a tile, and of the inputs that they depend on."""
MIN_CHANNELS = 128
CHUNK_BYTES = 2**23
"""Of the transformed inputs that are made at a time, so that they stay in the cache."""
PARTS = 16
"""Of the pixels, whose moments are taken apart."""

# By the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
INPUT = torch.tensor(
    [
        [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
        [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
        [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
        [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
        [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
        [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
        [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
        [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
    ],
    dtype=torch.float32,
)
KERNEL = torch.tensor(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ],
    dtype=torch.float32,
)
OUTPUT = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 1 / 2, -1 / 2, 0],
        [0, 1, 1, 4, 4, 1 / 4, 1 / 4, 0],
        [0, 1, -1, 8, -8, 1 / 8, -1 / 8, 0],
        [0, 1, 1, 16, 16, 1 / 16, 1 / 16, 0],
        [0, 1, -1, 32, -32, 1 / 32, -1 / 32, 1],
    ],
    dtype=torch.float32,
)
ONES = 1
"""The column of OUTPUT that is 1 everywhere: where a bias is added."""


def pays(images: Tensor, weight: Tensor) -> bool:
    """Whether `norm_silu_conv` can be taken and is faster: on CPUs, in float32, without gradients, for wide layers.

    Few pixels would not earn back what the transform of the kernels takes. The batch does not count, so that a picture
    is computed in the same way in any batch.
    """
    channels, height, width = images.shape[1:]
    return (
        not torch.is_grad_enabled()
        and len(images) > 0
        and images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(channels, len(weight)) >= MIN_CHANNELS
        and height * width >= 16 * max(channels, len(weight))
    )


def norm_silu_conv(images: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, inplace: bool = False) -> Tensor:
    """`conv(silu(norm(images)))`, in channels_last; without gradient.

    Each picture is computed by itself, so that it does not depend on its batch, and some lines of it at a time.

    Args:
        images: `(B, C, H, W)` float32.
        norm: over the C channels, with weight and bias.
        conv: 3x3 with padding 1, C to O channels, with a bias.
        inplace: whether the result may take the place of `images`, where it is as wide: fresh memory costs more than
            the passes over it.

    Returns:
        `(B, O, H, W)` float32.
    """
    batch, channels, height, width = images.shape
    weight, bias = conv.weight, conv.bias
    kernels = KERNEL @ weight.permute(2, 0, 3, 1).reshape(3, -1)
    kernels = kernels.view(WINDOW, len(weight), 1, 3, channels).permute(0, 1, 4, 2, 3)  # each (O, C, 1, 3)
    rows = -(-height // TILE)
    step = -(-rows // max(1, round(4 * WINDOW * width * channels * rows / CHUNK_BYTES)))  # rows of tiles in a chunk
    band = images.new_empty(TILE * step + 2, width, channels)  # lines of a chunk, the one above and the one below
    windows = band.as_strided((step, WINDOW, width * channels), (TILE * width * channels, width * channels, 1))
    inputs = images.new_empty(WINDOW, step, width, channels)
    products = images.new_empty(step, WINDOW, width * len(weight))
    pixels = images.permute(0, 2, 3, 1).contiguous()
    result = pixels if inplace and channels == len(weight) else images.new_empty(batch, height, width, len(weight))
    for picture, found, scale, shift in zip(pixels, result, *affine(images, norm), strict=True):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            band[:2] = band[-2:] if first else 0  # the chunk before may have taken their place
            known = 2 if first else 1
            lines = picture[TILE * first - 1 + known : TILE * (first + count) + 1]
            _fill(band[known : TILE * count + 2], lines, scale, shift)
            torch.bmm(INPUT.expand(count, -1, -1), windows[:count], out=inputs[:, :count].flatten(2).transpose(0, 1))
            for point, (chunk, kernel) in enumerate(zip(inputs[:, None, :count], kernels)):
                product = F.conv2d(chunk.permute(0, 3, 1, 2), kernel, bias if point == ONES else None, padding=(0, 1))
                products[:count, point] = product.permute(0, 2, 3, 1).flatten(0, 1).flatten(1)
            matrix, outputs = OUTPUT.expand(count, -1, -1), found[TILE * first : TILE * (first + count)]
            if len(outputs) == TILE * count:
                torch.bmm(matrix, products[:count], out=outputs.view(count, TILE, -1))
            else:  # the last tiles reach below the picture
                outputs.copy_(torch.bmm(matrix, products[:count]).view(-1, *outputs.shape[1:])[: len(outputs)])
    return result.permute(0, 3, 1, 2)


def affine(images: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factors and summands `(B, C)` by which a GroupNorm acts on each picture `(B, C, H, W)` in channels_last.

    Sums of all pixels in float32 drift where a picture is flat: torch's GroupNorm in channels_last is off by 5e-4 of
    the variance at 256 pixels a side. Moments of a part of the pixels each, then put together, drift by 1e-5.
    """
    parts = math.gcd(images.shape[3], PARTS)
    pixels = images.permute(0, 2, 3, 1).reshape(len(images), -1, parts * images.shape[1])
    found = [torch.batch_norm_update_stats(picture, None, None, 0.0) for picture in pixels]
    mean, variance = (torch.stack(moment).view(len(images), parts, norm.num_groups, -1) for moment in zip(*found))
    group = mean.mean((1, 3), keepdim=True)
    variance = (variance + (mean - group).square()).mean((1, 3), keepdim=True)
    scale = norm.weight.view(norm.num_groups, -1) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.view(norm.num_groups, -1) - group * scale
    return scale.flatten(1), shift.flatten(1)


def _fill(band: Tensor, lines: Tensor, scale: Tensor, shift: Tensor) -> None:
    """SiLU of scaled and shifted `lines` `(n, W, C)`, and 0 where they end."""
    F.silu(torch.addcmul(shift, lines, scale, out=band[: len(lines)]), inplace=True)
    band[len(lines) :].zero_()
