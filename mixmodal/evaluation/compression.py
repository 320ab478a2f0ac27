"""Bits per byte: likelihood of text in a unit that does not depend on the tokenizer (arXiv 2101.00027, section 3.1)."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

Nats = TypeVar("Nats", float, Tensor)


def in_bits(nats: Nats) -> Nats:
    """Nats as bits, of numbers and tensors of any shape."""
    return nats / math.log(2)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Negative log-likelihood of texts over the bytes that they have in UTF-8.

    Args:
        nats: summed over all tokens of all texts, not a mean.
        num_bytes: of the same texts, what no token stands for left out.

    Raises:
        ValueError: without a byte.
    """
    if num_bytes < 1:
        raise ValueError(f"bits per byte: the texts have {num_bytes} bytes; one or more are needed")
    return in_bits(nats) / num_bytes
