"""The largest attention logit, against one that keeps all logits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_shapes
from torch import Tensor

import mixmodal.training.attention_logits as module
from mixmodal.models.attention import rotary, rotate
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.training.attention_logits import attention_logit_max, largest_logit
from mixmodal.training.pretrain import PretrainTask, pretrain

ROOT = Path(__file__).parents[2]
SHAPE = TransformerConfig(
    vocab_size=50, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32, init_std=0.2
)
SEGMENTS = torch.tensor([[1] * 9 + [2] * 6 + [3] * 2 + [0] * 3])
POSITIONS = torch.tensor([[*range(9), *range(6), *range(2), 0, 0, 0]])
TOKENS = torch.arange(20)[None]


def plain(network: Transformer) -> float:
    """By each block's own input, with all logits of all heads."""
    largest = -math.inf
    hidden = network.embedding(TOKENS)
    angles = None
    if network.positions is None:
        angles = rotary(POSITIONS, network.config.attention_sizes["head_dim"], network.config.rope_theta)
    else:
        hidden = hidden + network.positions(POSITIONS)
    mask = ((SEGMENTS[:, :, None] == SEGMENTS[:, None]) & torch.ones(20, 20, dtype=torch.bool).tril())[:, None]
    real = mask & (SEGMENTS[:, None, :, None] != 0)
    for block in network.blocks:
        attention = block.attention
        normed = block.attention_norm(hidden) if block.norm_first else hidden
        kv_heads = attention.num_kv_heads
        heads = attention.qkv(normed).view(1, 20, 4 + 2 * kv_heads, 8)
        queries, keys = attention.q_norm(heads[:, :, :4]), attention.k_norm(heads[:, :, 4 : 4 + kv_heads])
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2).repeat_interleave(4 // kv_heads, dim=1)
        if angles is not None:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        logits = queries @ keys.transpose(2, 3) / math.sqrt(8)
        largest = max(largest, logits[real.expand_as(logits)].max().item())
        hidden = block(hidden, angles, mask, None, POSITIONS)
    return largest


def measured(network: Transformer) -> Tensor:
    return attention_logit_max(network, TOKENS, POSITIONS, SEGMENTS)


@pytest.mark.parametrize("chunk_elements", [1, 300, 2**24])
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False}, {"norm_placement": "post_sublayer"}, {"position": "learned", "num_kv_heads": 4}],
    ids=lambda changes: next(iter(changes), "chameleon"),
)
@torch.no_grad()
def test_it_is_the_largest_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], chunk_elements: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    network = Transformer(replace(SHAPE, **changes)).eval()
    assert measured(network).item() == pytest.approx(plain(network), rel=1e-6)  # worst seen: 1e-7


def test_only_what_a_token_sees_counts() -> None:
    queries = torch.tensor([[[1.0], [1.0], [2.0], [50.0]]])
    keys = torch.tensor([[[3.0], [70.0], [5.0], [90.0]]])
    # the second document holds the second and third token: 1 * 70 and 2 * 70; the last token is padding
    assert largest_logit(queries, keys, torch.tensor([1, 2, 2, 0])) == 140
    assert largest_logit(queries, keys, torch.tensor([1, 2, 3, 0])) == 70
    assert largest_logit(queries, keys, torch.zeros(4, dtype=torch.long)) == -math.inf


def test_training_is_not_disturbed() -> None:
    torch.manual_seed(0)
    network = Transformer(replace(SHAPE, dropout=0.5)).train()
    before = torch.get_rng_state()
    assert measured(network) == measured(network)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    assert network.blocks[0].training
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_logs_the_largest_of_each_logged_step(tmp_path: Path, stage: int) -> None:
    write_shapes(tmp_path / "tokens", 40)
    options = {"log_every": 2, "grad_accum_steps": 2, "deepspeed": ROOT / f"configs/deepspeed/zero{stage}.json"}
    config = tiny_config(tmp_path, max_steps=3, **options)
    pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    # queries and keys are normed: a logit is at most sqrt(head_dim) as long as the norms' weights are near 1
    assert all(0 < line["attention_logit_max"] < 1.2 * math.sqrt(32) for line in lines)


def test_one_row_of_a_step_is_looked_at(tmp_path: Path) -> None:
    write_shapes(tmp_path / "tokens", 40)
    config = tiny_config(tmp_path, max_steps=4, log_every=2)
    task = PretrainTask(config)
    network = task.build_model()
    loader = task.build_loader(2, 2, 0, 1)
    found = [[task.losses(network, next(loader), step).metrics for _ in range(2)] for step in range(4)]
    names = [["attention_logit_max" in metrics for metrics in step] for step in found]
    assert names == [[False, False], [True, False], [False, False], [True, False]]
