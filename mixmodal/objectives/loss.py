"""The loss over logits: sums and counts per modality, never means, so that rows, ranks and micro-batches add up.

z-loss as in PaLM (arXiv 2204.02311, section 5) and Chameleon (arXiv 2405.09818, section 2.3.2): `log(Z)^2` with
`Z = sum_v exp(logit_v)`, here summed with the same weights as the cross entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixmodal.vocabulary import Vocabulary


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


def target_weights(segment_ids: Tensor, loss_weights: Tensor) -> Tensor:
    """The weight of predicting each token, `(B, T)` float32: zero where nothing of the same document stands before it.

    Args:
        segment_ids: `(B, T)`, 1, 2, 3 .. for the documents of a row, 0 for padding.
        loss_weights: `(B, T)`, the weight of predicting each token where it can be predicted.
    """
    predictable = torch.zeros_like(segment_ids, dtype=torch.bool)
    predictable[:, 1:] = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return loss_weights.float() * predictable


def next_token_targets(tokens: Tensor, segment_ids: Tensor, loss_weights: Tensor) -> tuple[Tensor, Tensor]:
    """What each position predicts and the weight of it, `(B, T)` each; the last column predicts nothing.

    Targets move to the logits instead of the logits to the targets: a slice of the logits would be a copy of them.
    """
    return tokens.roll(-1, dims=1), target_weights(segment_ids, loss_weights).roll(-1, dims=1)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """`weights * values`, and 0 where the weight is 0: a masked logit of -inf must not give 0 * inf."""
    return torch.where(weights != 0, weights * values, 0.0)


def sum_losses(nll: Tensor, log_z: Tensor, targets: Tensor, weights: Tensor, vocabulary: Vocabulary) -> TokenLosses:
    """Sums of negative log-likelihoods and log-partitions `(B, T)` of `targets`; the objective is without z-loss."""
    weighted_nll = weighted(nll, weights)
    weight, loss = weights.sum(), weighted_nll.sum()
    z_loss = weighted(log_z.detach().square(), weights).sum()
    metrics = {"loss": Sums(loss.detach(), weight), "z_loss": Sums(z_loss, weight)}
    kinds = {name: vocabulary.contains(name, targets) for name in vocabulary.modalities}
    kinds["control"] = ~vocabulary.is_content(targets)
    for name, chosen in kinds.items():
        metrics[f"loss_{name}"] = Sums((weighted_nll.detach() * chosen).sum(), (weights * chosen).sum())
    return TokenLosses(objective=loss, weight=weight, metrics=metrics)


def token_losses(
    logits: Tensor,
    tokens: Tensor,
    segment_ids: Tensor,
    loss_weights: Tensor,
    vocabulary: Vocabulary,
    z_loss_weight: float = 0.0,
) -> TokenLosses:
    """Next-token loss of packed rows: the logits at position t - 1 predict the token at t.

    This is the definition, over all logits at once. Training takes the same from `output_loss.OutputLoss`.

    Args:
        logits: `(B, T, V)` of any floating type; the last column predicts nothing.
        tokens: ids `(B, T)`.
        segment_ids: `(B, T)`, 0 for padding; no token is predicted from another segment.
        loss_weights: `(B, T)`, the weight of predicting each token.
        vocabulary: tells which modality a token is of.
        z_loss_weight: factor of `logZ^2`.
    """
    targets, weights = next_token_targets(tokens, segment_ids, loss_weights)
    # gradients of -inf are not numbers even where a weight of 0 follows
    logits = torch.where(weights[..., None] != 0, logits.float(), 0.0)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, targets[..., None]).squeeze(-1)
    found = sum_losses(nll, log_z, targets, weights, vocabulary)
    return found._replace(objective=found.objective + z_loss_weight * weighted(log_z.square(), weights).sum())
