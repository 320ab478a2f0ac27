"""Contrastive losses over pairs of texts and pictures: sums over pairs, with the pictures and texts of all ranks.

In a batch of N pairs each text is told from the N - 1 pictures that are not its own, and each picture from the texts.
A batch is one micro-batch of every rank: features are gathered with their gradient, so that W ranks with B pairs each
train as one rank with W * B pairs. Accumulation adds up such batches and gives none of them further negatives.

Shape suffixes: B pairs of this rank, N pairs of all ranks, D features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Features of length 1 of this rank's pairs, and what they are compared with.

    Args:
        text_BD: of the texts.
        image_BD: of the pictures.
        all_text_ND: of the texts of all ranks, in the order of ranks.
        all_image_ND: of their pictures.
        first: where this rank's pairs begin among those of all ranks.
        excluded_BN: other pairs that are no negatives of a pair, bool; None where there are none.
    """

    text_BD: Tensor
    image_BD: Tensor
    all_text_ND: Tensor
    all_image_ND: Tensor
    first: int = 0
    excluded_BN: Tensor | None = None

    @property
    def own_B(self) -> Tensor:
        """Place of each pair of this rank among those of all ranks."""
        return torch.arange(self.first, self.first + len(self.text_BD), device=self.text_BD.device)


def gather_pairs(text_BD: Tensor, image_BD: Tensor, caption_ids_B: Tensor | None = None) -> Pairs:
    """Brings the features of all ranks together, each of which has as many pairs. A collective, in backward as well.

    Args:
        text_BD: float32, of length 1.
        image_BD: float32, of length 1.
        caption_ids_B: int64, the same for the same caption: such pairs are then not each other's negatives.
    """
    everyone = gather_rows(text_BD), gather_rows(image_BD)
    first = dist.get_rank() * len(text_BD) if is_shared() else 0
    pairs = Pairs(text_BD, image_BD, *everyone, first)
    if caption_ids_B is None:
        return pairs
    return pairs._replace(excluded_BN=same_captions(caption_ids_B, gather_rows(caption_ids_B), first))


def same_captions(caption_ids_B: Tensor, all_caption_ids_N: Tensor, first: int) -> Tensor:
    """`(B, N)` bool: the other pairs that have a pair's caption."""
    same_BN = caption_ids_B[:, None] == all_caption_ids_N[None, :]
    rows = torch.arange(len(caption_ids_B), device=same_BN.device)
    same_BN[rows, first + rows] = False
    return same_BN


def infonce_loss(pairs: Pairs, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3), summed over the pairs of this rank.

    Of a pair it is the mean of two cross entropies: of its text over all pictures, of its picture over all texts.

    Args:
        pairs: from `gather_pairs`.
        scale: scalar, the inverse temperature.
    """
    total = scale.new_zeros(())
    for queries_BD, candidates_ND in ((pairs.text_BD, pairs.all_image_ND), (pairs.image_BD, pairs.all_text_ND)):
        logits_BN = scale * (queries_BD @ candidates_ND.T)
        if pairs.excluded_BN is not None:
            logits_BN = logits_BN.masked_fill(pairs.excluded_BN, -torch.inf)
        total = total + F.cross_entropy(logits_BN, pairs.own_B, reduction="sum") / 2
    return total


def sigmoid_loss(pairs: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, equation 1), summed over the texts of this rank.

    Every text with every picture is a question of its own: does the picture belong to it? Of a text it is the sum over
    all pictures, so that the mean over texts is that of the paper.

    Args:
        pairs: from `gather_pairs`.
        scale: scalar, the inverse temperature.
        bias: scalar, added to all logits.
    """
    logits_BN = scale * (pairs.text_BD @ pairs.all_image_ND.T) + bias
    signs_BN = torch.full_like(logits_BN, -1.0).scatter(1, pairs.own_B[:, None], 1.0)
    nll_BN = -F.logsigmoid(signs_BN * logits_BN)
    if pairs.excluded_BN is not None:
        nll_BN = nll_BN.masked_fill(pairs.excluded_BN, 0.0)
    return nll_BN.sum()


def clamp_above(value: Tensor, most: float) -> Tensor:
    """`value`, or `most` where that is less. There, gradients that lead further up are dropped, others pass.

    `torch.clamp` drops both: a value that has once come above would never return.
    """
    return _ClampAbove.apply(value, most)


class _ClampAbove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(value >= most)
        return value.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (full,) = ctx.saved_tensors
        return grad.masked_fill(full & (grad < 0), 0.0), None


def is_shared() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """`(B, ...)` of every rank as `(N, ...)`, in the order of ranks; gradients go back to the rank of their row."""
    if not is_shared():
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        summed = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.size
        return summed[first : first + ctx.size]
