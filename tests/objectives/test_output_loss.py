"""Output layer and loss by chunks: equal to `token_losses` over all logits, without ever having them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.objectives import output_loss as module
from mixmodal.objectives.loss import TokenLosses, token_losses
from mixmodal.objectives.output_loss import OutputLoss
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=9, num_sentinels=2))
V, D = VOCABULARY.size, 6


def packed_rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `(3, 11)`, segment ids with documents and padding, and loss weights of 0, 0.5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (3, 11), generator=generator)
    segment_ids = torch.tensor([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [1] * 2 + [2] * 2 + [0] * 7])
    return tokens, segment_ids, torch.randint(3, (3, 11), generator=generator) / 2


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states `(3, 11, D)` and a matrix `(V, D)`, with gradients."""
    generator = torch.Generator().manual_seed(1)
    pair = (torch.randn(3, 11, D, generator=generator), torch.randn(V, D, generator=generator))
    return tuple(tensor.to(dtype).requires_grad_() for tensor in pair)  # type: ignore[return-value]


def ours(hidden: Tensor, weight: Tensor, z_loss_weight: float, measure: bool = False) -> TokenLosses:
    loss = OutputLoss(*packed_rows(), VOCABULARY, z_loss_weight, measure=measure)
    return loss.collect(loss(hidden, weight))


def whole(hidden: Tensor, weight: Tensor, z_loss_weight: float) -> TokenLosses:
    return token_losses((hidden @ weight.t()).float(), *packed_rows(), VOCABULARY, z_loss_weight)


def gradients(loss: Callable[..., TokenLosses], dtype: torch.dtype, *rest: Any) -> tuple[TokenLosses, Tensor, Tensor]:
    hidden, weight = states(dtype)
    found = loss(hidden, weight, *rest)
    (found.objective / 3).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    return found, hidden.grad.double(), weight.grad.double()


@pytest.mark.parametrize("rows_in_chunk", [1, 4, 1000])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize(
    # worst seen, of gradients up to 2.4: 7.2e-7, and 0.016 in bfloat16 (2^-6: one rounding at another place)
    ("dtype", "tolerance"),
    [(torch.float32, 3e-6), (torch.bfloat16, 0.04)],
)
def test_value_and_gradients_are_those_over_all_logits(
    monkeypatch: pytest.MonkeyPatch, rows_in_chunk: int, z_loss_weight: float, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": rows_in_chunk * V})
    found, *found_grads = gradients(ours, dtype, z_loss_weight)
    expected, *expected_grads = gradients(whole, dtype, z_loss_weight)
    assert found.objective.item() == pytest.approx(expected.objective.item(), rel=1e-6)
    assert found.weight == expected.weight
    for ours_, theirs in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_, theirs, atol=tolerance, rtol=0)
    assert set(found.metrics) == set(expected.metrics)
    for name, sums in expected.metrics.items():
        assert found.metrics[name].total.item() == pytest.approx(sums.total.item(), rel=1e-6), name
        assert found.metrics[name].count == sums.count


def test_rows_without_values_to_read_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, *grads = gradients(ours, torch.float32, 0.1, True)
    monkeypatch.setattr(module, "is_readable", lambda tensor: False)  # as on an accelerator
    found, *others = gradients(ours, torch.float32, 0.1, True)
    torch.testing.assert_close(others, grads, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.objective, expected.objective)
    torch.testing.assert_close(found.metrics["logit_norm"], expected.metrics["logit_norm"])


def test_logits_are_measured_wherever_there_is_a_token() -> None:
    hidden, weight = states()
    total, count = ours(hidden, weight, 0.0, measure=True).metrics["logit_norm"]
    real = packed_rows()[1] != 0
    assert count == real.sum()
    torch.testing.assert_close(total, (hidden @ weight.t()).norm(dim=-1)[real].sum())
    assert "logit_norm" not in ours(hidden, weight, 0.0).metrics


def test_autocast_computes_products_in_its_type() -> None:
    hidden, weight = states()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(hidden, weight, 0.1)
    found.objective.backward()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    torch.testing.assert_close(found.objective, ours(*low, 0.1).objective)
    assert found.objective != ours(hidden, weight, 0.1).objective
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_frequent_targets_do_not_overflow_float16_nor_rare_ones_vanish() -> None:
    tokens = torch.zeros(1, 8193, dtype=torch.int64)
    tokens[0, -1] = 7
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8193, 4, generator=generator)
    weight = torch.randn(V, 4, generator=generator) * 0.3
    hidden[..., 0], weight[:, 0] = 20, 0  # summed over 8192 targets 0: 1.6e5, above float16's 65504
    weight[3, 0] = -0.65  # a probability of 1e-7, near the smallest number above 0
    rest = (tokens, torch.ones_like(tokens), torch.ones(1, 8193), VOCABULARY)
    grads = []
    for dtype in (torch.float16, torch.float64):
        pair = hidden.half().to(dtype).requires_grad_(), weight.half().to(dtype).requires_grad_()
        if dtype == torch.float16:
            loss = OutputLoss(*rest)
            objective = loss(*pair)[0]
        else:
            logits = (pair[0] @ pair[1].t())[0, :-1]
            objective = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        (objective / 2**13).backward()  # the loss scale comes behind
        assert pair[1].grad is not None
        grads.append(pair[1].grad.double())
    found, expected = grads
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.03  # worst seen 0.020, of the rare one: its logit is -13, rounded to 2^-8


def test_a_frozen_matrix_gets_no_gradient() -> None:
    hidden, weight = states()
    ours(hidden, weight.detach(), 0.1).objective.backward()
    expected = gradients(ours, torch.float32, 0.1)[1] * 3
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), expected)
    with torch.no_grad():
        assert not ours(hidden, weight, 0.1).objective.requires_grad


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = states()
    expected = ours(hidden, weight, 0.1).objective
    monkeypatch.setattr(module._Gradients, "add", lambda *_: pytest.fail("a gradient for nobody"))
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden, weight, 0.1).objective, expected.detach())


def test_a_row_of_padding_alone_costs_nothing() -> None:
    hidden, weight = states()
    tokens, segment_ids, weights = packed_rows()
    loss = OutputLoss(tokens, torch.zeros_like(segment_ids), weights, VOCABULARY)
    found = loss.collect(loss(hidden, weight))
    found.objective.backward()
    assert (found.objective, found.weight) == (0, 0)
    assert not weight.grad.any()  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """The most elements that any tensor made by an operator has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch, trains: bool, tied: bool) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 3 * V})
    shape = TransformerConfig(vocab_size=V, dim=4, num_layers=1, num_heads=1, ffn_dim=4, tie_embeddings=tied)
    model, (tokens, segment_ids, weights) = Transformer(shape), packed_rows()
    loss = OutputLoss(tokens, segment_ids, weights, VOCABULARY, 0.1, measure=True)
    with Largest() as largest, torch.set_grad_enabled(trains):
        found = loss.collect(model(tokens, reduce=loss))
        if trains:
            found.objective.backward()
    assert largest.size < tokens.numel() * V / 2
    with Largest() as largest:
        model(tokens)
    assert largest.size >= tokens.numel() * V
