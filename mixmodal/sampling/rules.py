"""From logits to a token: an ordered list of small rules, then one draw.

Every rule takes logits `(B, C)` float32, where -inf marks what can not be drawn, and gives as many. Formulas and order
are those of Chameleon's released code (repetition penalty, temperature, top-p) and of transformers for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""Logits `(B, C)` to logits `(B, C)`."""


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How the tokens of one modality are drawn.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from the k likeliest tokens; 0 is all of them.
        top_p: draw from the likeliest tokens that together reach this probability (nucleus, arXiv 1904.09751).
        min_p: draw from tokens of at least this share of the likeliest one's probability (arXiv 2407.01082).
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt or the
            sample has already (arXiv 1909.05858); 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie in 0 .. 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes what is `seen` `(B, C)` bool less likely (CTRL, arXiv 1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature; at 0 each row keeps its first largest logit only."""
    if temperature:
        return logits / temperature
    best = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(dim=1, keepdim=True), True)
    return logits.masked_fill(~best, -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Drops what is less likely than the k-th likeliest; ties stay."""
    threshold = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Drops the least likely tokens without which the others reach `top_p`; at least one stays."""
    values, order = logits.sort(dim=1, descending=True, stable=True)
    probabilities = values.softmax(dim=1)
    dropped = probabilities.cumsum(dim=1) - probabilities >= top_p
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drops tokens of less than `min_p` times the probability of the likeliest (arXiv 2407.01082)."""
    probabilities = logits.softmax(dim=1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=1, keepdim=True), -torch.inf)


def build_rules(sampling: TokenSampling) -> list[Rule]:
    """Temperature, top-k, top-p, min-p, in this order; what would change nothing is left out.

    The repetition penalty, which also needs to know what was seen, comes before them.
    """
    rules: list[Rule] = []
    if sampling.temperature != 1:
        rules.append(lambda logits: apply_temperature(logits, sampling.temperature))
    if not sampling.temperature:
        return rules  # one token is left
    if sampling.top_k:
        rules.append(lambda logits: keep_top_k(logits, sampling.top_k))
    if sampling.top_p < 1:
        rules.append(lambda logits: keep_top_p(logits, sampling.top_p))
    if sampling.min_p:
        rules.append(lambda logits: keep_min_p(logits, sampling.min_p))
    return rules


def draw_uniforms(seed: int | Sequence[int], num_steps: int) -> Tensor:
    """One number in [0, 1) for each step of a sample, `(num_steps,)` float64.

    They depend on the sample's seed and the step alone, so that a sample does not change with the batch around it, with
    the columns that are computed, or with the device.
    """
    return torch.from_numpy(np.random.default_rng(seed).random(num_steps))


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Columns `(B,)` drawn from the softmax of `logits` `(B, C)` by inverting its distribution at `uniforms` `(B,)`."""
    cumulative = logits.softmax(dim=1).double().cumsum(dim=1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]
