"""Quantizers without a learned codebook: every latent dimension is rounded by itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.tokenization.quantizer_base import Quantizer, QuantizerConfig, straight_through

LEAST_PROBABILITY = 1e-12
"""Under the logarithm of an entropy: a code that no latent comes near would have an infinite gradient."""


class FiniteScalarQuantizer(Quantizer):
    """Each of C latent dimensions takes one of `levels[c]` values in [-1, 1] (arXiv 2309.15505)."""

    def __init__(self, config: QuantizerConfig) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__(math.prod(config.levels), len(config.levels), part_weights={})
        self.fsq = FSQ(list(config.levels))

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(codes)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        through, codes = self.fsq(latents)
        return straight_through(through, self.codes_to_latents(codes)), codes.long(), {}

    def _codes(self, latents: Tensor) -> Tensor:
        return self.fsq(latents)[1].long()


class LookupFreeQuantizer(Quantizer):
    """The sign of each latent dimension, -1 or 1: the first dimension is the highest bit (arXiv 2310.05737).

    `LFQ` of vector-quantize-pytorch gives the same codes and the same loss, and is the reference of the tests. It is
    not called, for three reasons: it holds a probability for every latent and code, it drops the result of its
    reduction over ranks, and its logarithm stops at 1e-5, above the share of each of 2**17 evenly used codes.
    """

    place_values: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        dim = config.codebook_dim
        weights = {
            "commitment": config.commitment_weight,
            "entropy": config.entropy_weight,
            "codebook_entropy": -config.entropy_weight * config.diversity_weight,
        }
        super().__init__(2**dim, dim, weights)
        self.temperature = config.entropy_temperature
        self.register_buffer("place_values", 2 ** torch.arange(dim - 1, -1, -1), persistent=False)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] & self.place_values) > 0
        return (2.0 * bits.float() - 1.0).movedim(-1, 1)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes = self._codes(latents)
        chosen = self.codes_to_latents(codes)
        entropy, codebook_entropy = self.entropies(latents)
        parts = {
            "commitment": F.mse_loss(latents, chosen),
            "entropy": entropy,
            "codebook_entropy": codebook_entropy,
        }
        return straight_through(latents, chosen), codes, parts

    def _codes(self, latents: Tensor) -> Tensor:
        return ((latents > 0).movedim(1, -1) * self.place_values).sum(-1)

    def entropies(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of the code of a latent, and entropy of the mean probabilities of the codes, both in nats.

        The probabilities are a softmax over codes c of `2 <x, c> / temperature` (arXiv 2310.05737, section 3.2), which
        is a product over dimensions: every bit is set with probability `sigmoid(4 x / temperature)`. In training the
        second entropy is that of the batch of all ranks.
        """
        logits = latents.movedim(1, -1).flatten(0, -2) * (4.0 / self.temperature)  # (N, C)
        size = logits.abs()
        entropy = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(-1).mean()
        half = logits.shape[-1] // 2
        shares = product_probabilities(logits[:, :half]).T @ product_probabilities(logits[:, half:]) / len(logits)
        if self.training:
            shares = mean_over_ranks(shares)
        return entropy, -(shares * shares.clamp_min(LEAST_PROBABILITY).log()).sum()


def product_probabilities(logits: Tensor) -> Tensor:
    """Probabilities `(N, 2**C)` of all patterns of C independent bits with these logits `(N, C)`, first bit highest."""
    found = logits.new_ones(len(logits), 1)
    for one in logits.unbind(-1):
        bit = torch.stack([torch.sigmoid(-one), torch.sigmoid(one)], dim=-1)
        found = (found[:, :, None] * bit[:, None, :]).flatten(1)
    return found


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over all ranks, with the gradient of this rank's own share alone.

    Gradients of ranks are averaged afterwards, so a function of this mean gets the gradient of the whole.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    mean = values.detach().clone()
    torch.distributed.all_reduce(mean)
    return straight_through(values, mean / torch.distributed.get_world_size())
