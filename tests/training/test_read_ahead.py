"""Reading ahead: the same micro-batches and states as without, made by a thread before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest

from mixmodal.training.read_ahead import ReadAhead


class Numbers:
    """0, 1, 2 .. up to an end; `threads` are those that asked."""

    def __init__(self, end: int = 1000, error: BaseException | None = None) -> None:
        self.next, self.end, self.error = 0, end, error
        self.made = threading.Semaphore(0)
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.threads.add(threading.current_thread().name)
        if self.next == self.end:
            raise self.error or StopIteration("enough")
        self.next += 1
        self.made.release()
        return self.next - 1

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_batches_and_states_are_those_of_the_loader(depth: int) -> None:
    ahead = ReadAhead(Numbers(), depth)
    for number in range(20):
        assert ahead.state_dict() == {"next": number}
        assert next(ahead) == number
    ahead.load_state_dict({"next": 7})
    assert ahead.state_dict() == {"next": 7}
    assert list(islice(ahead, 5)) == [7, 8, 9, 10, 11]
    ahead.close()


def test_a_thread_makes_what_nobody_has_asked_for_yet() -> None:
    numbers = Numbers()
    ahead = ReadAhead(numbers, 3)
    next(ahead)
    for _ in range(4):  # without another call of `next`
        assert numbers.made.acquire(timeout=10)
    assert not numbers.made.acquire(blocking=False)  # and no more than that
    assert threading.current_thread().name not in numbers.threads
    assert len(numbers.threads) == 1
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name in numbers.threads]


@pytest.mark.parametrize("error", [None, ValueError("a broken shard")])
def test_what_the_loader_raises_comes_in_its_place_and_stays(error: Exception | None) -> None:
    ahead = ReadAhead(Numbers(3, error), 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(type(error) if error else StopIteration, match="a broken shard" if error else "enough"):
            next(ahead)
        assert ahead.state_dict() == {"next": 3}
    ahead.load_state_dict({"next": 1})
    assert next(ahead) == 1
    ahead.close()
