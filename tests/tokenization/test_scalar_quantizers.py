"""Quantizers that round each dimension: their values, their gradients, and the entropy loss of the lookup-free one."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from mixmodal.tokenization.quantizer import build_quantizer
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer, mean_over_ranks

Draw = Callable[..., Tensor]


def build_lfq(**fields: object) -> LookupFreeQuantizer:
    quantizer = build_quantizer(QuantizerConfig(kind="lfq", **{"codebook_dim": 4, **fields}))  # type: ignore[arg-type]
    assert isinstance(quantizer, LookupFreeQuantizer)
    return quantizer


def test_the_values_of_fsq_are_its_levels() -> None:
    quantizer = build_quantizer(QuantizerConfig(kind="fsq", levels=(8, 6, 5, 4)))
    assert quantizer.codebook_size == 960
    latents = quantizer.codes_to_latents(torch.arange(960).view(-1, 1, 1)).flatten(1)
    assert len(torch.unique(latents, dim=0)) == 960
    assert [len(values.unique()) for values in latents.unbind(-1)] == [8, 6, 5, 4]
    assert latents.abs().max() == 1


def test_gradients_pass_the_rounding_of_fsq_straight_through(draw_latents: Draw) -> None:
    quantizer = build_quantizer(QuantizerConfig(kind="fsq", levels=(8, 6, 5, 4)))
    assert isinstance(quantizer, FiniteScalarQuantizer)
    latents, direction = draw_latents().requires_grad_(), draw_latents(seed=1)
    (quantizer.train()(latents).latents * direction).sum().backward()
    probe = draw_latents().requires_grad_()
    levels = torch.tensor([8, 6, 5, 4]).view(1, -1, 1, 1)
    half = (levels - 1) * 1.001 / 2
    shift = torch.atanh(torch.where(levels % 2 == 0, 0.5, 0.0) / half)
    through = torch.tanh(probe + shift) * half / (levels // 2)  # arXiv 2309.15505, appendix A.1, without rounding
    (through * direction).sum().backward()
    torch.testing.assert_close(latents.grad, probe.grad, rtol=0, atol=2e-5)  # measured worst difference: 5e-7


def test_the_code_of_lfq_is_its_signs(draw_latents: Draw) -> None:
    quantizer = build_lfq()
    latents = torch.tensor([0.1, -3.0, 2.0, -0.5]).view(1, 4, 1, 1)
    assert quantizer.latents_to_codes(latents).item() == 0b1010
    every = torch.arange(16).view(-1, 1, 1)
    assert torch.equal(quantizer.latents_to_codes(quantizer.codes_to_latents(every)), every)
    latents, direction = draw_latents().requires_grad_(), draw_latents(seed=1)
    found = quantizer.train()(latents)
    assert torch.equal(found.latents.detach(), torch.where(latents > 0, 1.0, -1.0))
    (found.latents * direction).sum().backward()
    torch.testing.assert_close(latents.grad, direction, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_lfq_gives_the_codes_and_the_loss_of_the_library(dim: int) -> None:
    from vector_quantize_pytorch import LFQ

    weights = {"entropy_weight": 0.3, "diversity_weight": 2.0, "commitment_weight": 0.5}
    quantizer = build_lfq(codebook_dim=dim, entropy_temperature=1.0, **weights).train()
    library = LFQ(dim=dim, entropy_loss_weight=0.3, diversity_gamma=2.0, commitment_loss_weight=0.5).train()
    latents = torch.randn(8, dim, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = latents.detach().clone().requires_grad_()
    found = quantizer(latents)
    (values, codes, loss), parts = library(other, inv_temperature=1.0, return_loss_breakdown=True)
    assert torch.equal(found.codes, codes.long())
    assert torch.equal(found.latents.detach(), torch.where(other > 0, 1.0, -1.0))
    torch.testing.assert_close(values, found.latents, rtol=0, atol=1e-6)
    expected = {
        "commitment": parts.commitment,
        "entropy": parts.per_sample_entropy,
        "codebook_entropy": parts.batch_entropy,
    }
    for name, value in expected.items():  # the library's logarithm stops at 1e-5
        torch.testing.assert_close(found.parts[name], value, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-4)
    found.loss.backward()
    loss.backward()
    torch.testing.assert_close(latents.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_the_entropies_of_lfq_reach_their_bounds() -> None:
    quantizer = build_lfq(codebook_dim=6).train()
    every = quantizer.codes_to_latents(torch.arange(64).view(-1, 1, 1))
    entropy, codebook_entropy = quantizer.entropies(every)
    assert float(entropy) == pytest.approx(0, abs=1e-6)  # each certain
    assert float(codebook_entropy) == pytest.approx(math.log(64), rel=1e-5)  # all evenly used
    entropy, codebook_entropy = quantizer.entropies(torch.zeros(5, 6, 1, 1))
    assert [float(entropy), float(codebook_entropy)] == pytest.approx([math.log(64)] * 2, rel=1e-5)  # none certain
    entropy, codebook_entropy = quantizer.entropies(every[:1].expand(5, -1, -1, -1))
    assert float(codebook_entropy) == pytest.approx(0, abs=1e-6)  # one code for all


def test_the_gradients_of_the_entropies_are_finite_far_from_every_border() -> None:
    quantizer = build_lfq(codebook_dim=18).train()
    latents = torch.full((2, 18, 2, 2), 50.0).requires_grad_()
    quantizer(latents).loss.backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()


def test_the_entropy_loss_spreads_the_codes() -> None:
    def used_after(entropy_weight: float) -> int:
        quantizer = build_lfq(
            codebook_dim=6, entropy_weight=entropy_weight, **({"entropy_temperature": 1.0} if entropy_weight else {})
        )
        generator = torch.Generator().manual_seed(0)
        latents = (0.3 * torch.randn(16, 6, 3, 3, generator=generator) + 0.5).requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            quantizer.train()(latents).loss.backward()
            optimizer.step()
        return len(quantizer.latents_to_codes(latents).unique())

    assert used_after(0.0) < 16 < 40 < used_after(1.0)


def test_the_mean_over_ranks_has_the_gradient_of_the_whole() -> None:
    """Two ranks by hand: the mean of both ranks' gradients is that of the entropy of their mean."""
    first, second = torch.tensor([0.7, 0.3]), torch.tensor([0.1, 0.9])
    weights = [torch.tensor(1.0, requires_grad=True) for _ in range(3)]

    def entropy(shares: Tensor) -> Tensor:
        return -(shares * shares.log()).sum()

    def softened(shares: Tensor, weight: Tensor) -> Tensor:
        return (shares.log() * weight).softmax(-1)

    entropy((softened(first, weights[0]) + softened(second, weights[0])) / 2).backward()
    for own, other, weight in ((first, second, weights[1]), (second, first, weights[2])):
        with (
            mock.patch("torch.distributed.is_initialized", return_value=True),
            mock.patch("torch.distributed.get_world_size", return_value=2),
            mock.patch("torch.distributed.all_reduce", side_effect=lambda mean, other=other: mean.add_(other)),
        ):
            entropy(mean_over_ranks(softened(own, weight))).backward()
    assert weights[0].grad is not None
    found = sum(float(weight.grad) for weight in weights[1:] if weight.grad is not None) / 2
    assert found == pytest.approx(float(weights[0].grad), rel=1e-5)
