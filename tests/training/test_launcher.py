"""The trainer under deepspeed's launcher: processes on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmodal.config import save_config
from mixmodal.training.pretrain import PretrainConfig

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(tmp_path: Path) -> dict[str, str]:
    """Without a compiler, and with an empty place for compiled extensions."""
    return {
        **{name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")},
        "PYTHONPATH": f"{ROOT}:{HERE}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CXX": "/bin/false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }


def launch(tmp_path: Path, num_processes: int, run_dir: Path, runs: Any = None, **options: Any) -> str:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes)]
    command += ["--master_port", str(free_port()), str(HERE / "launched.py"), str(run_dir), json.dumps(runs or options)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pretrain_on_ranks(tmp_path: Path, num_processes: int, config: PretrainConfig, script: str = "pretrain") -> None:
    """`train/pretrain.py`, or another script of that folder, under the launcher."""
    path = tmp_path / "launched.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes)]
    command += ["--master_port", str(free_port()), str(ROOT / f"train/{script}.py"), "--config", str(path)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def curve(folder: Path) -> list[float]:
    """Losses, largest errors, gradient norms: AdamW and clipping would hide a factor on the gradient, the norm not."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "error_max", "grad_norm", "loss_critic", "grad_norm_critic")
    return [record[name] for record in records if "loss" in record for name in names if name in record]


def operations(folder: Path, num_processes: int) -> list[float]:
    """Of a token, of each step, as throughput and MFU (a share of 1 operation a second and process) tell them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["mfu"] * num_processes / r["tokens_per_second"] for r in records if "loss" in r]


def assert_same(exported: Callable[..., dict[str, Tensor]], run: str, other: str, atol: float) -> None:
    for name, value in exported(other).items():
        torch.testing.assert_close(exported(run)[name], value, rtol=0, atol=atol)


def test_two_processes_train_as_one_and_nothing_is_compiled(
    fit: Callable[..., Any], exported: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    fit("one", max_steps=3, peak_flops=1.0)
    launch(tmp_path, 2, tmp_path / "two", max_steps=3, micro_batch_size=2, grad_accum_steps=2, peak_flops=1.0)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-6)  # worst seen: 9e-8
    assert operations(tmp_path / "one", 1) == pytest.approx([3.5, 11.5, 19.5], rel=1e-12)  # rows 0 to 7, 8 to 15 ..
    assert operations(tmp_path / "two", 2) == pytest.approx([3.5, 11.5, 19.5], rel=1e-12)  # worst seen: 0
    assert_same(exported, "two", "one", atol=5e-7)  # worst seen: 6e-8
    assert not (tmp_path / "extensions").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_on_two_processes_resume_and_train_as_one(
    fit: Callable[..., Any], exported: Callable[..., dict[str, Tensor]], tmp_path: Path, stage: int
) -> None:
    zero_file = str(ROOT / f"configs/deepspeed/zero{stage}.json")
    fit("one", max_steps=4)
    options = {"micro_batch_size": 2, "grad_accum_steps": 2, "deepspeed": zero_file}
    launch(tmp_path, 2, tmp_path / "two", max_steps=4, save_every=2, **options)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-6)  # worst seen: 1.1e-7
    assert_same(exported, "two", "one", atol=5e-7)  # worst seen: 6e-8
    whole = exported("two")
    (tmp_path / "two/checkpoints/latest").write_text("step_00000002\n")
    launch(tmp_path, 2, tmp_path / "two", max_steps=4, **options)
    assert all(torch.equal(exported("two")[name], value) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_at_any_stage_trains_alike(
    fit: Callable[..., Any], exported: Callable[..., dict[str, Tensor]], tmp_path: Path, num_processes: int
) -> None:
    fit("one", max_steps=20)
    split = {"max_steps": 20, "micro_batch_size": 2, "grad_accum_steps": 4 // num_processes}
    zero = ROOT / "configs/deepspeed"
    runs = [{"name": f"zero{stage}", "deepspeed": str(zero / f"zero{stage}.json"), **split} for stage in range(4)]
    launch(tmp_path, num_processes, tmp_path, runs)
    for stage in range(4):
        assert curve(tmp_path / f"zero{stage}") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
        assert_same(exported, f"zero{stage}", "one", atol=1e-5)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the launched processes have: in bfloat16 the order of sums shows."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_bfloat16_gradients_are_summed_over_ranks_in_float32(
    fit: Callable[..., Any], exported: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    options = {"max_steps": 6, "micro_batch_size": 2, "precision": "bfloat16"}
    runs = []
    for stage in (1, 2, 3):
        options["deepspeed"] = str(ROOT / f"configs/deepspeed/zero{stage}.json")
        fit(f"one{stage}", **{**options, "deepspeed": Path(options["deepspeed"]), "grad_accum_steps": 2})
        runs.append({"name": f"two{stage}", **options})
    launch(tmp_path, 2, tmp_path, runs)
    for stage in (1, 2, 3):
        print(max(abs(a / b - 1) for a, b in zip(curve(tmp_path / f"two{stage}"), curve(tmp_path / f"one{stage}"))))
        assert curve(tmp_path / f"two{stage}") == pytest.approx(curve(tmp_path / f"one{stage}"), rel=1e-6)
        assert_same(exported, f"two{stage}", f"one{stage}", atol=1e-6)
