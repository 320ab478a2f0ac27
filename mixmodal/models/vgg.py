"""VGG16's convolutions (arXiv 1409.1556, table 1, column D) as LPIPS reads them, with weights from local files.

The layout is torchvision's `vgg16().features`, so that its state dict loads as it is. No package carries the weights
(528 MB with the classifier): save them where there is torchvision with
`torch.save(torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict(), "vgg16.pth")`.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.weights import read_weights

STAGE_CHANNELS = (64, 128, 256, 512, 512)
STAGE_CONVS = (2, 2, 3, 3, 3)
MIN_SIZE = 16
"""Pixels a side that the last stage needs: four poolings stand before it."""
# what LPIPS subtracts and divides by (arXiv 1801.03924, reference code): ImageNet's mean and deviation in [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """Pictures `(B, 3, H, W)` in [-1, 1] to the activations behind each stage; float32 whatever autocast says."""

    layer_channels = STAGE_CHANNELS
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.features = nn.ModuleDict()  # under torchvision's numbers, in which activations and poolings count
        number, channels = 0, 3
        for width, depth in zip(STAGE_CHANNELS, STAGE_CONVS, strict=True):
            for _ in range(depth):
                self.features[str(number)] = nn.Conv2d(channels, width, 3, padding=1)
                number, channels = number + 2, width
            number += 1

    def layers(self, images: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: float32 `(B, C, H / s, W / s)`, s = 1, 2, 4, 8, 16.

        Raises:
            ValueError: where a side is under 16 pixels.
        """
        if min(images.shape[-2:]) < MIN_SIZE:
            raise ValueError(f"VGG16: pictures of {tuple(images.shape[-2:])} pixels; it needs {MIN_SIZE} a side")
        convs = iter(self.features.values())
        found: list[Tensor] = []
        with torch.autocast(images.device.type, enabled=False):
            x = (images.float() - self.shift) / self.scale
            for depth in STAGE_CONVS:
                x = F.max_pool2d(x, 2) if found else x
                for _ in range(depth):
                    x = F.relu(next(convs)(x))
                found.append(x)
        return found


def load_vgg16(path: Path) -> VGG16Features:
    """VGG16 with the weights of a file, on the CPU, in evaluation mode and without gradients of its own.

    Args:
        path: torchvision's state dict, `.pth` or `.safetensors`, with or without the classifier.

    Raises:
        ValueError: naming the file, where it can not be read or lacks a tensor.
    """
    network = VGG16Features()
    state = read_weights(path)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    bad = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if bad:
        raise ValueError(
            f"VGG16: {path} is not torchvision's vgg16: {len(bad)} of {len(wanted)} tensors are missing or of another "
            f"shape, the first is {bad[0]}; the file holds {', '.join(sorted(state)[:3]) or 'nothing'} .."
        )
    network.load_state_dict({name: state[name] for name in wanted})
    return network.eval().requires_grad_(False)


def load_lpips_weights(path: Path) -> list[Tensor]:
    """LPIPS' weights of the channels of each stage, float32 `(C,)`, from the file of its linear layers.

    Raises:
        ValueError: naming the file, where it can not be read or is for another network than VGG16.
    """
    state = read_weights(path)
    found = []
    for stage, channels in enumerate(STAGE_CHANNELS):
        name = f"lin{stage}.model.1.weight"
        if name not in state or state[name].numel() != channels:
            shape = tuple(state[name].shape) if name in state else "missing"
            raise ValueError(f"LPIPS: {path} is not for VGG16: {name} is {shape} instead of (1, {channels}, 1, 1)")
        found.append(state[name].float().reshape(channels))
    return found
