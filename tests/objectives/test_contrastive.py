"""Contrastive losses: their formulas, those of transformers, and pairs spread over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.objectives.contrastive import Pairs, clamp_above, gather_pairs, infonce_loss, same_captions, sigmoid_loss

LOSSES = {"infonce": lambda pairs, scale, bias: infonce_loss(pairs, scale), "sigmoid": sigmoid_loss}


def draw(count: int, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text, image = (F.normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(2))
    return text, image


def scalars() -> tuple[Tensor, Tensor]:
    return torch.tensor(3.0), torch.tensor(-1.5)


def test_infonce_is_the_closed_form() -> None:
    text, image = draw(3)
    s = (3.0 * (text.double() @ image.double().T)).tolist()
    expected = 0.0
    for i in range(3):
        expected -= s[i][i] - math.log(sum(math.exp(s[i][j]) for j in range(3)))  # text i among pictures
        expected -= s[i][i] - math.log(sum(math.exp(s[j][i]) for j in range(3)))  # picture i among texts
    assert float(infonce_loss(gather_pairs(text, image), scalars()[0])) == pytest.approx(expected / 2, rel=1e-6)


def test_the_sigmoid_loss_is_the_closed_form() -> None:
    text, image = draw(3)
    s = (3.0 * (text.double() @ image.double().T) - 1.5).tolist()
    expected = sum(math.log1p(math.exp(-s[i][j] if i == j else s[i][j])) for i in range(3) for j in range(3))
    assert float(sigmoid_loss(gather_pairs(text, image), *scalars())) == pytest.approx(expected, rel=1e-6)


def test_infonce_over_pairs_is_the_loss_of_transformers_clip() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    text, image = draw(7)
    expected = image_text_contrastive_loss(3.0 * text @ image.T)
    assert float(infonce_loss(gather_pairs(text, image), scalars()[0])) / 7 == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_pairs_spread_over_ranks_have_the_loss_and_the_gradient_of_one_batch(loss: str, masked: bool) -> None:
    """What `gather_rows` does over processes: everyone's features with gradient, own rows of everyone's sum."""
    ids = torch.tensor([1, 2, 1, 3, 3, 1]) if masked else None
    text, image = (value.requires_grad_() for value in draw(6))
    scale, bias = (value.requires_grad_() for value in scalars())
    leaves = (text, image, scale, bias) if loss == "sigmoid" else (text, image, scale)
    whole = LOSSES[loss](gather_pairs(text, image, ids), scale, bias)
    wanted = torch.autograd.grad(whole, leaves)
    parts = []
    for first in (0, 2, 4):
        own = slice(first, first + 2)
        excluded = None if ids is None else same_captions(ids[own], ids, first)
        pairs = Pairs(text[own], image[own], text, image, first, excluded)
        parts.append(LOSSES[loss](pairs, scale, bias))
    total = torch.stack(parts).sum()
    found = torch.autograd.grad(total, leaves)
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)  # worst seen: 7e-8
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6)  # worst seen: 5e-7


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_caption_is_no_negative(loss: str) -> None:
    text, image = draw(4)
    text = text[[0, 1, 0, 3]]  # the captions of 0 and 2 are one text
    ids = torch.tensor([10, 11, 10, 13])
    moved = image.clone().requires_grad_()
    pairs = gather_pairs(text, moved, ids)._replace(text_BD=text[:1], image_BD=moved[:1])
    pairs = pairs._replace(excluded_BN=pairs.excluded_BN[:1])
    (gradient,) = torch.autograd.grad(LOSSES[loss](pairs, *scalars()), moved)
    assert gradient[2].abs().max() == 0  # picture 2 shows what text 0 says, and is neither drawn nor pushed away
    assert gradient[1].abs().max() > 0
    plain = gather_pairs(text, image)
    assert float(LOSSES[loss](plain, *scalars())) > float(LOSSES[loss](gather_pairs(text, image, ids), *scalars()))


@pytest.mark.parametrize("loss", LOSSES)
def test_distinct_captions_exclude_nothing(loss: str) -> None:
    text, image = draw(4)
    found = LOSSES[loss](gather_pairs(text, image, torch.arange(4)), *scalars())
    assert torch.equal(found, LOSSES[loss](gather_pairs(text, image), *scalars()))


def test_a_clamped_value_can_come_back() -> None:
    for start, slope, expected in [(1.0, -1.0, -1.0), (5.0, -1.0, 0.0), (5.0, 1.0, 1.0), (4.0, -1.0, 0.0)]:
        value = torch.tensor(start, requires_grad=True)
        clamped = clamp_above(value, 4.0)
        assert float(clamped.detach()) == min(start, 4.0)
        (slope * clamped).backward()
        assert float(value.grad) == expected


def test_masked_losses_are_the_closed_forms_without_the_excluded_terms() -> None:
    text, image = draw(3)
    s = (3.0 * (text.double() @ image.double().T)).tolist()
    excluded = {(0, 2), (2, 0)}
    kept = [(i, j) for i in range(3) for j in range(3) if (i, j) not in excluded]
    infonce = sum(math.log(sum(math.exp(s[i][j]) for i, j in kept if i == own)) - s[own][own] for own in range(3))
    infonce += sum(math.log(sum(math.exp(s[i][j]) for i, j in kept if j == own)) - s[own][own] for own in range(3))
    sigmoid = sum(math.log1p(math.exp((1.5 - s[i][j]) if i == j else (s[i][j] - 1.5))) for i, j in kept)
    pairs = gather_pairs(text, image, torch.tensor([10, 11, 10]))
    assert float(infonce_loss(pairs, scalars()[0])) == pytest.approx(infonce / 2, rel=1e-6)
    assert float(sigmoid_loss(pairs, *scalars())) == pytest.approx(sigmoid, rel=1e-6)
