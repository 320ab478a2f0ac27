"""Stopping at the end of a step instead of in its middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """While entered, SIGTERM and SIGINT only set `name`; a second SIGINT interrupts at once.

    Outside the main thread, where Python does not allow signal handlers, it does nothing.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name == signal.Signals.SIGINT.name == signal.Signals(number).name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
