"""Loss weights by what is predicted: the balance between modalities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixmodal.vocabulary import Vocabulary

CONTROL = "control"
"""Names the tokens that are neither text nor a code, as in the metrics of `token_losses`."""


def check_modality_weights(factors: Mapping[str, float], vocabulary: Vocabulary) -> None:
    """Whether the factors can act.

    Raises:
        ValueError: naming the key, for a modality that the vocabulary does not have, or a factor below 0.
    """
    names = (*vocabulary.modalities, CONTROL)
    for name, factor in factors.items():
        if name not in names:
            raise ValueError(f"modality_weights.{name}: the vocabulary has no such modality; it has {', '.join(names)}")
        if not 0 <= factor < float("inf"):
            raise ValueError(f"modality_weights.{name} is {factor}; it must be a number that is not negative")


def weigh_modalities(
    loss_weights: Tensor, tokens: Tensor, factors: Mapping[str, float], vocabulary: Vocabulary
) -> Tensor:
    """Loss weights `(B, T)` times the factor of what each token is; a modality without a factor keeps its weights.

    Args:
        loss_weights: `(B, T)`, the weight of predicting each token.
        tokens: ids `(B, T)`.
        factors: by modality, or `control`.
        vocabulary: tells which modality a token is of.
    """
    for name, factor in factors.items():
        chosen = ~vocabulary.is_content(tokens) if name == CONTROL else vocabulary.contains(name, tokens)
        loss_weights = torch.where(chosen, loss_weights * factor, loss_weights)
    return loss_weights
