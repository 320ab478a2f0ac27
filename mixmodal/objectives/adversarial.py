"""What an image tokenizer and its discriminator play for (VQGAN, arXiv 2012.09841, section 3.1).

Losses are sums over pictures of means over the patches of a picture, so that micro-batches and ranks add up.

| loss | discriminator, half of | generator |
|---|---|---|
| `hinge` | `relu(1 - D(x)) + relu(1 + D(y))` (arXiv 1705.02894, section 3) | `-D(y)` |
| `non_saturating` | `softplus(-D(x)) + softplus(D(y))` (arXiv 1406.2661, section 3) | `softplus(-D(y))` |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.models.discriminator import DiscriminatorConfig

AdversarialKind = Literal["hinge", "non_saturating"]

KINDS = ("hinge", "non_saturating")
ADAPTIVE_EPS = 1e-4
"""Delta of VQGAN's equation 7, as taming-transformers has it; the paper says 1e-6."""
MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator against an image tokenizer.

    Args:
        loss: `hinge` or `non_saturating`.
        weight: of the generator's loss.
        start_step: the step from which both play.
        adaptive: scale the generator's loss so that its gradient at the decoder's last layer is as long as that of
            the reconstruction losses (VQGAN, equation 7), and weigh then.
        max_adaptive_weight: adaptive: cap on that scale.
        discriminator: the network.
    """

    loss: AdversarialKind = "hinge"
    weight: float = 0.5
    start_step: int = 0
    adaptive: bool = True
    max_adaptive_weight: float = MAX_ADAPTIVE_WEIGHT
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.loss not in KINDS:
            raise ValueError(f"adversarial.loss is {self.loss!r}; choose one of {', '.join(KINDS)}")
        for name in ("weight", "max_adaptive_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"adversarial.{name} is {getattr(self, name)}; it must be above 0 and finite")
        if self.start_step < 0:
            raise ValueError(f"adversarial.start_step is {self.start_step}; it must not be negative")
        if not self.adaptive and self.max_adaptive_weight != MAX_ADAPTIVE_WEIGHT:
            raise ValueError("adversarial.max_adaptive_weight has no effect with adaptive false; leave it out")


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialKind = "hinge") -> Tensor:
    """What the discriminator minimises, a scalar in float32: the sum over pictures.

    Args:
        real: logits `(B, 1, h, w)` of pictures.
        fake: logits `(B, 1, h, w)` of their reconstructions, detached from the decoder.
        kind: which loss.
    """
    if kind == "hinge":
        return 0.5 * (_sum(F.relu(1 - real.float())) + _sum(F.relu(1 + fake.float())))
    return 0.5 * (_sum(F.softplus(-real.float())) + _sum(F.softplus(fake.float())))


def generator_loss(fake: Tensor, kind: AdversarialKind = "hinge") -> Tensor:
    """What the tokenizer minimises, a scalar in float32: the sum over pictures.

    Args:
        fake: logits `(B, 1, h, w)` of reconstructions, with their gradient.
        kind: which loss.
    """
    return -_sum(fake.float()) if kind == "hinge" else _sum(F.softplus(-fake.float()))


def _sum(values: Tensor) -> Tensor:
    """Sum over pictures of means over patches."""
    return values.flatten(1).mean(-1).sum()


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer_weight: Tensor,
    max_weight: float = MAX_ADAPTIVE_WEIGHT,
) -> Tensor:
    """The factor that makes the adversarial gradient as long as the other at the last layer (VQGAN, equation 7).

    `|d reconstruction| / (|d adversarial| + 1e-4)`, clamped to 0 .. max_weight. Both graphs stay. Divide both losses by
    the number of pictures first, so that 1e-4 means the same for every batch size. The factor is that of the
    pictures at hand: each micro-batch and rank has its own, as in taming-transformers.

    Args:
        reconstruction_loss: scalar, all that the picture itself is asked for (pixels and perceptual).
        adversarial_loss: scalar, of the same pictures.
        last_layer_weight: weight of the decoder's last convolution, from which both follow.
        max_weight: cap, at least 0.

    Returns:
        scalar float32 without gradient.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer_weight, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial_loss, last_layer_weight, retain_graph=True)
    weight = wanted.float().norm() / (given.float().norm() + ADAPTIVE_EPS)
    return weight.clamp(0.0, max_weight).detach()
