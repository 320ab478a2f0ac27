"""Precisions and offload: float16 under a loss scale, and states on the host, train as the plain run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_task import Rows, ToyLoss, ToyTask

from mixmodal.training.checks import NonFiniteError
from mixmodal.training.engine import check_device
from mixmodal.training.precision import autocast, compute_dtype, weight_dtype

ROOT = Path(__file__).parents[2]
Fit = Callable[..., Any]
Exported = Callable[..., dict[str, Tensor]]
HAS_FLOAT16 = torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()
needs_float16 = pytest.mark.skipif(not HAS_FLOAT16, reason="this CPU can not compute in float16")


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def zero_file(name: str) -> Path:
    return ROOT / f"configs/deepspeed/{name}.json"


class Steep(ToyTask):
    """Gradients that overflow float16 under a large loss scale, in the steps `steep`."""

    def __init__(self, steep: range = range(1000), factor: float = 1.0) -> None:
        super().__init__()
        self.steep, self.factor = steep, factor

    def losses(self, model: Any, batch: Rows, step: int) -> ToyLoss:
        found = super().losses(model, batch, step)
        return found._replace(objective=found.objective * self.factor) if step in self.steep else found


@needs_float16
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_overflows_is_skipped_counted_and_followed_by_better_ones(
    fit: Fit, tmp_path: Path, stage: int
) -> None:
    task = Steep()
    fit("half", task, max_steps=8, precision="float16", deepspeed=zero_file(f"zero{stage}"))
    found = records(tmp_path / "half")
    skipped = [line["grad_norm"] is None for line in found]
    assert any(skipped)  # the first scale is 2^16, and a norm of 3.6 is beyond 65504 / 2^16
    assert not all(skipped)
    assert [line["skipped_steps"] for line in found] == [sum(skipped[: n + 1]) for n in range(8)]
    assert found[-1]["loss_scale"] < found[0]["loss_scale"]
    assert all(line["loss"] > 0 for line in found)


@needs_float16
def test_float16_trains_as_float32_does(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("whole", Steep(factor=2**-8), max_steps=6, max_grad_norm=0.0)
    fit("half", Steep(factor=2**-8), max_steps=6, max_grad_norm=0.0, precision="float16")
    whole, half = records(tmp_path / "whole"), records(tmp_path / "half")
    assert half[-1]["skipped_steps"] == 0
    for name in ("loss", "grad_norm"):
        wanted = [line[name] for line in whole]
        assert [line[name] for line in half] == pytest.approx(wanted, rel=3e-3)  # worst seen: 6e-4
    for name, value in exported("whole").items():
        torch.testing.assert_close(exported("half")[name], value, rtol=0, atol=2e-3)  # worst seen: 4e-4


@needs_float16
def test_float16_resumes_with_its_scale_and_its_count(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("whole", max_steps=6, precision="float16")
    fit("parts", max_steps=6, precision="float16", save_every=4, keep_checkpoints=9)
    (tmp_path / "parts/checkpoints/latest").write_text("step_00000004\n")
    fit("parts", max_steps=6, precision="float16")
    names = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps")
    whole, parts = ([[line[name] for name in names] for line in records(tmp_path / run)] for run in ("whole", "parts"))
    assert parts == whole
    assert all(torch.equal(exported("parts")[name], value) for name, value in exported("whole").items())


@needs_float16
def test_what_no_scale_mends_ends_training(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 18: gradient norm is inf.*row136"):
        fit(task=Steep(factor=1e30), max_steps=40, precision="float16")
    scales = [line["loss_scale"] for line in records(tmp_path / "run")]
    assert scales[-1] == 1.0  # it has tried them all
    with pytest.raises(NonFiniteError, match="loss is nan"):
        fit("nan", ToyTask(bad_step=1), precision="float16")


def test_a_device_without_float16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: False)
    with pytest.raises(ValueError, match=r"trainer\.precision is float16, in which this cpu can not compute"):
        check_device({"fp16": {}, "zero_optimization": {"stage": 1}})


def test_offload_to_a_disk_is_refused_on_the_cpu() -> None:
    section = {"device": "nvme", "nvme_path": "/tmp"}
    with pytest.raises(ValueError, match=r"offload_optimizer\.device is nvme"):
        check_device({"zero_optimization": {"stage": 3, "offload_optimizer": section}})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_nothing_and_resumes(
    fit: Fit, exported: Exported, tmp_path: Path, stage: int, precision: str
) -> None:
    options = {"precision": precision, "micro_batch_size": 4, "grad_accum_steps": 2, "max_steps": 4}
    fit("device", deepspeed=zero_file(f"zero{stage}"), **options)
    options["deepspeed"] = zero_file(f"zero{stage}_offload")
    fit("host", save_every=2, keep_checkpoints=9, **options)
    for name, value in exported("device").items():
        torch.testing.assert_close(exported("host")[name], value, rtol=0, atol=5e-7)  # worst seen: 3e-8
    whole = exported("host")
    (tmp_path / "host/checkpoints/latest").write_text("step_00000002\n")
    fit("host", **options)
    assert all(torch.equal(exported("host")[name], value) for name, value in whole.items())


def test_precision_in_torch():
    names = ("float32", "bfloat16", "autocast_bfloat16", "float16")
    assert [weight_dtype(name) for name in names] == [None, torch.bfloat16, None, torch.float16]
    assert compute_dtype("autocast_bfloat16") == torch.bfloat16
    ones = torch.ones(2, 2)
    with autocast("autocast_bfloat16", "cpu"):
        assert (ones @ ones).dtype == torch.bfloat16
    with autocast("float32", "cpu"):
        assert (ones @ ones).dtype == torch.float32
