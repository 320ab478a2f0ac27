"""Stages are done once, again when something they follow from has changed, and go on where they were interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixmodal.quickstart import runner
from mixmodal.quickstart.runner import Stage, StageRunner, Watch, open_run, tree_memory_bytes
from mixmodal.quickstart.stages import QuickstartConfig, quickstart


class Chain:
    """Two stages, of which the second reads the first; `calls` tells which were done."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.calls: list[str] = []
        self.fail = False
        self.said: list[str] = []

    def complete(self, first: int = 1, second: int = 1) -> list[str]:
        self.calls = []
        stages = [
            self.stage("first", {"seed": first}),
            self.stage("second", {"seed": second}, inputs=("first",)),
        ]
        self.runner = StageRunner(self.run, stages)
        self.runner.complete(self.said.append)
        return self.calls

    def interrupt(self) -> None:
        """An attempt that fails in the second stage."""
        self.fail = True
        with pytest.raises(ValueError, match="interrupted"):
            self.complete()
        self.fail = False

    def stage(self, name: str, config: dict[str, Any], inputs: tuple[str, ...] = ()) -> Stage:
        folder = self.run / name

        def complete() -> None:
            folder.mkdir(exist_ok=True)
            self.calls.append(f"{name} after {len(list(folder.iterdir()))}")
            (folder / str(time.monotonic_ns())).touch()
            if self.fail and name == "second":
                raise ValueError("interrupted")

        return Stage(
            name=name, complete=complete, results=(folder,), config=config, inputs=inputs, command=f"do {name}"
        )


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_finished_stages_are_skipped(chain: Chain) -> None:
    assert chain.complete() == ["first after 0", "second after 0"]
    assert chain.complete() == []
    assert chain.said[-1] == "[2/2] second: done before, skipped"


def test_a_changed_config_redoes_the_stage_from_an_empty_folder_and_all_that_read_it(chain: Chain) -> None:
    chain.complete()
    assert chain.complete(second=2) == ["second after 0"]
    assert chain.complete(first=2, second=2) == ["first after 0", "second after 0"]


def test_a_lost_result_is_made_again(chain: Chain) -> None:
    chain.complete()
    (next((chain.run / "second").iterdir())).unlink()
    (chain.run / "second").rmdir()
    assert chain.complete() == ["second after 0"]


def test_an_interrupted_stage_finds_what_it_has_left(chain: Chain) -> None:
    chain.interrupt()
    assert chain.complete() == ["second after 1"]


def test_an_attempt_with_another_config_is_thrown_away(chain: Chain) -> None:
    chain.interrupt()
    assert chain.complete(second=2) == ["second after 0"]


def test_seconds_count_interrupted_attempts_too(chain: Chain) -> None:
    chain.complete()
    attempt = chain.run / "stages" / "second.attempt.json"
    marker = json.loads((chain.run / "stages" / "second.json").read_text())
    (chain.run / "stages" / "second.json").unlink()
    attempt.write_text(json.dumps({**marker, "seconds": 100.0, "peak_memory_bytes": 2**50}))
    chain.complete()
    second = chain.runner.markers()[1]
    assert 100 < second["seconds"] < 110
    assert second["peak_memory_bytes"] == 2**50
    assert not attempt.exists()
    assert [marker["name"] for marker in chain.runner.markers(skip=["first"])] == ["second"]


def test_a_broken_marker_is_named(chain: Chain) -> None:
    chain.complete()
    (chain.run / "stages" / "second.json").write_text("{")
    with pytest.raises(ValueError, match=r"second.json: not JSON .* delete it"):
        chain.complete()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_memory_counts_descendants() -> None:
    alone = tree_memory_bytes(__import__("os").getpid())
    program = "x = bytearray(200_000_000); print('ready', flush=True); input()"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with Watch(lambda seconds, peak: None) as watch:
            child.communicate(b"\n")
    assert watch.peak_memory_bytes - alone > 190_000_000


def test_a_watch_notes_time_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[float] = []
    with pytest.raises(KeyboardInterrupt), Watch(lambda seconds, peak: notes.append(seconds)) as watch:
        raise KeyboardInterrupt
    assert len(notes) == 2
    assert watch.seconds == notes[-1] < 5
    assert runner.largest_memory_bytes() > 10_000_000


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    runner.write_json(tmp_path / "a.json", {"rates": [float("nan"), 0.5], "name": "nan"})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "rates": [None, 0.5],
        "name": "nan",
    }


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "project" / "data" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ValueError, match=r"project is not empty and holds no quickstart run; choose another --out"):
        quickstart(QuickstartConfig(out=tmp_path / "project"))
    assert mine.read_text() == "years of work"
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["data"]
    with pytest.raises(ValueError, match=r"mine.txt is a file; choose another --out"):
        open_run(mine)


def test_a_run_is_opened_again_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for run in (tmp_path / "new" / "run", tmp_path / "empty"):
        open_run(run)
        (run / "configs").mkdir()
        open_run(run)
