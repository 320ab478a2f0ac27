"""Weights in a blocked layout give the same numbers, while they are asked for and not longer."""

import pytest
import torch

from mixmodal.models.blocked import Blocked, Linear, can_block
from mixmodal.models.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, ffn_dim=64, max_seq_len=32, init_std=0.2)
needs_blocks = pytest.mark.skipif(not can_block(torch.zeros(8, 8)), reason="this processor has no blocked layout")


@needs_blocks
@pytest.mark.parametrize("num_rows", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_plain_matrix(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(48, 32).to(dtype), torch.randn(num_rows, 1, 32).to(dtype)
    if not can_block(weight):
        pytest.skip("no blocked layout for bfloat16")
    found, expected = Blocked(weight).multiply(rows), rows @ weight.T
    assert found.shape == (num_rows, 1, 48)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@needs_blocks
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_plain_weights(tied: bool) -> None:
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(**{**vars(TINY), "tie_embeddings": tied})).eval()
    tokens, linear = torch.randint(50, (2, 9)), network.blocks[0].ffn.up
    assert isinstance(linear, Linear)
    with torch.inference_mode():
        hidden = network.hidden(tokens)
        expected = network.logits(hidden), network.logits(hidden, slice(10, 20))
        with network.blocked():
            assert linear.blocked is not None
            found = network.logits(network.hidden(tokens)), network.logits(network.hidden(tokens), slice(10, 20))
        assert linear.blocked is None
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)  # worst seen 4e-6
        network.output.weight.zero_() if network.output is not None else network.embedding.weight.zero_()
        assert not network.logits(hidden).any()


@needs_blocks
def test_gradients_and_columns_within_are_those_of_the_weights() -> None:
    network = Transformer(TINY)
    with network.blocked():
        network(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert network.blocks[0].ffn.up.weight.grad is not None


def test_nothing_is_blocked_where_it_can_not_be() -> None:
    assert not can_block(torch.zeros(4, 4, dtype=torch.float64))
    assert not can_block(torch.zeros(0))
    with pytest.raises(ValueError, match="can not be blocked"):
        Blocked(torch.zeros(4, 4, dtype=torch.float64))
