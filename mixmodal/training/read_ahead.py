"""Micro-batches that a thread makes while the model is busy, with the state that each of them leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mixmodal.training.task import Batch, Loader


class ReadAhead:
    """A loader whose next micro-batches are in the making: the same ones, with the same states, as without it.

    One thread calls the loader, one micro-batch after the other. The model's operations let it go on, since they give
    up the interpreter's lock, as does waiting for a device.

    Args:
        loader: used by this object alone from here on; it must not draw from the global generators.
        depth: micro-batches that are made before they are asked for.
    """

    def __init__(self, loader: Loader, depth: int) -> None:
        self._loader, self._depth = loader, depth
        self._state = loader.state_dict()
        self._made: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; what the loader raises is raised where its micro-batch would have come."""
        while len(self._made) <= self._depth:
            self._made.append(self._thread.submit(self._make))
        batch, self._state = self._made[0].result()
        self._made.popleft()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """That of the loader before the micro-batch that is next here."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drop()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """Ends the thread."""
        self._drop()
        self._thread.shutdown()

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        return next(self._loader), self._loader.state_dict()

    def _drop(self) -> None:
        """Forgets what is made, when the thread rests."""
        for future in self._made:
            if not future.cancel():
                future.exception()
        self._made.clear()
