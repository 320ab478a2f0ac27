"""Continuous latents to codes and back: one config, one result type and one interface over every quantizer.

| kind | codes | paper |
|---|---|---|
| `fsq` | every latent dimension rounded to its levels; no codebook to learn, none to collapse | arXiv 2309.15505 |
| `lfq` | the sign of every latent dimension: `2**codebook_dim` codes, spread by an entropy loss | arXiv 2310.05737 |
| `vq` | nearest vector of a learned codebook | arXiv 1711.00937 |
| `vq_cosine` | nearest direction; latents and codebook on the unit sphere | arXiv 2110.04627, section 3.2 |
| `simvq` | nearest vector of a fixed random codebook seen through one learned matrix | arXiv 2411.02038 |
| `residual_vq` | `num_levels` codes a place, each for what the levels before it leave over | arXiv 2107.03312 |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

QuantizerKind = Literal["fsq", "lfq", "vq", "vq_cosine", "simvq", "residual_vq"]
Update = Literal["ema", "gradient"]
Gradient = Literal["straight_through", "rotation"]

MAX_LFQ_DIM = 18
"""2**18 codes, the codebook of arXiv 2310.05737: the entropy loss holds one probability a code."""

CODEBOOK_FIELDS = {"codebook_size", "codebook_dim", "commitment_weight", "gradient"}
FIELDS: dict[QuantizerKind, set[str]] = {
    "fsq": {"levels"},
    "lfq": {"codebook_dim", "commitment_weight", "entropy_weight", "diversity_weight", "entropy_temperature"},
    "vq": {*CODEBOOK_FIELDS, "update"},
    "vq_cosine": {*CODEBOOK_FIELDS, "update"},
    "simvq": CODEBOOK_FIELDS,
    "residual_vq": {*CODEBOOK_FIELDS, "update", "num_levels"},
}
"""What each kind reads beside `kind`."""
EMA_FIELDS = {"decay", "restart_below", "kmeans_init"}
"""What a kind with an `update` reads where that is `ema`."""
ENTROPY_FIELDS = {"diversity_weight", "entropy_temperature"}
"""What `entropy_weight: 0` leaves without effect."""


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


def check_quantizer(config: QuantizerConfig, key: str = "quantizer") -> None:
    """Complain about values that can not work, or that this kind would ignore.

    Raises:
        ValueError: naming the key.
    """
    for name, choices in (
        ("kind", get_args(QuantizerKind)),
        ("update", get_args(Update)),
        ("gradient", get_args(Gradient)),
    ):
        if getattr(config, name) not in choices:
            raise ValueError(f"{key}.{name} is {getattr(config, name)!r}; choose one of {', '.join(choices)}")
    _check_unused(config, key)
    if config.kind == "fsq":
        _check_levels(config, key)
        return
    least = {"codebook_size": 2, "codebook_dim": 1, "num_levels": 2}
    for name in least.keys() & FIELDS[config.kind]:
        if getattr(config, name) < least[name]:
            value = getattr(config, name)
            raise ValueError(f"{key}.{name} is {value}; kind {config.kind} needs at least {least[name]}")
    if config.kind == "lfq" and config.codebook_dim > MAX_LFQ_DIM:
        raise ValueError(f"{key}.codebook_dim is {config.codebook_dim}; kind lfq holds 2**{MAX_LFQ_DIM} codes at most")
    if config.codebook_dim == 1 and (config.kind == "vq_cosine" or config.gradient == "rotation"):
        raise ValueError(f"{key}.codebook_dim is 1, and a line has no directions; take 2 or more")
    if not 0 <= config.decay < 1:
        raise ValueError(f"{key}.decay is {config.decay}; it must lie in 0 .. 1")
    for name in ("commitment_weight", "restart_below", "entropy_weight", "diversity_weight"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{key}.{name} is {getattr(config, name)}; it must not be negative")
    if not 0 < config.entropy_temperature < math.inf:
        raise ValueError(f"{key}.entropy_temperature is {config.entropy_temperature}; it must be above 0")


def _check_unused(config: QuantizerConfig, key: str) -> None:
    """Complain about a value that this kind would ignore."""
    used, kind = {"kind", *FIELDS[config.kind]}, f"kind {config.kind}"
    if "update" in used:
        used |= EMA_FIELDS if config.update == "ema" else set()
        kind += f" with update: {config.update}"
    if config.kind == "lfq" and not config.entropy_weight:
        used -= ENTROPY_FIELDS
        kind += " with entropy_weight: 0"
    for field in fields(config):
        if field.name not in used and getattr(config, field.name) != field.default:
            reason = {"fsq": " (levels make it)", "lfq": " (it is 2**codebook_dim)"}.get(config.kind, "")
            reason = reason if field.name == "codebook_size" else ""
            raise ValueError(f"{key}.{field.name} has no effect with {kind}{reason}; leave it out")


def _check_levels(config: QuantizerConfig, key: str) -> None:
    if not config.levels or min(config.levels) < 3:
        raise ValueError(f"{key}.levels is {list(config.levels)}; give at least 3 levels for each latent dimension")
    if math.prod(config.levels) > 2**24:
        raise ValueError(f"{key}.levels make {math.prod(config.levels):,} codes; float32 counts to {2**24:,}")


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of a config; the library behind it is imported here, which takes seconds.

    Raises:
        ValueError: naming the key of a value that can not work.
    """
    from mixmodal.tokenization.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer
    from mixmodal.tokenization.vector_quantizers import ResidualQuantizer, build_vector_quantizer

    check_quantizer(config)
    if config.kind == "fsq":
        return FiniteScalarQuantizer(config)
    if config.kind == "lfq":
        return LookupFreeQuantizer(config)
    return ResidualQuantizer(config) if config.kind == "residual_vq" else build_vector_quantizer(config)


def remedy(config: QuantizerConfig, key: str = "quantizer") -> str:
    """What to change where few codes are used, as words that name the keys."""
    if config.kind == "fsq":
        return f"choose fewer or smaller {key}.levels, or train longer"
    if config.kind == "lfq":
        if not config.entropy_weight:
            return f"set {key}.entropy_weight above 0, so that codes are evenly used, or choose kind fsq"
        return f"raise {key}.entropy_weight or diversity_weight, lower codebook_dim, or choose kind fsq"
    if config.kind == "simvq":
        return f"lower {key}.codebook_dim or codebook_size, raise the learning rate, or choose kind fsq"
    if config.update == "gradient":
        return f"choose {key}.update ema, which restarts dead codes, or kind fsq"
    if not config.restart_below:
        return f"set {key}.restart_below above 0, so that dead codes restart, or choose kind fsq"
    if config.kind == "vq":
        return f"choose {key}.kind vq_cosine, a smaller codebook_dim, or kind fsq"
    if config.kind == "residual_vq":
        return f"raise {key}.restart_below, lower num_levels, codebook_dim or codebook_size, or choose kind fsq"
    return f"raise {key}.restart_below, lower codebook_dim or codebook_size, or choose kind fsq"
