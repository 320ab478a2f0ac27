"""Adversarial losses against closed forms and taming-transformers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixmodal.objectives.adversarial import (
    ADAPTIVE_EPS,
    AdversarialConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def draw_logits(seed: int, count: int = 6) -> torch.Tensor:
    return 2 * torch.randn(count, 1, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_hinge_has_its_closed_form() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)  # 1 - real above 0: 0, 0.5 | 2, 0
    fake = torch.tensor([[-2.0, 0.0], [1.0, -1.0]]).view(2, 1, 1, 2)  # 1 + fake above 0: 0, 1 | 2, 0
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0.25 + 1.0) + (0.5 + 1.0)))
    assert generator_loss(fake).item() == pytest.approx(-(-1.0 + 0.0))


def test_non_saturating_has_its_closed_form() -> None:
    zeros = torch.zeros(3, 1, 2, 2)
    assert discriminator_loss(zeros, zeros, "non_saturating").item() == pytest.approx(3 * math.log(2))
    assert generator_loss(zeros, "non_saturating").item() == pytest.approx(3 * math.log(2))
    # -log sigmoid(2) and -log(1 - sigmoid(-1))
    real, fake = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    wanted = 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(wanted)


def test_the_means_over_a_batch_are_taming_transformers() -> None:
    real, fake = draw_logits(0), draw_logits(1)
    hinge = 0.5 * (torch.mean(F.relu(1.0 - real)) + torch.mean(F.relu(1.0 + fake)))
    vanilla = 0.5 * (torch.mean(F.softplus(-real)) + torch.mean(F.softplus(fake)))
    torch.testing.assert_close(discriminator_loss(real, fake) / 6, hinge)
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating") / 6, vanilla)
    torch.testing.assert_close(generator_loss(fake) / 6, -torch.mean(fake))


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_losses_of_parts_add_up(kind: str) -> None:
    real, fake = draw_logits(0), draw_logits(1)
    parts = [discriminator_loss(a, b, kind) for a, b in zip(real.split(4), fake.split(4), strict=True)]  # type: ignore[arg-type]
    torch.testing.assert_close(sum(parts), discriminator_loss(real, fake, kind))  # type: ignore[arg-type]
    torch.testing.assert_close(sum(generator_loss(part, kind) for part in fake.split(4)), generator_loss(fake, kind))  # type: ignore[arg-type]


def test_losses_are_float32_for_bfloat16_logits() -> None:
    logits = draw_logits(0).bfloat16()
    assert discriminator_loss(logits, logits).dtype == generator_loss(logits).dtype == torch.float32


def losses_of(layer: nn.Conv2d, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A reconstruction loss and an adversarial loss through one last layer."""
    generator = torch.Generator().manual_seed(0)
    features, images = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(2, 3, 6, 6, generator=generator)
    output = layer(features)
    return (output - images).square().mean(), scale * output.sigmoid().mean()


def test_the_adaptive_weight_is_taming_transformers() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    reconstruction, adversarial = losses_of(layer)
    nll_grads = torch.autograd.grad(reconstruction, layer.weight, retain_graph=True)[0]
    g_grads = torch.autograd.grad(adversarial, layer.weight, retain_graph=True)[0]
    wanted = torch.clamp(torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4), 0.0, 1e4).detach()
    found = adaptive_weight(reconstruction, adversarial, layer.weight)
    torch.testing.assert_close(found, wanted)
    assert not found.requires_grad
    (reconstruction + found * adversarial).backward()  # both graphs are still there


def test_the_adaptive_weight_makes_the_gradients_equally_long() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    reconstruction, adversarial = losses_of(layer, scale=1e6)  # against which 1e-4 is nothing
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    ours = torch.autograd.grad(weight * adversarial, layer.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(reconstruction, layer.weight)[0]
    torch.testing.assert_close(ours.norm(), theirs.norm())


def test_the_adaptive_weight_is_clamped() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    reconstruction, adversarial = losses_of(layer, scale=0.0)
    length = torch.autograd.grad(reconstruction, layer.weight, retain_graph=True)[0].norm()
    free = adaptive_weight(reconstruction, adversarial, layer.weight, max_weight=1e9)
    torch.testing.assert_close(free, length / ADAPTIVE_EPS)
    assert adaptive_weight(reconstruction, adversarial, layer.weight, max_weight=3.0).item() == 3.0


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"weight": 0.0}, "weight"),
        ({"weight": math.inf}, "weight"),
        ({"start_step": -1}, "start_step"),
        ({"max_adaptive_weight": 0.0}, "max_adaptive_weight"),
        ({"adaptive": False, "max_adaptive_weight": 10.0}, "max_adaptive_weight has no effect"),
        ({"loss": "wasserstein"}, "loss"),
    ],
)
def test_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=rf"adversarial\.{key}"):
        AdversarialConfig(**fields)
