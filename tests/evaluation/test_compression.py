"""Bits per byte."""

import math

import pytest
import torch

from mixmodal.evaluation.compression import bits_per_byte, in_bits


def test_a_model_that_knows_nothing_of_bytes_needs_eight_bits() -> None:
    text = "Grüße".encode()
    assert bits_per_byte(len(text) * math.log(256), len(text)) == pytest.approx(8)


def test_nats_are_bits_times_the_logarithm_of_two() -> None:
    assert in_bits(math.log(8)) == pytest.approx(3)
    assert torch.allclose(in_bits(torch.tensor([1.0, 2.0]) * math.log(2)), torch.tensor([1.0, 2.0]))


def test_texts_without_a_byte_are_refused() -> None:
    with pytest.raises(ValueError, match="the texts have 0 bytes"):
        bits_per_byte(1.0, 0)
