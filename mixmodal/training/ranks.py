"""The processes of one training: they meet, they watch each other, and they say who is missing.

A collective on a GPU waits for a process that has died until its time is up, half an hour by default. Here every
process counts in the launcher's store once a second. Rank 0, which holds the store, looks whether all of them go on;
the others look at rank 0, and at what it has found.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

JOIN_S = 300.0
"""Seconds that processes wait for each other at the start."""
BEAT_S = 1.0
PATIENCE_S = 30.0
"""Seconds without a beat after which a process counts as dead; `HURRY_S` where a collective has failed, too."""
HURRY_S = 5.0
GRACE_S = 5.0
"""Seconds that the main thread has to end by itself once a process is missing."""
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What torch says where a collective fails since another process has gone."""


class RankError(ValueError):
    """A process of the training is missing or has failed; the message says which, and on which host."""


def launched() -> int:
    """Processes of this training, as the launcher's environment tells; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def meet(backend: str, device: torch.device | None = None, join_s: float = JOIN_S) -> None:
    """Makes the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Args:
        backend: of torch.distributed.
        device: that NCCL is bound to.
        join_s: seconds to wait for the others.

    Raises:
        RankError: naming the ranks that have not come in `join_s` seconds, and their hosts.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which listens already
    store = connect(join_s, listens=rank == 0 and not agent)
    store.set(f"host/{rank}", socket.gethostname())
    if rank == 0:
        wait_for(store, world_size, join_s)
        store.set("complete", "1")
    else:
        try:
            store.wait(["complete"], timedelta(seconds=join_s + 2 * GRACE_S))
        except (dist.DistError, RuntimeError) as error:
            raise RankError(
                f"rank {rank}: rank 0 waited for others that did not come; its message names them"
            ) from error
    timeout = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "30")))  # as DeepSpeed reads it
    group = dist.PrefixStore("group", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=timeout, device_id=device)


def connect(timeout_s: float, listens: bool = False) -> Any:
    """A connection of its own to the launcher's store.

    Raises:
        RankError: naming the address where nobody listens.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, is_master=listens, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        rank = os.environ.get("RANK", "0")
        does = "can not listen on" if listens else "can not reach rank 0 at"
        raise RankError(f"rank {rank} {does} {address}:{port} (MASTER_ADDR, MASTER_PORT): {reason}") from error


def wait_for(store: Any, world_size: int, join_s: float) -> None:
    """Waits until all ranks have written their host into the store.

    Raises:
        RankError: naming those that have not, and their hosts.
    """
    end = time.monotonic() + join_s
    missing = list(range(world_size))
    while True:
        missing = [rank for rank in missing if not store.check([f"host/{rank}"])]
        if not missing:
            return
        if time.monotonic() > end:
            break
        time.sleep(min(0.2, join_s / 10))
    hosts = launched_hosts()
    absent = ", ".join(dict.fromkeys(hosts[rank] for rank in missing)) if len(hosts) == world_size else ""
    where = f" on {absent}" if absent else ""
    raise RankError(
        f"{listed(missing)}{where} did not come within {join_s:g} s; {world_size - len(missing)} of {world_size} "
        "processes are here. Is the host up and reachable, and has the command been started there?"
    )


def listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def launched_hosts() -> list[str]:
    """The host of each rank, as DeepSpeed's launcher, our parent, was told; empty where it is not our parent."""
    try:
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        info = next(part.partition("=")[2] for part in arguments if part.startswith("--world_info="))
        return [host for host, slots in json.loads(base64.urlsafe_b64decode(info)).items() for _ in slots]
    except (OSError, StopIteration, ValueError):
        return []


class RankWatch:
    """While entered, ends this process where another one has died, and says which.

    A main thread that a broken collective throws out gets a `RankError` instead; one that waits in a collective for
    ever is ended with its process.

    Args:
        rank: of this process.
        world_size: processes; a single one has nobody to watch.
        patience_s: seconds without a sign of life after which a process counts as dead.
    """

    _count = 0

    def __init__(self, rank: int, world_size: int, patience_s: float = PATIENCE_S) -> None:
        self.rank, self.world_size, self.patience_s = rank, world_size, patience_s
        self.found: str | None = None
        """What is wrong with which rank."""
        self._failure: str | None = None
        self._ending, self._known = threading.Event(), threading.Event()
        self._claimed, self._hurries = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RankWatch:
        RankWatch._count += 1
        self._prefix = f"watch/{RankWatch._count}"  # a process may train several times
        if self.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._claimed.set()
        broken = isinstance(error, RuntimeError) and any(sign in str(error) for sign in BROKEN)
        if broken:
            self._hurries.set()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends us, but who is missing is said first
            self._known.wait(2 * HURRY_S)
        if error is not None:
            self._failure = f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
        self._ending.set()
        self._thread.join(GRACE_S)
        if broken and self.found:
            raise RankError(f"{self.found}; the same command goes on from the last checkpoint") from error

    def _watch(self) -> None:
        host = socket.gethostname()
        try:
            store = connect(self.patience_s)
            store.set(f"{self._prefix}/host/{self.rank}", host)
            number = 0
            while not self._ending.wait(BEAT_S):
                number += 1
                store.set(f"{self._prefix}/beat/{self.rank}", str(number))
                if self._hurries.is_set():
                    store.set(f"{self._prefix}/hurry", "1")
                self.found = self._look(store)
                if self.found:
                    break
            if self._failure and not store.check([f"{self._prefix}/lost"]):
                store.set(f"{self._prefix}/lost", f"rank {self.rank} on {host} {self._failure}")
            store.set(f"{self._prefix}/beat/{self.rank}", "left")
        except (dist.DistError, RuntimeError, RankError):
            if not self._ending.is_set():
                self.found = f"rank 0 on {os.environ['MASTER_ADDR']} no longer answers"
        self._known.set()
        if self.found and not self._ending.wait(GRACE_S) and not self._claimed.is_set():
            print(f"rank {self.rank} ends: {self.found}", file=sys.stderr, flush=True)
            os._exit(1)

    def _look(self, store: Any) -> str | None:
        """What is wrong with which rank, if anything."""
        if store.check([f"{self._prefix}/lost"]):
            return store.get(f"{self._prefix}/lost").decode()
        if self.rank:
            return None
        now = time.monotonic()
        patience = min(self.patience_s, HURRY_S) if store.check([f"{self._prefix}/hurry"]) else self.patience_s
        for rank in range(1, self.world_size):
            key = f"{self._prefix}/beat/{rank}"
            beat = store.get(key) if store.check([key]) else b""
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
            silent = now - self._seen[rank][1]
            if beat != b"left" and silent > patience:
                key = f"{self._prefix}/host/{rank}"
                host = store.get(key).decode() if store.check([key]) else "an unknown host"
                found = f"rank {rank} on {host} has not answered for {silent:.0f} s"
                store.set(f"{self._prefix}/lost", found)
                return found
        return None
