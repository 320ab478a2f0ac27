"""The stub model, a picture for it, and the page of it in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from stub_model import StubModel


@pytest.fixture
def stub() -> StubModel:
    return StubModel()


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """The file of a picture of 60 x 40 pixels."""
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((60, 40)).save(path)
    return str(path)


class Server(NamedTuple):
    """A page that is served.

    Args:
        url: of it.
        status: file that the process tells its counters in.
        process: that serves.
    """

    url: str
    status: Path
    process: subprocess.Popen

    def counters(self) -> dict[str, float]:
        """What the model has been asked by now."""
        return json.loads(self.status.read_text())

    def wait(self, is_so: Callable[[dict[str, float]], bool], timeout_s: float = 60) -> dict[str, float]:
        """The counters as soon as they are as wanted."""
        end = time.monotonic() + timeout_s
        while not is_so(found := self.counters()):
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function of the seconds of a step of the stub model: serves the page. Skips where gradio is absent."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    processes: list[subprocess.Popen] = []

    def start(step_s: float = 0.0) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        status, log = tmp_path / f"{port}.json", tmp_path / f"{port}.log"
        command = [sys.executable, str(Path(__file__).with_name("stub_server.py")), str(port), str(status), str(step_s)]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        processes.append(process)
        end = time.monotonic() + 120
        while "serving" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        return Server(f"http://127.0.0.1:{port}", status, process)

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)
