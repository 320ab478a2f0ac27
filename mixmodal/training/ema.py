"""An exponential moving average of the weights, which often evaluates better than the last weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class AveragedWeights:
    """`average = d * average + (1 - d) * weight` after every step, in float32.

    d is `decay` but for the first steps: `min(decay, (1 + step) / (10 + step))`, so that the random weights of the
    start are soon forgotten (as in TensorFlow's ExponentialMovingAverage with `num_updates`).

    Args:
        model: in float32; its weights are the first average. Only parameters that are trained are averaged.
        decay: share that stays, per step, in the long run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._averages = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def to(self, device: torch.device) -> None:
        self._averages = {name: average.to(device) for name, average in self._averages.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """To be called after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self._averages:
                self._averages[name].lerp_(parameter.float(), 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the averages into the model for a while; they take the model's precision."""
        weights = {name: p for name, p in model.named_parameters() if name in self._averages}
        kept = {name: p.detach().clone() for name, p in weights.items()}
        try:
            self._copy(self._averages, weights)
            yield
        finally:
            self._copy(kept, weights)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in target.items():
            parameter.copy_(source[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises:
        ValueError: where the names are not those of this model.
        """
        if set(state) != set(self._averages):
            raise ValueError("averaged weights: the checkpoint's are those of another model")
        for name, average in self._averages.items():
            average.copy_(state[name])
