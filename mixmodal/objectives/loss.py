"""The loss over logits: sums and counts per modality, never means, so that rows, ranks and micro-batches add up.

z-loss as in PaLM (arXiv 2204.02311, section 5) and Chameleon (arXiv 2405.09818, section 2.3.2): `log(Z)^2` with
`Z = sum_v exp(logit_v)`, here summed with the same weights as the cross entropy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixmodal.vocabulary import Vocabulary

CHUNK_ELEMENTS = 2**24
"""Logits that are turned to float32 at a time: 64 MiB of temporaries."""


class Sums(NamedTuple):
    """A weighted sum and the sum of its weights, scalars, float32 and detached; their quotient is the mean."""

    total: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.count, which nobody wants here


class TokenLosses(NamedTuple):
    """What a step needs: the sum to minimise, its weight, and sums to report.

    Args:
        objective: scalar float32 with gradient, `sum w * (nll + z_loss_weight * logZ^2)`.
        weight: scalar float32, `sum w`; the gradient of the mean is the gradient of `objective` over all `weight`s.
        metrics: `loss`, `z_loss` (not scaled by its weight), and the loss by what is predicted: `loss_text`,
            `loss_image` for every modality of the vocabulary, `loss_control` for control tokens; these add to `loss`.
    """

    objective: Tensor
    weight: Tensor
    metrics: dict[str, Sums]


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood and log-partition of each row, by chunks of rows in both directions.

    Autograd's own log-softmax keeps a float32 copy of all logits; here one chunk is in flight, and the only large
    tensor made is the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        log_z = torch.empty_like(nll)
        for rows in _chunks(logits):
            chunk = logits[rows].float()
            log_z[rows] = torch.logsumexp(chunk, dim=-1)
            nll[rows] = log_z[rows] - chunk.gather(-1, targets[rows, None]).squeeze(-1)
        ctx.save_for_backward(logits, targets, log_z)
        return nll, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets, log_z = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            # d log_z / d logits = softmax; d nll / d logits = softmax - one_hot(target)
            chunk = (logits[rows].float() - log_z[rows, None]).exp_()
            chunk *= (grad_nll[rows] + grad_log_z[rows])[:, None]
            chunk.scatter_add_(-1, targets[rows, None], -grad_nll[rows, None])
            grad[rows] = chunk
        return grad, None


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target and log-partition of each row, in nats, float32.

    Args:
        logits: `(..., V)` of any floating type.
        targets: ids `(...)`, int64.

    Returns:
        two tensors `(...)`, both differentiable once.
    """
    nll, log_z = _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))  # type: ignore[misc]
    return nll.view(targets.shape), log_z.view(targets.shape)


def target_weights(segment_ids: Tensor, loss_weights: Tensor) -> Tensor:
    """The weight of predicting each token, `(B, T)` float32: zero where nothing of the same document stands before it.

    Args:
        segment_ids: `(B, T)`, 1, 2, 3 .. for the documents of a row, 0 for padding.
        loss_weights: `(B, T)`, the weight of predicting each token where it can be predicted.
    """
    predictable = torch.zeros_like(segment_ids, dtype=torch.bool)
    predictable[:, 1:] = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return loss_weights.float() * predictable


def token_losses(
    logits: Tensor,
    tokens: Tensor,
    segment_ids: Tensor,
    loss_weights: Tensor,
    vocabulary: Vocabulary,
    z_loss_weight: float = 0.0,
) -> TokenLosses:
    """Next-token loss of packed rows: the logits at position t - 1 predict the token at t.

    Args:
        logits: `(B, T, V)`; the last column predicts nothing.
        tokens: ids `(B, T)`.
        segment_ids: `(B, T)`, 0 for padding; no token is predicted from another segment.
        loss_weights: `(B, T)`, the weight of predicting each token.
        vocabulary: tells which modality a token is of.
        z_loss_weight: factor of `logZ^2`.
    """
    # Targets move to the logits instead of the logits to the targets: a slice of the logits would be a copy of them.
    targets = tokens.roll(-1, dims=1)
    weights = target_weights(segment_ids, loss_weights).roll(-1, dims=1)
    nll, log_z = cross_entropy(logits, targets)
    # Not `weights * nll`: a masked logit of -inf at a position that does not count must not give 0 * inf.
    weighted_nll = torch.where(weights != 0, weights * nll, 0.0)
    weighted_z = torch.where(weights != 0, weights * log_z.square(), 0.0)
    weight = weights.sum()
    loss, z_loss = weighted_nll.sum(), weighted_z.sum()
    metrics = {"loss": Sums(loss.detach(), weight), "z_loss": Sums(z_loss.detach(), weight)}
    kinds = {name: vocabulary.contains(name, targets) for name in vocabulary.modalities}
    kinds["control"] = ~vocabulary.is_content(targets)
    for name, chosen in kinds.items():
        metrics[f"loss_{name}"] = Sums((weighted_nll.detach() * chosen).sum(), (weights * chosen).sum())
    return TokenLosses(objective=loss + z_loss_weight * z_loss, weight=weight, metrics=metrics)
