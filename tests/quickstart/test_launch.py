"""Commands as processes of their own: their failure is ours, and being stopped reaches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmodal.quickstart import launch as launching
from mixmodal.quickstart.launch import build_environment, deepspeed_command, launch, mixmodal_command


def test_a_command_that_fails_names_itself_and_its_exit_code() -> None:
    launch([sys.executable, "-c", "pass"])
    with pytest.raises(ValueError, match=r"failed with exit code 3, see above: .*sys.exit"):
        launch([sys.executable, "-c", "import sys; sys.exit(3)"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_stops_its_command_and_lets_it_save(tmp_path: Path, number: signal.Signals) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        f"save = lambda *_: (time.sleep(0.2), pathlib.Path({str(saved)!r}).touch(), sys.exit(0))\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    # a launcher between, as deepspeed's, that passes no signal on
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    program = f"import sys; from mixmodal.quickstart.launch import launch; launch([sys.executable, '-c', {launcher!r}])"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as run:
        while not ready.exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(number)
        assert run.wait(30) != 0
    assert saved.exists() or number == signal.SIGKILL  # a stopped run waits, a killed one can not
    deadline = time.monotonic() + 10
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert saved.exists()


def test_ranks_of_this_process_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "num_cores", lambda: 4)
    environment = build_environment(num_processes=2)
    assert "RANK" not in environment
    assert environment.get("OMP_NUM_THREADS", "2") == "2"
    assert os.environ["RANK"] == "3"


def test_commands_use_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixmodal_command("inspect") == [sys.executable, "-m", "mixmodal.cli", "inspect"]
    (tmp_path / "deepspeed").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    command = deepspeed_command(2, "pretrain", "--config", "a.yaml")
    assert command[:2] == [str(tmp_path / "python"), str(tmp_path / "deepspeed")]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[-5:] == ["--module", "mixmodal.cli", "pretrain", "--config", "a.yaml"]


def test_a_missing_launcher_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install 'mixmodal\[train\]'"):
        deepspeed_command(1)
