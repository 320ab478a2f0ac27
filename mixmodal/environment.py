"""What a figure was measured with: commit, versions, device."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "faiss-cpu", "numpy", "sentencepiece", "vector-quantize-pytorch", "webdataset")


COMMIT_VARIABLE = "MIXMODAL_COMMIT"
"""Environment variable that names the commit of a copy of the source tree whose git history is not its own."""


def commit() -> str:
    """What `MIXMODAL_COMMIT` says; else the commit of the source tree, `+` behind it where tracked files differ.

    "unknown" outside a git clone. The variable comes first: a copy of a tree can lie in a clone of something else.
    """
    root = Path(__file__).resolve().parents[1]
    told = os.environ.get(COMMIT_VARIABLE, "unknown")
    if told != "unknown" or not (root / ".git").exists():
        return told
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}+" if _git(root, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):  # no git here, or a clone that it does not trust
        return told


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of python, this package and the libraries that figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("mixmodal", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device(kind: str | None = None) -> str:
    """The accelerator, else the processor and the number of cores that this process may use.

    Args:
        kind: `cpu` names the processor, also where there is an accelerator.
    """
    import torch

    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {num_cores()} cores"


def choose_device(name: str, key: str = "device") -> str:
    """A device that torch can compute on here: for `auto` the accelerator where there is one, else the processor.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        key: of the option, for messages.

    Raises:
        ValueError: naming the option, for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise ValueError(f"{key} is {name!r}, which torch does not have here; it has {there}, or take auto") from error
    return name


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take without swapping, within a container's limit; None where unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit ("max"), or other groups than those of version 2
        return free
    return min(free, max(0, limit - int(used["anon"])))
