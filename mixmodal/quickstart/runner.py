"""Stages that are done once: each leaves a marker, and is done again only when its config or an input has changed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mixmodal import records

MARKER_VERSION = 1
STAGES = "stages"
"""Folder of the markers; a folder without it is no run."""
SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a chain.

    Args:
        name: of the stage; its marker is `stages/NAME.json`.
        complete: does the work; it may find what an interrupted attempt with the same config has left.
        results: files and folders that the stage writes. An attempt with another config or other inputs begins
            without them.
        config: plain data from which the work follows.
        inputs: names of the stages whose results it reads.
        command: what a person types to do this stage by hand.
    """

    name: str
    complete: Callable[[], None]
    results: tuple[Path, ...]
    config: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    command: str = ""


def open_run(run: Path) -> None:
    """Makes the folder of a run, or finds it; a stage removes what is in the way of its results, so no other will do.

    Raises:
        ValueError: for a folder that holds something else than a run, or a file.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; choose another --out")
    stages = run / STAGES
    if run.exists() and not stages.is_dir() and any(run.iterdir()):
        raise ValueError(f"{run} is not empty and holds no quickstart run; choose another --out")
    stages.mkdir(parents=True, exist_ok=True)


class StageRunner:
    """Completes stages in order and keeps their markers in `run/stages/`."""

    def __init__(self, run: Path, stages: Iterable[Stage]) -> None:
        self.stages = list(stages)
        self._folder = run / STAGES

    def complete(self, say: Callable[[str], None]) -> None:
        """Completes what is not done yet; `say` gets a line at the start and the end of every stage."""
        for number, stage in enumerate(self.stages, start=1):
            title = f"[{number}/{len(self.stages)}] {stage.name}"
            digest = self._digest(stage)
            if self._is_done(stage, digest):
                say(f"{title}: done before, skipped")
                continue
            say(f"{title} ...\n      {stage.command}")
            marker = self._attempt(stage, digest)
            peak = marker["peak_memory_bytes"] / 1024**3
            say(f"{title}: done in {marker['seconds']:.1f} s, peak memory {peak:.2f} GiB")

    def markers(self, skip: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Markers of the stages that are done: `name`, `seconds`, `peak_memory_bytes`, `command`, `digest`."""
        wanted = [stage for stage in self.stages if stage.name not in set(skip)]
        return [self._read(self._marker(stage.name)) for stage in wanted if self._marker(stage.name).exists()]

    def _attempt(self, stage: Stage, digest: str) -> dict[str, Any]:
        attempt = self._folder / f"{stage.name}.attempt.json"
        earlier = self._read(attempt) if attempt.exists() else {}
        if earlier.get("digest") != digest:
            for result in stage.results:
                remove(result)
            earlier = {}
        self._marker(stage.name).unlink(missing_ok=True)

        def note(seconds: float, peak_memory_bytes: int) -> dict[str, Any]:
            """Time and memory with those of an interrupted attempt, so that the sums stay honest."""
            return {
                "name": stage.name,
                "digest": digest,
                "seconds": seconds + earlier.get("seconds", 0.0),
                "peak_memory_bytes": max(peak_memory_bytes, earlier.get("peak_memory_bytes", 0)),
                "command": stage.command,
            }

        with Watch(lambda seconds, peak: write_json(attempt, note(seconds, peak))) as watch:
            stage.complete()
        marker = note(watch.seconds, watch.peak_memory_bytes)
        write_json(self._marker(stage.name), marker)
        attempt.unlink(missing_ok=True)
        return marker

    def _is_done(self, stage: Stage, digest: str) -> bool:
        marker = self._marker(stage.name)
        whole = marker.exists() and all(result.exists() for result in stage.results)
        return whole and self._read(marker)["digest"] == digest

    def _digest(self, stage: Stage) -> str:
        """Of the config and of the markers of the inputs: a stage that was done again asks its readers to follow."""
        inputs = {name: hashlib.sha256(self._marker(name).read_bytes()).hexdigest() for name in stage.inputs}
        content = {"version": MARKER_VERSION, "config": stage.config, "inputs": inputs}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _marker(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); delete it to do this stage again") from error


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Watch:
    """Measures wall time and memory of this process and all its descendants while the body of a `with` runs.

    Args:
        note: called with seconds and peak memory in bytes, at the start and then about every 2 s.
    """

    def __init__(self, note: Callable[[float, int], object]) -> None:
        self.peak_memory_bytes = 0
        self.seconds = 0.0
        self._note = note
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._start = time.monotonic()
        self._measure()
        self._note(self.seconds, self.peak_memory_bytes)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._measure()
        if error is not None:
            self._note(self.seconds, self.peak_memory_bytes)

    def _sample(self) -> None:
        noted = time.monotonic()
        while not self._stop.wait(SAMPLE_SECONDS):
            self._measure()
            if time.monotonic() - noted > 2:
                noted = time.monotonic()
                self._note(self.seconds, self.peak_memory_bytes)

    def _measure(self) -> None:
        self.seconds = time.monotonic() - self._start
        self.peak_memory_bytes = max(self.peak_memory_bytes, tree_memory_bytes(os.getpid()))


def tree_memory_bytes(root: int) -> int:
    """Resident memory of a process and all its descendants at this moment; pages they share count in each of them.

    Without /proc: the largest size so far of this process and of a child.
    """
    if not os.path.isdir("/proc/self"):
        return largest_memory_bytes()
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += _resident_bytes(process)
        waiting += children.get(process, [])
    return total


def largest_memory_bytes() -> int:
    """The largest resident size that this process ever had, plus that of its largest child that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit


def _parent(process: str) -> int | None:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):  # it has ended meanwhile
        return None


def _resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def write_json(path: Path, data: object) -> None:
    """`records.write_json`; numbers that are not finite become null, which JSON has."""
    records.write_json(path, _finite(data))


def _finite(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
