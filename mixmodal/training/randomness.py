"""The global generators of torch, numpy and Python: seeding them, and their state as data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def set_seeds(seed: int, stream: int = 0) -> None:
    """Seeds the global generators of torch, numpy and Python: initial weights are stream 0, rank r is r + 1."""
    numbers = np.random.SeedSequence((seed, stream)).generate_state(3)
    torch.manual_seed(int(numbers[0]))
    np.random.seed(int(numbers[1]))
    random.seed(int(numbers[2]))


def random_state() -> dict[str, Any]:
    """State of all global generators of this process, as plain data."""
    name, key, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(key, dtype=np.int64)), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
