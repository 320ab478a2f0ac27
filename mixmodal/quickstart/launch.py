"""Commands as processes of their own, whose output goes where ours goes, and which stop when we are stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mixmodal.environment import num_cores


def launch(command: Sequence[str], num_processes: int = 1) -> None:
    """Runs a command to its end. When this process is stopped or killed, so is the command, and it may save first.

    Raises:
        ValueError: where it fails; what it has said stands above.
    """
    supervised = [sys.executable, "-m", "mixmodal.quickstart.supervise", *command]
    child = subprocess.Popen(supervised, env=build_environment(num_processes), start_new_session=True)
    before = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if in_main:
        signal.signal(signal.SIGTERM, stop)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise ValueError(f"this command failed with exit code {code}, see above: {' '.join(map(str, command))}")


def build_environment(num_processes: int) -> dict[str, str]:
    """Ours, with the cores shared among the processes and deepspeed told when there is no accelerator."""
    import torch

    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    return environment


def mixmodal_command(*arguments: str) -> list[str]:
    """A subcommand of the console command, in this Python."""
    return [sys.executable, "-m", "mixmodal.cli", *arguments]


def deepspeed_command(num_processes: int, *arguments: str) -> list[str]:
    """A subcommand through the deepspeed launcher that is installed beside this Python.

    Raises:
        ValueError: where there is none.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if not found:
        raise ValueError("the deepspeed launcher is missing; install it with: pip install 'mixmodal[train]' (Linux)")
    options = [
        "--quiet",
        "--num_gpus",
        str(num_processes),
        "--master_port",
        str(free_port()),
        "--module",
        "mixmodal.cli",
    ]
    return [sys.executable, found, *options, *arguments]


def free_port() -> int:
    """A port that nobody listens on, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
