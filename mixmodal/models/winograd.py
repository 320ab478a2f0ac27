"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.3).

A tile of 4x4 outputs takes 36 products a pair of channels instead of 144. In float32 the results differ from those of a
direct convolution by about 1e-5 of their size. What is gained goes to the transforms where channels are few or tiles
are; `pays` tells. Shapes: B batch, C and O channels, H W pixels, n tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE, WINDOW = 4, 6
"""Pixels of a side of a tile's outputs, and of the inputs that they depend on."""
MIN_CHANNELS = 128
CHUNK_BYTES = 2**21
"""Of the transformed inputs that are made at a time, so that they stay in the cache."""

INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
)
KERNEL = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float32,
)
OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float32
)


def pays(images: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` can be taken and is faster: on CPUs, in float32, without gradients, for wide layers.

    Few tiles would not earn back what the transform of the kernels takes. The batch does not count, so that a picture
    is computed in the same way in any batch.
    """
    channels, height, width = images.shape[1:]
    num_tiles = height * width // TILE**2
    return (
        not torch.is_grad_enabled()
        and images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(channels, len(weight)) >= MIN_CHANNELS
        and not (height % TILE or width % TILE)
        and num_tiles >= max(channels, len(weight)) // 4
    )


def conv3x3(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(images, weight, bias, padding=1)`, in channels_last; without gradient.

    Each picture is computed by itself, so that it does not depend on its batch.

    Args:
        images: `(B, C, H, W)` float32; H and W multiples of 4.
        weight: `(O, C, 3, 3)` float32.
        bias: `(O,)` float32.
    """
    batch, channels, height, width = images.shape
    kernels = _both(KERNEL) @ weight.permute(2, 3, 1, 0).reshape(9, -1)
    kernels = kernels.view(WINDOW**2, channels, len(weight))
    pixels = images.permute(0, 2, 3, 1)  # (B, H, W, C)
    rows, columns = height // TILE, width // TILE
    result = images.new_empty(batch, rows, TILE, columns, TILE, len(weight))
    step = max(1, CHUNK_BYTES // (4 * WINDOW**2 * columns * max(channels, len(weight))))
    band = images.new_zeros(TILE * step + 2, width + 2, channels)  # some rows with what lies around them
    line, pixel, _ = band.stride()
    windows = band.as_strided((WINDOW, WINDOW, step, columns, channels), (line, pixel, TILE * line, TILE * pixel, 1))
    for index in range(batch):
        for start in range(0, rows, step):
            count = min(step, rows - start)
            _fill(band[: TILE * count + 2], pixels[index], TILE * start - 1)
            inputs = (_both(INPUT) @ windows[:, :, :count].reshape(WINDOW**2, -1)).view(WINDOW**2, -1, channels)
            products = torch.bmm(inputs, kernels).view(WINDOW**2, -1)
            outputs = (_both(OUTPUT) @ products).view(TILE, TILE, -1, columns, len(weight))
            torch.add(outputs.permute(2, 0, 3, 1, 4), bias, out=result[index, start : start + count])
    return result.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _fill(band: Tensor, pixels: Tensor, first: int) -> None:
    """Lines of `pixels` `(H, W, C)` from `first` on to the middle of `band` `(n, W + 2, C)`; 0 above and below."""
    start, stop = max(first, 0), min(first + len(band), len(pixels))
    band[start - first : stop - first, 1:-1] = pixels[start:stop]
    band[: start - first].zero_()
    band[stop - first :].zero_()


def _both(matrix: Tensor) -> Tensor:
    """The transform of rows and columns at once: `vec(M X M^T) = (M kron M) vec(X)`."""
    return torch.kron(matrix, matrix)
