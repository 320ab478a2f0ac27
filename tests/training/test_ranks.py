"""Processes that meet, and that say who is missing."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from test_launcher import HERE, ROOT, curve, environment, free_port

from mixmodal.training import ranks
from mixmodal.training.ranks import RankError, RankWatch, launched_hosts, meet, wait_for

BROKEN = RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6572")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher's store, and a heart that beats fast."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, seconds in {"BEAT_S": 0.02, "HURRY_S": 0.2, "GRACE_S": 0.2}.items():
        monkeypatch.setattr(ranks, name, seconds)
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def watch(monkeypatch: pytest.MonkeyPatch, rank: int, patience_s: float = 0.3) -> RankWatch:
    monkeypatch.setattr(RankWatch, "_count", 0)  # as if it were a process of its own
    return RankWatch(rank, 2, patience_s)


def wait_until(holds: Any) -> None:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def test_those_who_do_not_come_are_named_with_their_host(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set("host/0", "a")
    store.set("host/2", "b")
    said = r"^ranks 1, 3 did not come within 0\.05 s; 2 of 4 processes are here"
    with pytest.raises(RankError, match=said):
        wait_for(store, 4, 0.05)
    monkeypatch.setattr(ranks, "launched_hosts", lambda: ["one", "one", "two", "two"])
    store.set("host/1", "a")
    with pytest.raises(RankError, match=r"^rank 3 on two did not come"):
        wait_for(store, 4, 0.05)


def test_a_host_that_can_not_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RankError, match=rf"^rank 1 can not reach rank 0 at 127\.0\.0\.1:{port} \(MASTER_ADDR"):
        meet("gloo", join_s=0.2)
    monkeypatch.setenv("RANK", "0")
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(RankError, match=rf"can not listen on 127\.0\.0\.1:{port}"):
            meet("gloo", join_s=0.2)


def test_the_hosts_are_those_that_the_launcher_was_told() -> None:
    told = base64.urlsafe_b64encode(json.dumps({"127.0.0.1": [0, 1], "10.0.0.2": [0]}).encode()).decode()
    child = "from mixmodal.training.ranks import launched_hosts; print(launched_hosts())"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", program, f"--world_info={told}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert done.stdout == "['127.0.0.1', '127.0.0.1', '10.0.0.2']\n"
    assert launched_hosts() == []


def test_a_silent_rank_is_named_where_a_collective_breaks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set("watch/1/host/1", "b")
    said = r"^rank 1 on b has not answered for \d+ s; the same command goes on"
    with pytest.raises(RankError, match=said) as caught, watch(monkeypatch, 0, patience_s=60.0):
        raise BROKEN
    assert caught.value.__cause__ is BROKEN


def test_a_process_that_waits_for_a_silent_rank_is_ended(
    store: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with watch(monkeypatch, 0):
        assert ended.wait(5)
    assert "rank 0 ends: rank 1 on an unknown host has not answered" in capfd.readouterr().err


def test_what_a_rank_failed_of_reaches_the_others(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = watch(monkeypatch, 0, patience_s=60.0)
    host = socket.gethostname()
    other.__enter__()
    with pytest.raises(ValueError, match="damaged"), watch(monkeypatch, 1):
        raise ValueError("shard a.tar is damaged\nat byte 7")
    with pytest.raises(RankError, match=rf"^rank 1 on {host} failed: shard a\.tar is damaged"):
        other.__exit__(RuntimeError, BROKEN, None)


def test_those_who_leave_in_order_are_not_missed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watch(monkeypatch, 0, patience_s=0.1) as first:
        with watch(monkeypatch, 1):
            wait_until(lambda: len(first._seen) == 1)
        time.sleep(0.3)
        assert first.found is None


def test_an_error_of_our_own_stays_what_it_is(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), watch(monkeypatch, 0, patience_s=60.0):
        raise RuntimeError("CUDA out of memory")


def test_a_lost_store_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "HURRY_S", 30.0)  # the most that a busy machine may take; what is known is said at once
    said = r"^rank 0 on 127\.0\.0\.1 no longer answers"
    with pytest.raises(RankError, match=said), watch(monkeypatch, 1, patience_s=0.1):
        raise BROKEN


def test_one_process_watches_nobody() -> None:
    with RankWatch(0, 1) as alone:
        assert alone._thread is None


def on_two_hosts(tmp_path: Path, options: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """DeepSpeed's launchers on two hosts of one process each, 127.0.0.1 and 127.0.0.2."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), "--no_ssh"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    rest = [str(HERE / "launched.py"), str(tmp_path / "two"), json.dumps(options)]
    return [
        subprocess.Popen(
            [*command, "--node_rank", str(node), *rest],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]


def end(launcher: subprocess.Popen[str]) -> None:
    """A launcher waits for children that are stopped."""
    if launcher.poll() is None:
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
    launcher.communicate(timeout=60)


@pytest.mark.slow
def test_two_hosts_train_as_one(fit: Any, tmp_path: Path) -> None:
    fit("one", max_steps=3)
    hosts = on_two_hosts(tmp_path, {"max_steps": 3, "micro_batch_size": 4})
    said = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-6)  # worst seen: 9e-8


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, 0], ids=["killed", "stopped", "failed"])
def test_a_rank_that_dies_ends_the_others_within_a_minute(tmp_path: Path, number: int) -> None:
    first, second = on_two_hosts(tmp_path, {"max_steps": 100000, "killed": [1, 20, int(number)]})
    said = first.communicate(timeout=240)[0]
    seconds = time.time() - (tmp_path / "two/metrics.jsonl").stat().st_mtime  # since the last step
    end(second)
    print(f"{seconds:.0f} s after the last step")
    wanted = "has not answered for" if number else "failed: shard a.tar is damaged"
    assert f"rank 1 on {socket.gethostname()} {wanted}" in said
    assert first.returncode
    assert seconds < 60
