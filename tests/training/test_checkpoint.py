"""Checkpoints are whole or absent, whatever kills the process or fills the disk, and hold data only."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.training import checkpoint
from mixmodal.training.checkpoint import (
    CheckpointError,
    choose_checkpoint,
    find_damage,
    load_tensors,
    read_json,
    save_tensors,
)
from mixmodal.training.randomness import random_state, set_random_state, set_seeds
from mixmodal.training.saving import save_checkpoint


def save(folder: Path, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    files = {
        "weights.pt": {"weights": torch.full((4,), float(step))},
        "rank_00000.pt": {"loader": {"count": step}},
        "ema.pt": {"w": torch.zeros(2)},
    }
    return save_checkpoint(folder, {"step": step}, files, rank=0, keep=keep, keep_every=keep_every)


def assert_whole(folder: Path, step: int) -> None:
    found = choose_checkpoint(folder)
    assert found == folder / f"step_{step:08d}"
    assert read_json(found / "state.json")["step"] == step
    assert load_tensors(found / "weights.pt")["weights"].tolist() == [step] * 4
    assert load_tensors(found / "rank_00000.pt")["loader"] == {"count": step}
    assert load_tensors(found / "ema.pt")["w"].tolist() == [0, 0]


KILLED_WHILE_SAVING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import assert_whole, save
import signal

folder = Path(sys.argv[2])
save(folder, 1)
calls = ("fsync", "replace")
kept, point = 0, 0
while True:
    point += 1
    child = os.fork()
    if child == 0:
        left = point
        def counted(function):
            def call(*arguments, **options):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)
            return call
        for name in calls:
            setattr(os, name, counted(getattr(os, name)))
        save(folder, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    step = int((folder / "latest").read_text().strip()[-1])
    assert_whole(folder, step)
    kept += step == 1
    if step == 2:  # killed behind the last write: begin anew
        (folder / "latest").write_text("step_00000001")
assert_whole(folder, 2)
print(point - 1, kept)
"""


def test_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(Path(__file__).parent), str(tmp_path / "checkpoints")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    points, kept_old = map(int, done.stdout.split())
    assert points > 10
    assert 0 < kept_old < points  # some died before `latest` was written, some behind it


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_gives_one_message_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(tmp_path, 1)
    real: Callable[..., Any] = getattr(os, call)
    left = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    failures = 0
    for point in range(1, 20):
        left = point
        monkeypatch.setattr(os, call, failing)
        try:
            save(tmp_path, 2)
            break
        except CheckpointError as error:
            failures += "No space left on device" in str(error)
        finally:
            monkeypatch.setattr(os, call, real)
        pointer = (tmp_path / "latest").read_text().strip()
        assert_whole(tmp_path, int(pointer[-1]))
        (tmp_path / "latest").write_text("step_00000001\n")
    assert failures > 1
    assert_whole(tmp_path, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_what_torch_can_not_write_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        save_tensors({"weights": torch.zeros(100_000)}, Path("/dev/full"))


def test_a_trainer_on_a_full_disk_keeps_the_checkpoint_in_force(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(max_steps=1)

    def full(state: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("mixmodal.training.checkpoint.save_tensors", full)
    with pytest.raises(CheckpointError, match=r"No space left .*; step_00000001 stays in force"):
        fit(max_steps=2)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000001"]
    monkeypatch.undo()
    assert fit(max_steps=2).finished


@pytest.mark.slow
def test_a_training_process_killed_while_saving_goes_on_from_the_last_checkpoint(
    fit: Callable[..., Any], exported: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    here = Path(__file__).parent
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import mixmodal.training.checkpoint as checkpoint\n"
        "real = checkpoint.save_tensors\n"
        "def killed(state, path):\n"
        "    digest = real(state, path)\n"
        "    if '00000004' in str(path):\n"
        "        os.truncate(path, os.path.getsize(path) // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return digest\n"
        "checkpoint.save_tensors = killed\n"
        "sys.argv = ['launched.py', sys.argv[1], '{\"save_every\": 2}']\n"
        f"exec(compile(Path({str(here / 'launched.py')!r}).read_text(), 'launched.py', 'exec'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here}"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment, timeout=120)
    assert done.returncode == -9
    assert (tmp_path / "killed/checkpoints/latest").read_text().strip() == "step_00000002"
    fit("killed", save_every=2)
    fit("whole")
    assert all(torch.equal(exported("killed")[name], value) for name, value in exported("whole").items())
    assert not list((tmp_path / "killed/checkpoints").glob("*.partial"))


def test_only_data_is_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"weights": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt can not be loaded"):
        load_tensors(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("length", [0, 10, 300])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, length: int) -> None:
    save_tensors({"weights": torch.zeros(100)}, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", length)
    with pytest.raises(CheckpointError, match=r"cut\.pt can not be loaded"):
        load_tensors(tmp_path / "cut.pt")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights.pt is not what was written": lambda folder: flip(folder / "weights.pt"),
    "state.json is not what was written": lambda folder: flip(folder / "state.json"),
    "ema.pt can not be read": lambda folder: (folder / "ema.pt").unlink(),
    "checksums.json is missing or can not be read": lambda folder: (folder / "checksums.json").unlink(),
    "checksums.json does not name state.json": lambda folder: (folder / "checksums.json").write_text("{}"),
    "step_00000003 is damaged": shutil.rmtree,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_of_damaged_checkpoints_the_one_before_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, message: str
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    DAMAGES[message](tmp_path / "step_00000003")
    assert choose_checkpoint(tmp_path) == tmp_path / "step_00000002"
    (line,) = [record.getMessage() for record in caplog.records]
    assert message in line
    assert "step_00000003 is damaged" in line
    assert "going on from step_00000002 instead" in line
    flip(tmp_path / "step_00000002" / "weights.pt")
    assert choose_checkpoint(tmp_path) == tmp_path / "step_00000001"


def test_where_no_checkpoint_is_whole_all_are_named(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "weights.pt")
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: weights\.pt .*step_00000001 is damaged"):
        choose_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"the best one", b"\xff\xfe"])
def test_where_none_is_in_force_the_newest_whole_one_is_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    assert choose_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    (tmp_path / "step_00000003" / "state.json").write_text("{}")
    assert choose_checkpoint(tmp_path) == tmp_path / "step_00000002"
    assert "latest names no checkpoint" in caplog.text
    assert "step_00000003 is damaged" in caplog.text


def test_a_pointer_that_was_set_back_is_followed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "latest").write_text("step_00000002\n")
    assert choose_checkpoint(tmp_path) == tmp_path / "step_00000002"


def test_every_rank_checks_a_part_of_the_files(tmp_path: Path) -> None:
    flip(save(tmp_path, 1) / "weights.pt")
    checksums = read_json(tmp_path / "step_00000001/checksums.json")
    found = [find_damage(tmp_path / "step_00000001", rank, lambda _: [(checksums, "")] * 3) for rank in range(3)]
    assert sorted(found) == [[], [], ["weights.pt is not what was written"]]


def test_pruning_keeps_the_newest_and_the_one_in_force(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep=9)
    (tmp_path / "latest").write_text("step_00000002\n")
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004"]


def test_every_mth_checkpoint_stays(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=2, keep_every=3)
    assert [path.name[-1] for path in sorted(tmp_path.glob("step_*"))] == ["3", "6", "7"]


def test_checkpoints_from_before_one_went_back_do_not_push_out_the_new_ones(tmp_path: Path) -> None:
    for step in (1, 2, 8, 9):
        save(tmp_path, step, keep=4)
    (tmp_path / "latest").write_text("step_00000002\n")
    for step in (3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name[-1] for path in sorted(tmp_path.glob("step_*"))] == ["3", "4", "8", "9"]


def test_random_state_goes_to_disk_and_back(tmp_path: Path) -> None:
    set_seeds(5)
    save_tensors(random_state(), tmp_path / "random.pt")
    wanted = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn()]
    set_seeds(6)
    assert torch.rand(3).tolist() != wanted[0]
    set_random_state(load_tensors(tmp_path / "random.pt"))
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn()] == wanted


def test_a_state_that_can_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['loader'\]\['order'\]\[1\] is a ndarray"):
        checkpoint.check_plain({"loader": {"order": [1, np.zeros(2)]}}, "state")
