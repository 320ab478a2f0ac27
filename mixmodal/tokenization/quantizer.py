"""Continuous latents to codes and back: one result type over the quantizers of vector-quantize-pytorch.

| kind | codes | paper |
|---|---|---|
| `fsq` | every latent dimension rounded to its levels; no codebook to learn, none to collapse | arXiv 2309.15505 |
| `vq` | nearest vector of a learned codebook | arXiv 1711.00937 |
| `vq_cosine` | nearest direction; latents and codebook on the unit sphere | arXiv 2110.04627, section 3.2 |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QuantizerKind = Literal["fsq", "vq", "vq_cosine"]

MAX_DISTANCES = 2**24
"""Distances held at once while codes are looked up: 64 MiB of float32."""

FIELDS_OF_FSQ = {"kind", "levels"}
FIELDS_OF_GRADIENT = {"kind", "codebook_size", "codebook_dim", "update", "commitment_weight"}
FIELDS_OF_EMA = FIELDS_OF_GRADIENT | {"decay", "restart_below", "kmeans_init"}


class Quantized(NamedTuple):
    """What every quantizer returns.

    Args:
        latents: float32 `(B, C, h, w)`, `codes_to_latents(codes)` of the codebook that coded them; gradients pass
            straight through.
        codes: int64 `(B, h, w)`.
        loss: float32 scalar, the mean over latents of the commitment loss (with `update: gradient` the codebook
            loss too); zero for `fsq`.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Which quantizer. A field that the kind does not use must keep its default.

    Args:
        kind: `fsq`, `vq` or `vq_cosine`.
        levels: fsq: values of each latent dimension, at least 3 each; their product is the codebook size.
        codebook_size: vq: number of codes.
        codebook_dim: vq: size of a code vector.
        update: vq: the codebook follows a moving average of the latents (`ema`) or the optimizer (`gradient`).
        commitment_weight: vq: weight of the pull of the latents to their codes, beta in arXiv 1711.00937.
        decay: ema: share of the moving average that one step keeps.
        restart_below: ema: a code used fewer times a step than this, on the moving average, restarts at a latent of
            the batch; 0 is never. With `update: gradient` a restart would fight the optimizer's own copy.
        kmeans_init: ema: take the first codebook from the first batch by k-means.
    """

    kind: QuantizerKind = "fsq"
    levels: tuple[int, ...] = ()
    codebook_size: int = 0
    codebook_dim: int = 0
    update: Literal["ema", "gradient"] = "ema"
    commitment_weight: float = 0.25
    decay: float = 0.99
    restart_below: float = 0.05
    kmeans_init: bool = False


class Quantizer(nn.Module, ABC):
    """Latents `(B, C, h, w)` to codes `(B, h, w)` and back, in float32 whatever autocast says."""

    codebook_size: int
    codebook_dim: int

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize; in training mode the codebook learns from these latents."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.float())

    @torch.no_grad()
    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """The codes that `forward` gives, int64 `(B, h, w)`; nothing learns from the call."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._codes(latents.float())

    @abstractmethod
    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """The inverse of the coding: int64 `(B, h, w)` to float32 `(B, C, h, w)`."""

    @abstractmethod
    def _quantize(self, latents: Tensor) -> Quantized: ...

    @abstractmethod
    def _codes(self, latents: Tensor) -> Tensor: ...


class FiniteScalarQuantizer(Quantizer):
    """Each of C latent dimensions takes one of `levels[c]` values in [-1, 1] (arXiv 2309.15505)."""

    def __init__(self, config: QuantizerConfig) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        self.fsq = FSQ(list(config.levels))
        self.codebook_size = math.prod(config.levels)
        self.codebook_dim = len(config.levels)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(codes)

    def _quantize(self, latents: Tensor) -> Quantized:
        through, codes = self.fsq(latents)
        return Quantized(straight_through(through, self.codes_to_latents(codes)), codes.long(), latents.new_zeros(()))

    def _codes(self, latents: Tensor) -> Tensor:
        return self.fsq(latents)[1].long()


class VectorQuantizer(Quantizer):
    """What the two ways to learn a codebook share."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.codebook_dim = config.codebook_dim
        self.commitment_weight = config.commitment_weight
        self.cosine = config.kind == "vq_cosine"

    @abstractmethod
    def codebook(self) -> Tensor:
        """The code vectors, float32 `(codebook_size, C)`; unit vectors with `vq_cosine`."""

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook()).movedim(-1, 1)

    def _vectors(self, latents: Tensor) -> Tensor:
        vectors = latents.movedim(1, -1)  # (B, h, w, C)
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def _codes(self, latents: Tensor) -> Tensor:
        vectors = self._vectors(latents)
        return nearest_codes(vectors.flatten(0, -2), self.codebook(), self.cosine).view(vectors.shape[:-1])


class MovingAverageQuantizer(VectorQuantizer):
    """Each code is the moving average of the latents that chose it; unused codes restart (arXiv 1711.00937, A.1)."""

    num_updates: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(config)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.vq = VectorQuantize(
            dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=self.cosine,
            decay=config.decay,
            threshold_ema_dead_code=config.restart_below,  # pyright: ignore[reportArgumentType]  # compared only
            commitment_weight=config.commitment_weight,
            kmeans_init=config.kmeans_init,
            rotation_trick=False,
            accept_image_fmap=True,
            sync_codebook=distributed and torch.distributed.get_world_size() > 1,
        )
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def codebook(self) -> Tensor:
        return self.vq.codebook

    def _quantize(self, latents: Tensor) -> Quantized:
        if not self.training:
            vectors, codes = self._vectors(latents).movedim(-1, 1), self._codes(latents)
            chosen = self.codes_to_latents(codes)
            loss = self.commitment_weight * F.mse_loss(vectors, chosen)
            return Quantized(straight_through(vectors, chosen), codes, loss)
        # restarts draw from the global generator: seeded by the update, they repeat after a resume
        with torch.random.fork_rng([latents.device] if latents.is_cuda else []):
            torch.manual_seed(int(self.num_updates))
            latents_through, codes, loss = self.vq(latents)
        self.num_updates += 1
        return Quantized(latents_through, codes, loss)


class GradientQuantizer(VectorQuantizer):
    """The codebook is a parameter with a loss of its own (arXiv 1711.00937, equation 3; LlamaGen, arXiv 2406.06525)."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def codebook(self) -> Tensor:
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.cosine else weight

    def _quantize(self, latents: Tensor) -> Quantized:
        vectors, codebook = self._vectors(latents), self.codebook()
        codes = nearest_codes(vectors.detach().flatten(0, -2), codebook.detach(), self.cosine).view(vectors.shape[:-1])
        chosen = F.embedding(codes, codebook)
        commitment = F.mse_loss(vectors, chosen.detach())
        loss = F.mse_loss(chosen, vectors.detach()) + self.commitment_weight * commitment
        return Quantized(straight_through(vectors, chosen).movedim(-1, 1), codes, loss)


def straight_through(source: Tensor, values: Tensor) -> Tensor:
    """`values` to the bit with the gradient of `source`: `source + (values - source)` is a rounding error off."""
    return values.detach() + (source - source.detach())


def nearest_codes(vectors: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Index of the nearest row of `codebook` `(V, C)` for each of `vectors` `(N, C)`: int64 `(N,)`.

    In slices, so that memory does not grow with N. With `cosine` both are unit vectors.
    """
    offsets = 0 if cosine else -0.5 * codebook.square().sum(-1)  # |v - c|^2 = |v|^2 - 2 (v.c - |c|^2 / 2)
    rows = max(1, MAX_DISTANCES // len(codebook))
    return torch.cat([(part @ codebook.T + offsets).argmax(-1) for part in vectors.split(rows)])


def check_quantizer(config: QuantizerConfig, key: str = "quantizer") -> None:
    """Complain about values that can not work, or that this kind would ignore.

    Raises:
        ValueError: naming the key.
    """
    for name, choices in (("kind", ("fsq", "vq", "vq_cosine")), ("update", ("ema", "gradient"))):
        if getattr(config, name) not in choices:
            raise ValueError(f"{key}.{name} is {getattr(config, name)!r}; choose one of {', '.join(choices)}")
    used = FIELDS_OF_FSQ if config.kind == "fsq" else FIELDS_OF_EMA if config.update == "ema" else FIELDS_OF_GRADIENT
    for field in fields(config):
        if field.name not in used and getattr(config, field.name) != field.default:
            kind = config.kind if config.kind == "fsq" else f"{config.kind} with update: {config.update}"
            raise ValueError(f"{key}.{field.name} has no effect with kind {kind}; leave it out")
    if config.kind == "fsq":
        if not config.levels or min(config.levels) < 3:
            raise ValueError(f"{key}.levels is {list(config.levels)}; give at least 3 levels for each latent dimension")
        if math.prod(config.levels) > 2**24:
            raise ValueError(f"{key}.levels make {math.prod(config.levels):,} codes; float32 counts to {2**24:,}")
        return
    for name in ("codebook_size", "codebook_dim"):
        if getattr(config, name) < 1 + (name == "codebook_size"):
            raise ValueError(f"{key}.{name} is {getattr(config, name)}; kind {config.kind} needs it")
    if not 0 <= config.decay < 1:
        raise ValueError(f"{key}.decay is {config.decay}; it must lie in 0 .. 1")
    for name in ("commitment_weight", "restart_below"):
        if getattr(config, name) < 0:
            raise ValueError(f"{key}.{name} is {getattr(config, name)}; it must not be negative")


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of a config; the library behind it is imported here, which takes seconds.

    Raises:
        ValueError: naming the key of a value that can not work.
    """
    check_quantizer(config)
    if config.kind == "fsq":
        return FiniteScalarQuantizer(config)
    return MovingAverageQuantizer(config) if config.update == "ema" else GradientQuantizer(config)
