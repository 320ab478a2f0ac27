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
from dataclasses import fields
from typing import get_args

from mixmodal.tokenization.quantizer_base import Gradient, Quantizer, QuantizerConfig, QuantizerKind, Update
from mixmodal.tokenization.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer
from mixmodal.tokenization.vector_quantizers import ResidualQuantizer, build_vector_quantizer

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
