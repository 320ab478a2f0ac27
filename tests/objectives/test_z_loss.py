"""The z-loss of logits that are all alike, in closed form: `(log V + c)^2` a token, over tokens that count."""

from __future__ import annotations

import math

import pytest
import torch

from mixmodal.objectives.loss import token_losses
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=9, num_sentinels=2))
V = VOCABULARY.size
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
WEIGHTS = torch.tensor([[1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0]])
# position t predicts token t + 1: weights 0.5 and 2 within the first document; the second's only target weighs 0
PREDICTING = torch.tensor([[0.5, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
LEVELS = torch.tensor([[1.5, -3.0, 90.0, 80.0, 70.0, 60.0, 50.0]])  # of all logits of a position


def test_only_tokens_that_count_have_a_z_loss() -> None:
    logits = LEVELS[..., None].expand(1, 7, V).clone().requires_grad_()
    found = token_losses(logits, torch.zeros(1, 7, dtype=torch.long), SEGMENTS, WEIGHTS, VOCABULARY, z_loss_weight=0.25)
    log_z = [math.log(V) + 1.5, math.log(V) - 3.0]
    expected = 0.5 * log_z[0] ** 2 + 2.0 * log_z[1] ** 2
    assert found.metrics["z_loss"].count == found.weight == 2.5
    assert found.metrics["z_loss"].total.item() == pytest.approx(expected, rel=1e-6)  # worst seen: 5e-8
    assert found.objective.item() == pytest.approx(2.5 * math.log(V) + 0.25 * expected, rel=1e-6)  # worst seen: 6e-8


def test_its_gradient_lowers_all_logits_of_a_position_alike() -> None:
    gradients = []
    for z_loss_weight in (0.0, 0.25):
        logits = LEVELS[..., None].expand(1, 7, V).clone().requires_grad_()
        tokens = torch.zeros(1, 7, dtype=torch.long)
        token_losses(logits, tokens, SEGMENTS, WEIGHTS, VOCABULARY, z_loss_weight).objective.backward()
        gradients.append(logits.grad)
    # d (w * 0.25 * log_z^2) / d logit = w * 0.25 * 2 * log_z * softmax, and the softmax is 1 / V
    log_z = math.log(V) + LEVELS
    expected = (PREDICTING * 0.5 * log_z / V)[..., None].expand(1, 7, V)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=0, atol=1e-6)  # worst seen: 1.5e-8
