"""Runs a command in a session of its own and ends all of it when told to:  python -m mixmodal.quickstart.supervise CMD

The deepspeed launcher does not pass signals on: stopped alone, it leaves the training behind. This process adopts what
the launcher leaves, sends SIGTERM to all of it when it gets SIGTERM or when its parent is killed, and waits for them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

STOP_SECONDS = 60.0
"""How long stopped processes may take to save before they are killed."""
SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def supervise(command: Sequence[str]) -> int:
    """Exit code of the command; 128 + the number of the signal that ended it or us."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(SET_CHILD_SUBREAPER, 1)
        prctl(SET_DEATH_SIGNAL, int(signal.SIGTERM))
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped:
            stopped.append(number)
            os.killpg(0, signal.SIGTERM)  # reaches us as well, once: the list is not empty any more

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    child = subprocess.Popen(command)
    code = child.wait()
    if not stopped:
        return code if code >= 0 else 128 - code
    if not wait_for_all(STOP_SECONDS):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.killpg(0, signal.SIGKILL)
    return 128 + stopped[0]


def wait_for_all(seconds: float) -> bool:
    """Reaps children, adopted ones too, until there is none; False where that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if not found:
            time.sleep(0.05)
    return False


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
