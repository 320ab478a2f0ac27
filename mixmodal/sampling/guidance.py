"""From logits to a token: guidance, then an ordered list of small rules, then one draw.

Every rule takes logits `(B, V)` float32, where -inf marks what can not be drawn, and a value for each row `(B,)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor], Tensor]
"""Logits `(B, V)` and the index of each row's modality `(B,)` to logits `(B, V)`."""


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How the tokens of one modality are drawn.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from the k likeliest tokens; 0 is all of them.
        top_p: draw from the likeliest tokens that together reach this probability (nucleus, arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance for tokens (CM3Leon, arXiv 2309.02591 section 3.2); a scale of 1 is none."""
    return unconditional + scale * (conditional - unconditional)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over temperature; a row with temperature 0 keeps its first largest logit only."""
    greedy = (temperature == 0)[:, None]
    scaled = logits / temperature.masked_fill(temperature == 0, 1)[:, None]
    best = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(dim=1, keepdim=True), True)
    return scaled.masked_fill(greedy & ~best, -torch.inf)


def keep_top_k(logits: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Drops what is less likely than the k-th likeliest; ties stay. `largest` is the largest k of any row."""
    values = logits.topk(min(largest, logits.shape[1]), dim=1).values
    places = (top_k - 1).clamp(0, values.shape[1] - 1)
    threshold = values.gather(1, places[:, None])
    return logits.masked_fill((logits < threshold) & (top_k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drops the least likely tokens without which the others reach `top_p`; at least one stays."""
    values, order = logits.sort(dim=1, descending=True, stable=True)
    probabilities = values.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    dropped = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)


def build_rules(
    sampling: Mapping[str, TokenSampling], modalities: Sequence[str], device: torch.device | str = "cpu"
) -> list[Rule]:
    """The rules in the order in which they apply: temperature, top-k, top-p; what would change nothing is left out.

    Args:
        sampling: settings by modality; a modality without an entry has the defaults of `TokenSampling`.
        modalities: what the indices that a rule is given stand for.

    Raises:
        ValueError: for settings of a modality that there is not.
    """
    unknown = sorted(set(sampling) - set(modalities))
    if unknown:
        raise ValueError(f"sampling settings for {', '.join(unknown)}; the model has {', '.join(modalities)}")
    settings = [sampling.get(name, TokenSampling()) for name in modalities]
    temperature = torch.tensor([one.temperature for one in settings], device=device)
    top_k = torch.tensor([one.top_k for one in settings], device=device)
    top_p = torch.tensor([one.top_p for one in settings], device=device)
    largest = max(one.top_k for one in settings)
    rules: list[Rule] = []
    if any(one.temperature != 1 for one in settings):
        rules.append(lambda logits, modality: apply_temperature(logits, temperature[modality]))
    if largest:
        rules.append(lambda logits, modality: keep_top_k(logits, top_k[modality], largest))
    if any(one.top_p < 1 for one in settings):
        rules.append(lambda logits, modality: keep_top_p(logits, top_p[modality]))
    return rules


def draw_uniforms(seeds: Sequence[int | Sequence[int]], num_steps: int) -> Tensor:
    """One number in [0, 1) for each sample and step, `(B, num_steps)` float64.

    They depend on the sample's seed and the step alone, so that a sample does not change with the batch around it, with
    the columns that are computed, or with the device.
    """
    rows = [np.random.default_rng(seed).random(num_steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Columns `(B,)` drawn from the softmax of `logits` `(B, V)` by inverting its distribution at `uniforms` `(B,)`."""
    cumulative = logits.softmax(dim=1).double().cumsum(dim=1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]
