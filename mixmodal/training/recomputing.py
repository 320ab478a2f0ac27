"""Activation checkpointing: memory for time. Parts of a network keep their input only, and are computed again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(parts: Iterable[nn.Module]) -> None:
    """Lets modules keep nothing but their input for backward, which runs their forward again (arXiv 1604.06174).

    Dropout falls as it did the first time, so that losses and gradients stay what they are. Without gradient or in
    evaluation nothing changes.

    Raises:
        ValueError: where there are no modules.
    """
    wrapped = False
    for part in parts:
        part.forward = functools.partial(_forward, part, part.forward)
        wrapped = True
    if not wrapped:
        raise ValueError("trainer.activation_checkpointing can not act: what is trained names no parts for it")


def _forward(part: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    if not (part.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
