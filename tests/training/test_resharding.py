"""A run goes on at another ZeRO stage and on another number of ranks as if nothing had changed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_launcher import assert_same, curve, launch
from test_trainer import losses, norms, stop_in_step
from torch import Tensor, nn
from toy_task import Contest, ToyTask

from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.vector_quantizers import MovingAverageQuantizer
from mixmodal.training.checkpoint import CheckpointError, load_tensors
from mixmodal.training.fragments import COUNTERS, Fragment, read_rest, write_fragment, write_rest

ROOT = Path(__file__).parents[2]
Fit = Callable[..., Any]
Exported = Callable[..., dict[str, Tensor]]

EVERY_PAIR = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0]
"""Stages of which each follows each other once."""


def stage(number: int) -> dict[str, Any]:
    return {"deepspeed": ROOT / f"configs/deepspeed/zero{number}.json"}


def set_back(run: Path, step: int) -> None:
    (run / "checkpoints/latest").write_text(f"step_{step:08d}\n")


@pytest.mark.parametrize("number", [0, 2, 3])
def test_another_number_of_micro_batches_goes_on_from_an_odd_step(
    fit: Fit, exported: Exported, tmp_path: Path, number: int
) -> None:
    fit("whole", max_steps=5)
    for step, accum in enumerate([1, 2, 4, 1, 2]):
        task = ToyTask()
        if step < 4:
            stop_in_step(task, 0)
        fit("parts", task, max_steps=5, micro_batch_size=8 // accum, grad_accum_steps=accum, **stage(number))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert norms(tmp_path / "parts") == pytest.approx(norms(tmp_path / "whole"), rel=1e-5)
    assert_same(exported, "parts", "whole", atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_every_zero_stage_goes_on_from_every_other(
    fit: Fit, exported: Exported, tmp_path: Path, precision: str
) -> None:
    steps = len(EVERY_PAIR)
    fit("whole", ToyTask(noise=0.1), max_steps=steps, precision=precision)
    for step, number in enumerate(EVERY_PAIR):
        task = ToyTask(noise=0.1)
        if step + 1 < steps:
            stop_in_step(task, 0)
        fit("parts", task, max_steps=steps, precision=precision, **stage(number))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert norms(tmp_path / "parts") == pytest.approx(norms(tmp_path / "whole"), rel=1e-5)
    assert_same(exported, "parts", "whole", atol=1e-6)


def test_master_weights_of_bfloat16_are_kept_between_stages(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("whole", precision="bfloat16", **stage(1))
    for step, number in enumerate([1, 2, 3, 1, 3, 2]):
        task = ToyTask()
        if step < 5:
            stop_in_step(task, 0)
        fit("parts", task, precision="bfloat16", **stage(number))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    saved = [load_tensors(tmp_path / run / "checkpoints/step_00000006/model_00000.pt") for run in ("whole", "parts")]
    for whole, parts in zip(*(network["fragments"].values() for network in saved), strict=True):
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert whole[key].dtype == torch.float32
            torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=1e-6)


def test_a_second_network_changes_its_stage_too(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("whole", Contest(start=2))
    for step, number in enumerate([0, 1, 2, 1, 0, 2]):
        task = Contest(start=2)
        if step < 5:
            stop_in_step(task, 0)
        fit("parts", task, **stage(number))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    critics = [torch.load(tmp_path / run / "export/critic.pt", weights_only=True) for run in ("whole", "parts")]
    for name, value in critics[0].items():
        torch.testing.assert_close(critics[1][name], value, rtol=0, atol=1e-6)


class Mixed(ToyTask):
    """With a frozen layer, a buffer and a parameter that never gets a gradient."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
        model.register_buffer("count", torch.zeros(3))
        model.register_parameter("idle", nn.Parameter(torch.ones(5)))
        return model

    def losses(self, model: nn.Module, batch: Any, step: int) -> Any:
        self.models[-1].count += step  # type: ignore[operator]
        return super().losses(model, batch, step)


@pytest.mark.parametrize("numbers", [(0, 2), (2, 0), (1, 1), (0, 3), (3, 0)])
def test_frozen_and_idle_parameters_and_buffers_go_along(
    fit: Fit, exported: Exported, numbers: tuple[int, int]
) -> None:
    fit("whole", Mixed())
    stopping = Mixed()
    stop_in_step(stopping, 2)
    fit("parts", stopping, **stage(numbers[0]))
    fit("parts", Mixed(), **stage(numbers[1]))
    assert exported("parts")["count"].tolist() == [15.0] * 3
    assert_same(exported, "parts", "whole", atol=1e-6)


def test_a_codebook_draws_the_same_restarts_after_a_resume() -> None:
    def build() -> MovingAverageQuantizer:
        torch.manual_seed(0)
        config = QuantizerConfig(kind="vq", codebook_size=16, codebook_dim=4, decay=0.5, restart_below=0.6)
        return MovingAverageQuantizer(config).train()

    def engine(module: nn.Module) -> Any:
        return SimpleNamespace(module=module, optimizer=None, deepspeed_engine=SimpleNamespace(**counters))

    counters = dict.fromkeys(COUNTERS, 0)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(2, 3, 3, 4, generator=generator) for _ in range(4)]
    whole, resumed = build(), build()
    for part in vectors[:3]:
        whole.assign(part)
    write_rest(engine(resumed), copy.deepcopy(read_rest(engine(whole))))
    for quantizer in (whole, resumed):
        quantizer.assign(vectors[3])
    assert torch.equal(whole.codebook(), resumed.codebook())


def test_a_part_that_no_rank_wrote_is_named(fit: Fit, tmp_path: Path) -> None:
    from mixmodal.training.checkpoint import save_tensors, sha256_of

    fit(max_steps=1)
    path = tmp_path / "run/checkpoints/step_00000001/model_00000.pt"
    content = load_tensors(path)
    content["fragments"]["0.weight"]["weight"] = content["fragments"]["0.weight"]["weight"][:100].clone()
    old = sha256_of(path)
    new = save_tensors(content, path)
    sums = path.with_name("checksums.json")
    sums.write_text(sums.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=r"28 weights of 0\.weight are missing"):
        fit(max_steps=2)


@pytest.mark.parametrize("here", [(0, 12), (3, 6), (0, 1), (11, 12)])
@pytest.mark.parametrize("cuts", [(0, 12), (0, 6, 12), (0, 5, 10, 12), (0, 1, 2, 12)])
def test_any_cut_is_read_into_any_other(here: tuple[int, int], cuts: tuple[int, ...]) -> None:
    whole = torch.arange(12.0)
    owner = nn.Parameter(torch.zeros(20))
    start, end = here
    optimizer = torch.optim.AdamW([owner])
    fragment = Fragment("w", start, owner.data[4 : 4 + end - start], owner, 4)
    read = 0
    for first, last in itertools.pairwise(cuts):
        source = {"start": first, "weight": whole[first:last], "exp_avg": -whole[first:last], "step": 3.0}
        read += write_fragment(fragment, source, optimizer)
    assert read == end - start
    assert owner[4 : 4 + end - start].tolist() == whole[start:end].tolist()
    assert optimizer.state[owner]["exp_avg"][4 : 4 + end - start].tolist() == (-whole[start:end]).tolist()
    assert owner.count_nonzero() == whole[start:end].count_nonzero()
    assert optimizer.state[owner]["step"] == 3


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_from_any_other(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    """Each launch begins where the one before it, on other ranks and at another stage, had done one step more."""
    fit("whole", max_steps=7)
    run = tmp_path / "parts"
    splits = {1: (4, 2), 2: (2, 2), 4: (1, 2)}
    for step, (ranks, number) in enumerate([(2, 2), (1, 0), (4, 3), (2, 1), (2, 0), (4, 2), (2, 3)]):
        if step:
            set_back(run, step)
        micro, accum = splits[ranks]
        options = {"micro_batch_size": micro, "grad_accum_steps": accum, "save_every": 1, "keep_checkpoints": 9}
        zero_file = str(stage(number)["deepspeed"])
        launch(tmp_path, ranks, run, max_steps=7, deepspeed=zero_file, async_save=step % 2 == 0, **options)
        assert curve(run) == pytest.approx(curve(tmp_path / "whole"), rel=1e-6)
        assert_same(exported, "parts", "whole", atol=1e-6)
