"""What every quantizer has: its config, its interface and the type of its results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

QuantizerKind = Literal["fsq", "lfq", "vq", "vq_cosine", "simvq", "residual_vq"]
Update = Literal["ema", "gradient"]
Gradient = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """What every quantizer returns.

    Args:
        latents: float32 `(B, C, h, w)`, `codes_to_latents(codes)` of the codebook that coded them; the gradient of what
            is made of them passes on to the latents that were coded.
        codes: int64 `(B, h, w * codes_per_place)`.
        loss: float32 scalar, the sum of `parts` with the quantizer's `part_weights`; zero for `fsq`.
        parts: float32 scalars by name, unweighted, each a mean over the batch: `commitment`, `codebook` where an
            optimizer learns the codebook, `entropy` and `codebook_entropy` for `lfq`; none for `fsq`.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Which quantizer. A field that the kind does not use must keep its default.

    Args:
        kind: `fsq`, `lfq`, `vq`, `vq_cosine`, `simvq` or `residual_vq`.
        levels: fsq: values of each latent dimension, at least 3 each; their product is the codebook size.
        codebook_size: vq, simvq: number of codes; residual_vq: of each level.
        codebook_dim: vq, simvq: size of a code vector; lfq: number of signs, 1 to 18.
        num_levels: residual_vq: codes of a place, at least 2; a picture has so many times more codes.
        update: vq, residual_vq: the codebook follows a moving average of the latents (`ema`) or the optimizer
            (`gradient`).
        gradient: vq, simvq: how the gradient passes the choice of a code: as it is (`straight_through`), or turned and
            scaled as the latent is to its code (`rotation`, arXiv 2410.06424).
        commitment_weight: vq, simvq, lfq: weight of the pull of the latents to their codes, beta in arXiv 1711.00937.
        decay: ema: share of the moving average that one micro-batch keeps; with `grad_accum_steps` above 1 a step has
            several.
        restart_below: ema: a code used fewer times a micro-batch than this, on the moving average, restarts at a
            latent of the micro-batch; 0 is never. With `update: gradient` a restart would fight the optimizer's own
            copy.
        kmeans_init: ema: take the first codebook from the first batch by k-means.
        entropy_weight: lfq: weight of the entropy loss as a whole, which makes the code of each latent certain and all
            codes together evenly used.
        diversity_weight: lfq: weight of the even use within the entropy loss, gamma in arXiv 2310.05737.
        entropy_temperature: lfq: of the softmax over codes that the entropies are of; squared latent units.
    """

    kind: QuantizerKind = "fsq"
    levels: tuple[int, ...] = ()
    codebook_size: int = 0
    codebook_dim: int = 0
    num_levels: int = 0
    update: Update = "ema"
    gradient: Gradient = "straight_through"
    commitment_weight: float = 0.25
    decay: float = 0.99
    restart_below: float = 0.05
    kmeans_init: bool = False
    entropy_weight: float = 0.1
    diversity_weight: float = 1.0
    entropy_temperature: float = 0.01

    @property
    def codes_per_place(self) -> int:
        """Codes of one place of the grid of latents."""
        return self.num_levels if self.kind == "residual_vq" else 1


class Quantizer(nn.Module, ABC):
    """Latents `(B, C, h, w)` to codes `(B, h, w * codes_per_place)` and back, in float32 whatever autocast says.

    The codes of one place stand side by side; all levels share the ids 0 .. codebook_size - 1.
    """

    codebook_size: int
    codebook_dim: int
    codes_per_place: int
    part_weights: Mapping[str, float]
    """What `Quantized.loss` weighs each of `Quantized.parts` with."""

    def __init__(
        self, codebook_size: int, codebook_dim: int, part_weights: Mapping[str, float], codes_per_place: int = 1
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.codes_per_place = codes_per_place
        self.part_weights = part_weights

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize; in training mode the codebook learns from these latents."""
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, parts = self._quantize(latents.float())
            loss = quantized.new_zeros(())
            for name, part in parts.items():
                loss = loss + self.part_weights[name] * part
        return Quantized(quantized, codes, loss, parts)

    @torch.no_grad()
    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """The codes that `forward` gives, int64 `(B, h, w * codes_per_place)`; nothing learns from the call."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._codes(latents.float())

    @abstractmethod
    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """The inverse of the coding: int64 `(B, h, w * codes_per_place)` to float32 `(B, C, h, w)`."""

    @abstractmethod
    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    @abstractmethod
    def _codes(self, latents: Tensor) -> Tensor: ...


def straight_through(source: Tensor, values: Tensor) -> Tensor:
    """`values` to the bit with the gradient of `source`: `source + (values - source)` is a rounding error off."""
    return values.detach() + (source - source.detach())
