"""Random numbers of a picture: the same whichever others are beside it, and in whatever order they come."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL.Image import Image as Picture


def digest_of(picture: Picture) -> str:
    """SHA-256 of a picture's pixels and size, hexadecimal: a key that does not depend on its name."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def keyed_generator(seed: int, key: str, number: int = 0) -> torch.Generator:
    """A generator on the CPU from seed, the key of a picture and a number, neither of them negative, alone."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u4").tolist()
    (state,) = np.random.SeedSequence([seed, number, *words]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
