"""Activation checkpointing: the same losses and gradients from less memory, and a plan that knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_shapes

from mixmodal.models.transformer import load_weights
from mixmodal.training.live_bytes import LiveBytes
from mixmodal.training.plan import PlanConfig, build_plan
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain
from mixmodal.training.recomputing import recompute
from mixmodal.training.rehearsal import Rehearsal

ROOT = Path(__file__).parents[2]


def config(root: Path, on: bool, dropout: float = 0.0, **trainer: Any) -> PretrainConfig:
    found = tiny_config(root, 3, activation_checkpointing=on, **trainer)
    return replace(found, model=replace(found.model, dropout=dropout, num_layers=4))


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [0, 3])
def test_losses_and_weights_are_those_of_the_plain_run(tmp_path: Path, stage: int) -> None:
    curves, weights = [], []
    zero = ROOT / f"configs/deepspeed/zero{stage}.json"
    for on in (False, True):
        root = tmp_path / str(on)
        write_shapes(root / "tokens", 20)
        trained = config(root, on, dropout=0.1, deepspeed=zero)
        pretrain(trained)
        curves.append([[line[name] for name in ("loss", "grad_norm")] for line in lines(root)])
        model = PretrainTask(trained).build_model()
        load_weights(model, root / "run/export/model.safetensors")
        weights.append(model.state_dict())
    assert curves[0] == curves[1]  # bit for bit, with dropout
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_less_memory_stands_and_the_plan_says_how_much(tmp_path: Path) -> None:
    write_shapes(tmp_path / "tokens", 20)
    peaks = {}
    for on in (False, True):
        options = {"as_on_cuda": False, "keeps_gradients": False}
        size = 4
        fake = Rehearsal(config(tmp_path, on), **options).passes(size)
        real = Rehearsal(config(tmp_path, on), **options, fake=False).passes(size)
        # worst seen: 0.011, a copy of the positions that count, which tensors without data can not tell
        assert fake.peak == pytest.approx(real.peak, rel=0.02)
        peaks[on] = real.peak
        plan = build_plan(config(tmp_path, on), PlanConfig(training=tmp_path, device="cpu"))
        assert plan.rows["activations"] == fake.peak - plan.rows["gradients"]
    assert peaks[True] < 0.5 * peaks[False]  # seen: 0.30


def test_only_the_inputs_of_blocks_stand_after_forward() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Linear(8, 800), torch.nn.GELU(), torch.nn.Linear(800, 8)) for _ in range(5)]
    model = torch.nn.Sequential(*blocks)
    recompute(blocks)
    count = LiveBytes(apart=model.parameters())
    with count.counting():
        outputs = model(torch.ones(10, 8))
        assert count.now <= 6 * 10 * 8 * 4  # the input and five outputs; the 800 are gone
        outputs.sum().backward()
    model.eval()
    with count.counting():
        outputs = model(torch.ones(10, 8))
        assert count.now > 10 * 800 * 4  # in evaluation nothing is left out


def test_a_task_without_parts_says_so(fit: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"trainer\.activation_checkpointing can not act"):
        fit(activation_checkpointing=True)


def test_every_block_of_the_transformer_is_named(tmp_path: Path) -> None:
    write_shapes(tmp_path / "tokens", 20)
    task = PretrainTask(config(tmp_path, True))
    assert len(list(task.recomputed(task.build_model()))) == 4
