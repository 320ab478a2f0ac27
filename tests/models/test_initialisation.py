"""What weights start from, against closed forms, and dropout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mixmodal.models.presets import PRESETS
from mixmodal.models.transformer import Block, Transformer, TransformerConfig

SHAPE = {"vocab_size": 500, "dim": 128, "num_layers": 2, "num_heads": 4, "ffn_dim": 256, "max_seq_len": 64}
LLAMA = TransformerConfig(**SHAPE)
CM3LEON = replace(PRESETS["cm3leon_350m"], **SHAPE)

# The variance of a standard normal cut at 3 is 1 - 2 * 3 * density(3) / (share within 3).
CUT_STD = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def test_cm3leon_starts_narrow_with_output_layers_of_0() -> None:
    torch.manual_seed(0)
    network = Transformer(CM3LEON)
    for name, weight in network.named_parameters():
        if name.endswith("out.weight"):
            assert not weight.any(), name
            continue
        std = 0.0002 if name == "positions.weight" else 0.006
        assert weight.abs().max() <= 3 * std, name
        assert weight.std().item() == pytest.approx(CUT_STD * std, rel=0.02), name  # worst seen: 0.0020
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name


@torch.no_grad()
def test_with_output_layers_of_0_every_block_passes_its_input_on() -> None:
    torch.manual_seed(0)
    network = Transformer(CM3LEON).eval()
    tokens = torch.randint(500, (2, 9))
    embedded = network.embedding.weight[tokens] + network.positions.weight[:9]  # type: ignore[union-attr]
    expected = F.layer_norm(embedded, (128,), eps=1e-5) @ network.embedding.weight.T
    found = network(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # worst seen: 0


def test_llama_s_style_draws_all_matrices_alike_and_norms_start_as_nothing() -> None:
    torch.manual_seed(0)
    network = Transformer(LLAMA)
    for name, weight in network.named_parameters():
        if "norm" in name:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert weight.std().item() == pytest.approx(CUT_STD * 0.02, rel=0.02), name  # worst seen: 0.0064
            assert weight.abs().max() <= 0.06, name
    # so the first loss is near that of equal probabilities: the logits have the spread sqrt(dim) * std
    tokens = torch.randint(500, (4, 64))
    log_likelihoods = network(tokens).log_softmax(-1)
    spread = CUT_STD * 0.02 * math.sqrt(128)
    assert -log_likelihoods.mean().item() == pytest.approx(math.log(500) + spread**2 / 2, rel=1e-3)  # seen: 3.5e-5


def test_dropout_keeps_the_mean_of_each_sublayer_s_output() -> None:
    torch.manual_seed(0)
    block = Block(replace(CM3LEON, dropout=0.25, zero_init_output=False))
    torch.nn.init.zeros_(block.ffn.out.weight)
    hidden, positions = torch.randn(4, 64, 128), torch.arange(64).expand(4, -1)
    block.eval()
    whole = block(hidden, None, None, None, positions) - hidden
    block.train()
    dropped = block(hidden, None, None, None, positions) - hidden
    zero = dropped == 0
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.01)  # seen: 0.2505
    torch.testing.assert_close(dropped[~zero], whole[~zero] / 0.75, rtol=0, atol=1e-5)  # worst seen: 2.4e-7
