"""The loss over logits: closed forms, gradients, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixmodal.objectives.loss import target_weights, token_losses
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=9, num_sentinels=2))
V = VOCABULARY.size
T = VOCABULARY.ids("text").start


def packed_rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `(3, 11, V)`, tokens, segment ids with two documents and padding in each row, and loss weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 11, V, generator=generator)
    tokens = torch.randint(V, (3, 11), generator=generator)
    segment_ids = torch.tensor([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [1] * 2 + [2] * 2 + [0] * 7])
    loss_weights = torch.randint(3, (3, 11), generator=generator) / 2
    return logits, tokens, segment_ids, loss_weights


def naive(logits: Tensor, tokens: Tensor, segment_ids: Tensor, weights: Tensor, z_loss_weight: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(tokens)):
        for t in range(1, tokens.shape[1]):
            if segment_ids[row, t] and segment_ids[row, t] == segment_ids[row, t - 1]:
                log_z = logits[row, t - 1].double().exp().sum().log()
                nll = log_z - logits[row, t - 1, tokens[row, t]].double()
                total = total + weights[row, t] * (nll + z_loss_weight * log_z**2)
    return total


def test_uniform_logits_cost_the_log_of_the_vocabulary() -> None:
    tokens = torch.tensor([[0, T, T + 1, 2]])
    found = token_losses(torch.full((1, 4, V), 1.5), tokens, torch.ones(1, 4), torch.ones(1, 4), VOCABULARY, 0.25)
    log_z = math.log(V) + 1.5
    assert found.weight == 3
    assert found.metrics["loss"].total == pytest.approx(3 * math.log(V), rel=1e-6)  # measured 5e-8
    assert found.metrics["z_loss"].total == pytest.approx(3 * log_z**2, rel=1e-6)  # measured 1.3e-7
    assert found.objective == pytest.approx(3 * math.log(V) + 0.75 * log_z**2, rel=1e-6)  # measured 1.0e-7


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_value_and_gradient_are_the_naive_formula_s(z_loss_weight: float) -> None:
    logits, *rest = packed_rows()
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = token_losses(ours, *rest, VOCABULARY, z_loss_weight).objective
    expected = naive(theirs, *rest, z_loss_weight)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # measured 2.5e-8
    assert (ours.grad - theirs.grad).abs().max() < 2e-6  # type: ignore[operator]  # measured 8.4e-7


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, *rest = packed_rows()
    half = logits.bfloat16().requires_grad_()
    found = token_losses(half, *rest, VOCABULARY, 0.1)
    assert found.objective.dtype == torch.float32
    expected = token_losses(half.detach().float(), *rest, VOCABULARY, 0.1)
    assert torch.equal(found.objective.detach(), expected.objective)
    found.objective.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_each_valid_token_weighs_the_same() -> None:
    _, tokens, segment_ids, _ = packed_rows()
    # The token that stands in a short document of a padded row costs what it costs in a full row.
    logits = torch.zeros(3, 11, V, requires_grad=True)
    found = token_losses(logits, tokens, segment_ids, torch.ones(3, 11), VOCABULARY)
    (found.objective / found.weight).backward()
    counted = target_weights(segment_ids, torch.ones(3, 11)).roll(-1, dims=1) > 0
    norms = logits.grad.norm(dim=-1)  # type: ignore[union-attr]
    assert counted.sum() == found.weight == 3 + 4 + 10 + 1 + 1
    torch.testing.assert_close(norms[counted], norms[counted][:1].expand(19), rtol=1e-5, atol=0)  # measured 0
    assert (norms[~counted] == 0).all()


def test_rows_in_one_batch_or_in_several_add_to_the_same() -> None:
    rows = packed_rows()
    whole = token_losses(*rows, VOCABULARY, 0.1)
    parts = [token_losses(*(tensor[i : i + 1] for tensor in rows), VOCABULARY, 0.1) for i in range(3)]
    assert whole.weight == sum(part.weight for part in parts)
    assert whole.objective.item() == pytest.approx(sum(part.objective.item() for part in parts), rel=1e-6)  # 1.3e-8
    for name, sums in whole.metrics.items():
        added = sum(part.metrics[name].total.item() for part in parts)
        assert sums.total.item() == pytest.approx(added, rel=1e-6)  # measured 4.7e-8


def test_padding_changes_nothing() -> None:
    logits, tokens, segment_ids, weights = packed_rows()
    more = torch.nn.functional.pad
    padded = token_losses(
        more(logits, (0, 0, 0, 5), value=float("-inf")),
        more(tokens, (0, 5), value=VOCABULARY.pad),
        more(segment_ids, (0, 5)),
        more(weights, (0, 5), value=1.0),
        VOCABULARY,
        0.1,
    )
    plain = token_losses(logits, tokens, segment_ids, weights, VOCABULARY, 0.1)
    assert padded.weight == plain.weight
    assert padded.objective.item() == pytest.approx(plain.objective.item(), rel=1e-6)  # measured 0
    for name, sums in plain.metrics.items():
        assert padded.metrics[name].total.item() == pytest.approx(sums.total.item(), rel=1e-6)  # measured 0


def test_modality_sums_add_to_the_total() -> None:
    found = token_losses(*packed_rows(), VOCABULARY)
    parts = [found.metrics[f"loss_{name}"] for name in ("text", "image", "control")]
    assert all(part.count > 0 for part in parts)
    assert sum(part.count for part in parts) == found.weight
    added = sum(part.total.item() for part in parts)
    assert added == pytest.approx(found.metrics["loss"].total.item(), rel=1e-6)  # measured 1.3e-8
    assert set(found.metrics) == {"loss", "z_loss", "loss_text", "loss_image", "loss_control"}


def test_a_masked_logit_where_nothing_is_learned_is_harmless() -> None:
    logits, tokens, segment_ids, weights = packed_rows()
    weights[0, 1] = 0
    logits[0, 0, tokens[0, 1]] = float("-inf")
    logits.requires_grad_()
    objective = token_losses(logits, tokens, segment_ids, weights, VOCABULARY, 0.1).objective
    objective.backward()
    assert objective.isfinite()
    assert logits.grad.isfinite().all()  # type: ignore[union-attr]


def test_a_document_s_first_token_is_never_a_target() -> None:
    segment_ids = torch.tensor([[1, 1, 2, 2, 2, 0, 0]])
    assert target_weights(segment_ids, torch.ones(1, 7)).tolist() == [[0, 1, 0, 1, 1, 0, 0]]


def test_metrics_carry_no_graph() -> None:
    logits, *rest = packed_rows()
    found = token_losses(logits.requires_grad_(), *rest, VOCABULARY, 0.1)
    assert not any(value.requires_grad for sums in found.metrics.values() for value in sums)
    assert found.objective.requires_grad
