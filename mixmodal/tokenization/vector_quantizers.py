"""Quantizers with a codebook of vectors: the nearest one is the code. They differ in how the codebook is learned."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.tokenization.quantizer_base import Gradient, Quantizer, QuantizerConfig, straight_through

MAX_DISTANCES = 2**24
"""Distances held at once while codes are looked up: 64 MiB of float32."""


class Assigned(NamedTuple):
    """Vectors and their codes.

    Args:
        chosen: `(B, h, w, C)`, the code vectors; with the gradient of the codebook where an optimizer learns it.
        codes: int64 `(B, h, w)`.
        parts: unweighted scalars of the loss.
    """

    chosen: Tensor
    codes: Tensor
    parts: dict[str, Tensor]


class VectorQuantizer(Quantizer):
    """What the ways to learn a codebook share: training and evaluation look codes up in the same lines."""

    learned_by_gradient = True

    def __init__(self, config: QuantizerConfig) -> None:
        weights = {"codebook": 1.0} if self.learned_by_gradient else {}
        weights["commitment"] = config.commitment_weight
        super().__init__(config.codebook_size, config.codebook_dim, weights)
        self.cosine = config.kind == "vq_cosine"
        self.gradient: Gradient = config.gradient

    @abstractmethod
    def codebook(self) -> Tensor:
        """The code vectors, float32 `(codebook_size, C)`; unit vectors with `vq_cosine`."""

    def assign(self, vectors: Tensor) -> Assigned:
        """The nearest code of each of `vectors` `(B, h, w, C)`; in training mode the codebook learns from them."""
        codebook = self.codebook()
        codes = nearest_codes(vectors.detach().flatten(0, -2), codebook.detach(), self.cosine).view(vectors.shape[:-1])
        chosen = F.embedding(codes, codebook)
        parts = {"codebook": F.mse_loss(chosen, vectors.detach())} if self.learned_by_gradient else {}
        return Assigned(chosen, codes, {**parts, "commitment": F.mse_loss(vectors, chosen.detach())})

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook()).movedim(-1, 1)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors = self._vectors(latents)
        chosen, codes, parts = self.assign(vectors)
        return pass_gradient(vectors, chosen, self.gradient).movedim(-1, 1), codes, parts

    def _codes(self, latents: Tensor) -> Tensor:
        vectors = self._vectors(latents)
        return nearest_codes(vectors.flatten(0, -2), self.codebook(), self.cosine).view(vectors.shape[:-1])

    def _vectors(self, latents: Tensor) -> Tensor:
        vectors = latents.movedim(1, -1)  # (B, h, w, C)
        return F.normalize(vectors, dim=-1) if self.cosine else vectors


class MovingAverageQuantizer(VectorQuantizer):
    """Each code is the moving average of the latents that chose it; unused codes restart (arXiv 1711.00937, A.1).

    The averages, the restarts and k-means are those of vector-quantize-pytorch. Its first codebook is a small uniform
    one around 0 (on the sphere with `vq_cosine`), which restarts and the average leave behind; `kmeans_init` starts
    among the latents.
    """

    learned_by_gradient = False
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
            kmeans_init=config.kmeans_init,
            rotation_trick=False,
            sync_codebook=distributed and torch.distributed.get_world_size() > 1,
        )
        self.kmeans_init = config.kmeans_init
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._updates: int | None = 0  # what the buffer holds, which on a GPU would be waited for; None: not known
        self.register_load_state_dict_post_hook(forget_updates)

    def codebook(self) -> Tensor:
        codebook = self.vq.codebook
        if codebook.dtype == torch.float32:
            return codebook
        return F.normalize(codebook.float(), dim=-1) if self.cosine else codebook.float()

    def assign(self, vectors: Tensor) -> Assigned:
        if not self.training:
            return super().assign(vectors)
        learned = vectors.detach().flatten(1, -2)  # (B, h * w, C)
        # k-means and restarts draw from the global generators: seeded by the update, they repeat after a resume
        if self._updates is None:
            self._updates = int(self.num_updates)
        with seeded(self._updates, vectors.device):
            if self.kmeans_init:
                self.vq._codebook.init_embed_(learned.flatten(0, 1)[None])
            assigned = super().assign(vectors)
            self.vq.update_indices(learned, assigned.codes.flatten(1))
        self.num_updates += 1
        self._updates += 1
        return assigned


def forget_updates(quantizer: MovingAverageQuantizer, _: object) -> None:
    """A state dict was loaded: the next update reads the number of those before from the buffer."""
    quantizer._updates = None


class GradientQuantizer(VectorQuantizer):
    """The codebook is a parameter with a loss of its own (arXiv 1711.00937, equation 3; LlamaGen, arXiv 2406.06525).

    It starts on the unit sphere with `vq_cosine`, as in LlamaGen. With `vq` it starts as a Gaussian cloud whose vectors
    have length 1 on average, as large as the latents of a fresh encoder or larger. VQGAN's uniform cube of side
    `2 / codebook_size` lies in one point for them: after 300 steps of a small autoencoder on drawn shapes 46 of 512
    codes were in use, against 189 from the cloud.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight, std=config.codebook_dim**-0.5)
        if self.cosine:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def codebook(self) -> Tensor:
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.cosine else weight


class LinearQuantizer(VectorQuantizer):
    """SimVQ (arXiv 2411.02038): a fixed Gaussian codebook times one learned matrix, so that every code learns always.

    Codebook and matrix, with their first values, are those of vector-quantize-pytorch: vectors of length 1 on average,
    and a matrix that leaves them about 0.6 of it.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        from vector_quantize_pytorch import SimVQ

        super().__init__(config)
        self.simvq = SimVQ(dim=config.codebook_dim, codebook_size=config.codebook_size)

    def codebook(self) -> Tensor:
        frozen, matrix = self.simvq.get_buffer("frozen_codebook"), self.simvq.get_parameter("code_transform.weight")
        return F.linear(frozen.float(), matrix.float())


class ResidualQuantizer(Quantizer):
    """`num_levels` codes a place: each level codes what those before it leave over (arXiv 2107.03312, algorithm 1).

    Parts of the loss are sums over levels, as in arXiv 2203.01941, equation 7. `ResidualVQ` of vector-quantize-pytorch
    adds the gradient of every level to the latents, `num_levels` times the straight-through gradient; here it is once.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        levels = [build_vector_quantizer(replace(config, kind="vq", num_levels=0)) for _ in range(config.num_levels)]
        super().__init__(config.codebook_size, config.codebook_dim, levels[0].part_weights, config.codes_per_place)
        self.levels = nn.ModuleList(levels)
        self.gradient: Gradient = config.gradient

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        by_level = codes.unflatten(-1, (-1, self.codes_per_place)).unbind(-1)
        latents = [level.codes_to_latents(one) for level, one in zip(self._levels(), by_level, strict=True)]
        return functools.reduce(torch.add, latents)  # from the first level on, as the coding adds them up

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors = latents.movedim(1, -1)
        total, codes = torch.zeros_like(vectors), []
        parts = {name: latents.new_zeros(()) for name in self.part_weights}
        for level in self._levels():
            assigned = level.assign(vectors - total)
            total = total + assigned.chosen.detach()
            codes.append(assigned.codes)
            parts = {name: part + assigned.parts[name] for name, part in parts.items()}
        return pass_gradient(vectors, total, self.gradient).movedim(-1, 1), torch.stack(codes, -1).flatten(-2), parts

    def _codes(self, latents: Tensor) -> Tensor:
        total, codes = torch.zeros_like(latents), []
        for level in self._levels():
            codes.append(level.latents_to_codes(latents - total))
            total = total + level.codes_to_latents(codes[-1])
        return torch.stack(codes, -1).flatten(-2)

    def _levels(self) -> Iterator[VectorQuantizer]:
        for level in self.levels:
            assert isinstance(level, VectorQuantizer)
            yield level


def build_vector_quantizer(config: QuantizerConfig) -> VectorQuantizer:
    """The quantizer of a checked config of one codebook."""
    if config.kind == "simvq":
        return LinearQuantizer(config)
    return MovingAverageQuantizer(config) if config.update == "ema" else GradientQuantizer(config)


def pass_gradient(vectors: Tensor, chosen: Tensor, gradient: Gradient) -> Tensor:
    """`chosen` to the bit, with a gradient for `vectors`, both `(..., C)`, and none for `chosen`.

    `rotation` takes the gradient through the rotation and the scaling, held fixed, that carry a vector to its code
    (arXiv 2410.06424, section 4).
    """
    if gradient == "straight_through":
        return straight_through(vectors, chosen)
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    return straight_through(rotate_to(vectors, chosen.detach()), chosen)


def nearest_codes(vectors: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Index of the nearest row of `codebook` `(V, C)` for each of `vectors` `(N, C)`: int64 `(N,)`.

    In slices, so that memory does not grow with N. With `cosine` both are unit vectors.
    """
    if not cosine:  # around 0 less is lost in |v - c|^2 = |v|^2 - 2 (v.c - |c|^2 / 2)
        centre = codebook.mean(0)
        vectors, codebook = vectors - centre, codebook - centre
    offsets = 0 if cosine else -0.5 * codebook.square().sum(-1)
    rows = max(1, MAX_DISTANCES // len(codebook))
    parts = vectors.contiguous().split(rows)
    return torch.cat([(part @ codebook.T + offsets).argmax(-1) for part in parts])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of the CPU and of `device` start from a seed, and are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
