"""What a run takes: parameters that are trained, and memory at its peak."""

from __future__ import annotations

import json
import resource
import sys
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mixmodal.files import write_whole
from mixmodal.training.trainable import TRAINED_ROWS

RESOURCES = "resources.json"
"""File of a run folder: `parameters`, `trained_parameters`, `peak_memory_bytes` and `device`."""


class Parameters(NamedTuple):
    """Of a network, each counted once: in all, and those that are trained, of some matrices a few rows alone."""

    parameters: int
    trained_parameters: int


def count_parameters(network: nn.Module) -> Parameters:
    """Counts before an engine takes the network."""
    total = trained = 0
    for parameter in network.parameters():
        packed = getattr(parameter, "quant_state", None)  # of 4 bits, of which two are kept in a number
        size = parameter.numel() if packed is None else prod(packed.shape)
        total += size
        if parameter.requires_grad:
            rows = getattr(parameter, TRAINED_ROWS, None)
            trained += size if rows is None else rows * (size // len(parameter))
    return Parameters(total, trained)


def peak_memory_bytes(device: torch.device) -> int:
    """Most that tensors have taken on the device; on the CPU, most that the whole process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_resources(run_dir: Path, counted: Parameters, device: torch.device) -> None:
    """Writes `RESOURCES` for this process, so far; to be called before the export, which may build a second model."""
    found = {**counted._asdict(), "peak_memory_bytes": peak_memory_bytes(device), "device": device.type}
    write_whole(run_dir / RESOURCES, json.dumps(found, indent=2).encode() + b"\n")
