"""Checkpoints that are written while training goes on are those that it would have waited for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_checkpoint import flip
from test_trainer import losses
from torch import Tensor
from toy_task import Rows, ToyTask

from mixmodal.training import checkpoint, restoring
from mixmodal.training.checkpoint import CheckpointError, choose_checkpoint, load_tensors
from mixmodal.training.randomness import random_state
from mixmodal.training.saving import save_checkpoint

Fit = Callable[..., Any]
Exported = Callable[..., dict[str, Tensor]]
WAIT_S = 20
ROOT = Path(__file__).parents[2]


def networks(run: Path) -> dict[int, Any]:
    """What each checkpoint holds of the model."""
    return {
        checkpoint.step_of(folder): load_tensors(folder / "model_00000.pt")
        for folder in checkpoint.whole_checkpoints(run / "checkpoints")
    }


def assert_same_data(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same_data(value, other[key])
    else:
        assert one == other


class Watched(ToyTask):
    """Tells when a step begins."""

    def __init__(self, waits_before_step: dict[int, threading.Event] | None = None) -> None:
        super().__init__()
        self.begun = [threading.Event() for _ in range(20)]
        self.waits = waits_before_step or {}

    def losses(self, model: Any, batch: Rows, step: int) -> Any:
        self.begun[step].set()
        if step in self.waits:
            assert self.waits[step].wait(WAIT_S)
        return super().losses(model, batch, step)


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(
    fit: Fit, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("waits", ToyTask(), save_every=2, keep_checkpoints=9)
    task, real = Watched(), checkpoint.save_tensors

    def late(state: Any, path: Path) -> str:
        if "step_00000002" in str(path):
            assert task.begun[3].wait(WAIT_S)  # steps 3 and 4 begin before the checkpoint of step 2 is on the disk
            assert not (tmp_path / "goes_on/checkpoints/latest").exists()
        return real(state, path)

    monkeypatch.setattr(checkpoint, "save_tensors", late)
    fit("goes_on", task, save_every=2, keep_checkpoints=9, async_save=True)
    assert list(networks(tmp_path / "goes_on")) == [2, 4, 6]
    assert_same_data(networks(tmp_path / "goes_on"), networks(tmp_path / "waits"))
    assert choose_checkpoint(tmp_path / "goes_on/checkpoints") == tmp_path / "goes_on/checkpoints/step_00000006"
    assert_same_data(exported("goes_on"), exported("waits"))


def test_a_save_waits_for_the_one_before_it(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, real, writing = Watched(), checkpoint.save_tensors, threading.Lock()

    def alone(state: Any, path: Path) -> str:
        assert writing.acquire(blocking=False)
        if "step_00000001" in str(path):
            assert not task.begun[2].wait(0.2)  # step 2 can be done, but not saved
        writing.release()
        return real(state, path)

    monkeypatch.setattr(checkpoint, "save_tensors", alone)
    fit(task=task, save_every=1, keep_checkpoints=9, async_save=True)
    assert list(networks(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("full", "reached"), [(2, 4), (6, 6)])
def test_a_full_disk_in_the_background_stops_the_run_at_the_next_save_or_the_end(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: int, reached: int
) -> None:
    task, real = Watched(), checkpoint.save_tensors

    def limited(state: Any, path: Path) -> str:
        if f"step_{full:08d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(state, path)

    fit(max_steps=1)
    monkeypatch.setattr(checkpoint, "save_tensors", limited)
    kept = "step_00000001" if full == 2 else "step_00000004"
    with pytest.raises(CheckpointError, match=rf"step_{full:08d} could not be written: .*No space.*; {kept} stays in"):
        fit(task=task, save_every=2, async_save=True)
    assert task.begun[reached - 1].is_set()
    assert not task.begun[reached].is_set()
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))
    monkeypatch.undo()
    assert fit(save_every=2, async_save=True).finished


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    fit: Fit, exported: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit("whole", ToyTask(noise=0.1), save_every=2)
    fit("damaged", ToyTask(noise=0.1), save_every=2)
    flip(tmp_path / "damaged/checkpoints/step_00000006/model_00000.pt")
    assert fit("damaged", ToyTask(noise=0.1), save_every=2).finished
    assert (
        "step_00000006 is damaged: model_00000.pt is not what was written; going on from step_00000004" in caplog.text
    )
    assert losses(tmp_path / "damaged") == losses(tmp_path / "whole")
    assert_same_data(exported("damaged"), exported("whole"))
    assert choose_checkpoint(tmp_path / "damaged/checkpoints") == tmp_path / "damaged/checkpoints/step_00000006"


def test_checksums_name_every_file(fit: Fit, tmp_path: Path) -> None:
    fit(ema_decay=0.5)
    folder = tmp_path / "run/checkpoints/step_00000006"
    sums = json.loads((folder / "checksums.json").read_text())
    assert sorted([*sums, "checksums.json"]) == sorted(path.name for path in folder.iterdir())


def on_ranks(count: int, function: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """What a function of a rank and of its way to gather gives, or raises, on threads that stand for ranks."""
    values: list[Any] = [None] * count
    found: list[Any] = [None] * count
    barrier = threading.Barrier(count, timeout=WAIT_S)

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            everyone = list(values)
            barrier.wait()
            return everyone

        try:
            found[rank] = function(rank, gather)
        except CheckpointError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_agree_on_a_checkpoint_and_on_a_problem_of_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(step: int) -> list[Any]:
        def one(rank: int, gather: Callable[[Any], list[Any]]) -> Path:
            files = {f"rank_{rank:05d}.pt": {"rank": rank, "step": step}}
            return save_checkpoint(tmp_path, {"step": step}, files, rank=rank, keep=3, gather=gather)

        return on_ranks(3, one)

    def choose() -> list[Any]:
        return on_ranks(3, lambda rank, gather: choose_checkpoint(tmp_path, rank, gather))

    assert write(1) == [tmp_path / "step_00000001"] * 3
    assert write(2) == [tmp_path / "step_00000002"] * 3
    assert choose() == [tmp_path / "step_00000002"] * 3
    flip(tmp_path / "step_00000002/rank_00001.pt")
    assert choose() == [tmp_path / "step_00000001"] * 3
    real = checkpoint.save_tensors

    def full(state: Any, path: Path) -> str:
        if path.name == "rank_00002.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(state, path)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    problems = {str(problem) for problem in write(3)}
    assert len(problems) == 1
    assert "rank 2: " in problems.pop()
    assert not list(tmp_path.glob("*3*"))


def test_all_ranks_hear_of_any_error_of_one_of_them_while_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(state: Any, path: Path) -> str:
        if path.name == "rank_00001.pt":
            raise KeyError("exp_avg")
        return "0"

    def one(rank: int, gather: Callable[[Any], list[Any]]) -> Path:
        return save_checkpoint(tmp_path, {"step": 1}, {f"rank_{rank:05d}.pt": {}}, rank=rank, keep=3, gather=gather)

    monkeypatch.setattr(checkpoint, "save_tensors", failing)
    found = on_ranks(2, one)
    assert all(isinstance(problem, CheckpointError) for problem in found)
    assert all("could not be written: rank 1: KeyError: 'exp_avg'" in str(problem) for problem in found)


@pytest.mark.parametrize("where", ["network", "loader"])
def test_all_ranks_hear_of_an_error_of_one_of_them_before_they_settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    parts = {"rank_00000.pt": {"loader": {}, "random": random_state()}}
    state = {"step": 1, "seconds": 0.0, "world_size": 1, "rows_per_step": 4}
    save_checkpoint(tmp_path, state, parts, rank=0, keep=1)
    settled: list[int] = []

    def fail(failing: bool) -> None:
        if failing:
            raise ValueError("shard 7 changed")

    monkeypatch.setattr(restoring, "must_match", lambda run: {})
    monkeypatch.setattr(restoring, "restore_network", lambda engine, *_: fail(engine == 1 and where == "network"))
    monkeypatch.setattr(restoring, "settle", settled.append)

    def one(bad: int) -> Callable[..., None]:
        def act(rank: int, gather: Callable[[Any], list[Any]]) -> None:
            loader = SimpleNamespace(load_state_dict=lambda _: fail(rank == bad and where == "loader"))
            place, saver = SimpleNamespace(rank=rank), SimpleNamespace(folder=tmp_path)
            config = SimpleNamespace(seed=0)
            engines = {"model": rank if bad >= 0 else rank + 10}
            run: Any = SimpleNamespace(
                place=place, saver=saver, config=config, loader=loader, engines=engines, ema=None, rows_per_step=4
            )
            restoring.restore(run, gather)

        return act

    found = on_ranks(3, one(1))
    assert not settled
    assert all(isinstance(problem, CheckpointError) for problem in found)
    assert all(str(problem).endswith("step_00000001: rank 1: shard 7 changed") for problem in found)
    assert on_ranks(3, one(-1)) == [None] * 3
    assert sorted(settled) == [10, 11, 12]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been() -> None:
    script = [sys.executable, "benchmarks/interruptions.py", "--kills", "6", "--steps", "30", "--dry_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("6 kills") == done.stdout.count("ended with the same weights") == 2


@pytest.mark.parametrize("option", [{"keep_every": 2}, {"async_save": True}])
def test_options_that_can_not_act_without_saving_on_the_way_are_refused(fit: Fit, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{next(iter(option))} can not act without trainer\.save_every"):
        fit(**option)


def test_every_mth_checkpoint_of_a_run_stays(fit: Fit, tmp_path: Path) -> None:
    fit(save_every=1, keep_checkpoints=1, keep_every=4)
    assert list(networks(tmp_path / "run")) == [4, 6]
