"""Learning-rate schedules and which parameters decay."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.training.optimizer import OptimizerConfig, Schedule, build_optimizer, lr_at, parameter_groups
from mixmodal.training.plan import load_training

ROOT = Path(__file__).parents[2]


def config(schedule: Schedule, min_lr_ratio: float = 0.1, **options: float) -> OptimizerConfig:
    return OptimizerConfig(lr=2.0, warmup_steps=4, schedule=schedule, min_lr_ratio=min_lr_ratio, **options)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: Schedule) -> None:
    assert [lr_at(step, config(schedule), 20) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("constant", 2.0, 2.0),
        ("linear", 2.0 * 0.55, 0.2),
        ("cosine", 2.0 * 0.55, 0.2),
        ("polynomial", 2.0 * 0.55, 0.2),
        ("exponential", 2.0 * math.sqrt(0.1), 0.2),
    ],
)
def test_schedules_fall_to_the_floor(schedule: Schedule, middle: float, last: float) -> None:
    assert lr_at(12, config(schedule), 20) == pytest.approx(middle)
    assert lr_at(20, config(schedule), 20) == pytest.approx(last)
    assert lr_at(99, config(schedule), 20) == pytest.approx(last)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert lr_at(0, OptimizerConfig(lr=2.0, warmup_steps=0), 10) == 2.0


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_a_polynomial_falls_with_its_power(power: float) -> None:
    for step in range(4, 21):
        left = (1 - (step - 4) / 16) ** power
        found = lr_at(step, config("polynomial", polynomial_power=power), 20)
        assert found == pytest.approx(0.2 + 1.8 * left, rel=1e-12)  # worst seen: 2e-16


def test_an_exponential_with_a_rate_reaches_0() -> None:
    rates = [lr_at(step, config("exponential", 0.0, exponential_rate=3.0), 20) for step in range(4, 21)]
    last = math.exp(-3)
    expected = [2.0 * (math.exp(-3 * place / 16) - last) / (1 - last) for place in range(17)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)  # worst seen: 2e-16
    assert (rates[0], rates[-1]) == (2.0, 0.0)
    # so what falls from step to step shrinks by the same factor every time, as it does for the plain exponential
    falls = [first - second for first, second in pairwise(rates)]
    assert [second / first for first, second in pairwise(falls)] == pytest.approx([math.exp(-3 / 16)] * 15)


def test_the_plain_exponential_is_a_power_of_its_floor() -> None:
    for step in range(4, 21):
        assert lr_at(step, config("exponential", 0.01), 20) == pytest.approx(2.0 * 0.01 ** ((step - 4) / 16), rel=1e-12)
    assert lr_at(12, config("exponential", 1.0), 20) == 2.0


@pytest.mark.parametrize(
    ("recipe", "peak", "middle", "last"),
    [
        ("chameleon_7b", 1e-4, 1 / (1 + math.exp(2.3)), 0.0),
        ("chameleon_34b", 1e-4, 1 / (1 + math.exp(2.3)), 0.0),
        ("cm3leon_350m", 6e-4, 0.55, 0.1),
        ("cm3leon_760m", 5e-4, 0.55, 0.1),
        ("cm3leon_7b", 1.2e-4, 0.55, 0.1),
    ],
)
def test_recipes_fall_as_their_papers_say(recipe: str, peak: float, middle: float, last: float) -> None:
    training = load_training(ROOT / f"configs/train/{recipe}.yaml")
    warmup, end = training.optimizer.warmup_steps, training.trainer.max_steps
    rates = [lr_at(step, training.optimizer, end) / peak for step in (warmup, (warmup + end) // 2, end)]
    assert rates == pytest.approx([1.0, middle, last], rel=1e-12, abs=1e-15)  # worst seen: 1.3e-16
    assert training.optimizer.schedule == {"cha": "exponential", "cm3": "polynomial"}[recipe[:3]]


def test_an_exponential_schedule_needs_a_floor_or_a_rate() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.min_lr_ratio.*optimizer\.exponential_rate"):
        config("exponential", 0.0)


@pytest.mark.parametrize(
    ("schedule", "option"),
    [
        ("cosine", {"polynomial_power": 2.0}),
        ("linear", {"exponential_rate": 3.0}),
        ("constant", {"min_lr_ratio": 0.5}),
    ],
)
def test_an_option_of_another_schedule_is_refused(schedule: Schedule, option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(option))} can not act where .* is {schedule}"):
        config(schedule, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"polynomial_power": 0.0}, {"exponential_rate": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}]
)
def test_impossible_values_are_named(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(option))} is"):
        OptimizerConfig(**option)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    shape = TransformerConfig(vocab_size=11, dim=8, num_layers=1, num_heads=2, ffn_dim=16, position="learned")
    model = Transformer(shape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    spared = {names[id(parameter)] for parameter in plain["params"]}
    assert {"embedding.weight", "positions.weight", "norm.weight"} <= spared
    assert all("norm" in name or name.split(".")[0] in ("embedding", "positions") for name in spared)
    heads = {f"blocks.0.attention.{norm}.{name}" for norm in ("q_norm", "k_norm") for name in ("weight", "bias")}
    assert heads <= spared  # two dimensions, still a norm
    kept = {names[id(parameter)] for parameter in decayed["params"]}
    assert "output.weight" in kept
    assert kept | spared == set(names.values())


def test_an_embedding_that_is_the_output_matrix_too_does_not_decay() -> None:
    shape = TransformerConfig(vocab_size=11, dim=8, num_layers=1, num_heads=2, ffn_dim=16, tie_embeddings=True)
    model = Transformer(shape)
    decayed, plain = parameter_groups(model, 0.1)
    assert sum(parameter is model.embedding.weight for parameter in plain["params"]) == 1
    assert len(decayed["params"]) == 4  # qkv, out, up, out


def test_biases_do_not_decay_and_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    (only,) = parameter_groups(model, 0.1)
    assert only["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in only["params"]] == [(4, 3), (4,)]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())


def test_fused_adamw_serves_on_the_cpu() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
