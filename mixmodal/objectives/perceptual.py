"""How far pictures look apart to a network that knows pictures: LPIPS (arXiv 1801.03924, equation 1).

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2,   f_l of length 1 at every position

| backbone | features | weights of the channels |
|---|---|---|
| `efficientnet_lite0` | EfficientNet-Lite0 from a package, five depths | 1: the cosine distance, twice |
| `lpips_vgg` | VGG16 from a local file, five depths | LPIPS' own, learned from judgements of people |

The values of the two are on scales of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.models.efficientnet import load_efficientnet_lite0
from mixmodal.models.vgg import MIN_SIZE, load_lpips_weights, load_vgg16

BACKBONES = ("efficientnet_lite0", "lpips_vgg")
LENGTH_EPS = 1e-8
"""Added to squared lengths: a position without any activation then has a gradient."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """What compares pictures.

    Args:
        backbone: `efficientnet_lite0`, which downloads nothing, or `lpips_vgg`.
        vgg_weights: lpips_vgg: file of torchvision's vgg16 state dict, `.pth` or `.safetensors`.
        lpips_weights: lpips_vgg: file of LPIPS' linear layers; by default the one that torchmetrics carries.
        image_size: pixels a side to which pictures are resized before they are compared, bilinear; 0 leaves them.
            The backbones have learned on 224: on small pictures their deep layers see a few positions only.
    """

    backbone: Literal["efficientnet_lite0", "lpips_vgg"] = "efficientnet_lite0"
    vgg_weights: Path | None = None
    lpips_weights: Path | None = None
    image_size: int = 0

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"perceptual.backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}")
        if self.backbone == "lpips_vgg" and self.vgg_weights is None:
            raise ValueError(
                "perceptual.vgg_weights is missing: backbone lpips_vgg needs the file of torchvision's vgg16 "
                "(no package carries it); backbone efficientnet_lite0 needs no file"
            )
        for name in ("vgg_weights", "lpips_weights"):
            if self.backbone != "lpips_vgg" and getattr(self, name) is not None:
                raise ValueError(f"perceptual.{name} has no effect with backbone {self.backbone}; leave it out")
        if self.image_size and self.image_size < MIN_SIZE:
            raise ValueError(f"perceptual.image_size is {self.image_size}; give at least {MIN_SIZE}, or 0 for none")


class PerceptualLoss(nn.Module):
    """The distance of each reconstruction from its picture; nothing in it trains, whatever mode it is put in.

    Keep it out of the module that an engine trains: its weights are constants and stay float32.

    Raises:
        ValueError: where weights are missing or are those of another network.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.config = config
        if config.backbone == "lpips_vgg":
            assert config.vgg_weights is not None
            self.network = load_vgg16(config.vgg_weights)
            weights = load_lpips_weights(config.lpips_weights or shipped_lpips_weights())
        else:
            self.network = load_efficientnet_lite0()
            weights = [torch.ones(channels) for channels in self.network.layer_channels]
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])
        self.eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """The distance of each pair, float32 `(B,)`, at least 0; computed in float32 under autocast too.

        Args:
            reconstructions: `(B, 3, H, W)` in [-1, 1]; the gradient reaches these.
            images: `(B, 3, H, W)` in [-1, 1]; no gradient reaches these.

        Raises:
            ValueError: where the shapes differ, or the pictures are too small for the backbone.
        """
        if reconstructions.shape != images.shape or images.ndim != 4 or images.shape[1] != 3:
            shapes = f"{tuple(reconstructions.shape)} and {tuple(images.shape)}"
            raise ValueError(f"perceptual loss: pictures of shapes {shapes} instead of (B, 3, H, W) twice")
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = [unit_length(layer) for layer in self.network.layers(self._resized(images))]
            found = [unit_length(layer) for layer in self.network.layers(self._resized(reconstructions))]
            distances = images.new_zeros(len(images), dtype=torch.float32)
            for ours, theirs, weight in zip(found, wanted, self.weights, strict=True):
                squares = (ours - theirs).square().mean((-2, -1))  # (B, C)
                distances = distances + squares @ weight
        return distances

    def _resized(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if not size or tuple(images.shape[-2:]) == (size, size):
            return images.float()
        return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def unit_length(features: Tensor) -> Tensor:
    """Features `(B, C, h, w)` scaled to length 1 over the channels at every position."""
    return features / (features.square().sum(1, keepdim=True) + LENGTH_EPS).sqrt()


def shipped_lpips_weights() -> Path:
    """LPIPS' linear layers for VGG16 (7 kB, BSD-2-Clause), which torchmetrics carries."""
    from importlib.util import find_spec

    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
