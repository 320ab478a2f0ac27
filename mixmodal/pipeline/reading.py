"""What the generate and classify commands have in common: an adapter, the memory they retrieve from, the device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixmodal.config import check_least, plain
from mixmodal.environment import choose_device
from mixmodal.interop.adapter_files import hash_adapter
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.records import is_launched
from mixmodal.retrieval.retriever import DEFAULT_SELECTION
from mixmodal.retrieval.selection import SelectionConfig


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """An adapter of the model, and which documents of a memory it reads before what it is asked for.

    Args:
        adapter: folder of an adapter of the model, as `runs/NAME/adapter`, which is merged into it; null is none.
        memory: folder of a memory, which `mixmodal index` writes; null is none.
        retrieve: how many of its documents are read, the nearest last; fewer where the model's context takes no more.
        encoder: folder or hub id of the memory's encoder; null is where the memory says that it was.
        selection: which documents may be taken; `retrieve` stands in for its `num_candidates`.
        random_seed: draws the documents at random, by this seed: a control that tells what nearness is worth. null
            takes the nearest.
    """

    adapter: Path | None = None
    memory: Path | None = None
    retrieve: int = 0
    encoder: str | None = None
    selection: SelectionConfig = DEFAULT_SELECTION
    random_seed: int | None = None

    def __post_init__(self) -> None:
        check_least(self, 0, "retrieve", "random_seed")
        if self.retrieve and self.memory is None:
            raise ValueError(f"retrieve is {self.retrieve}, but memory is not given; give --memory DIR")
        if self.memory is not None and not self.retrieve:
            raise ValueError(f"memory is {self.memory}, but retrieve is 0; give --retrieve N")
        idle = {"encoder": None, "selection": DEFAULT_SELECTION, "random_seed": None}
        for name, default in idle.items():
            if self.memory is None and getattr(self, name) != default:
                raise ValueError(f"{name} can not act without memory; give --memory DIR --retrieve N, or leave it out")
        if self.selection.num_candidates != DEFAULT_SELECTION.num_candidates:
            raise ValueError("selection.num_candidates can not act here: retrieve says how many; leave it out")
        if self.retrieve > self.selection.search_depth:
            raise ValueError(
                f"retrieve is {self.retrieve}, but only the {self.selection.search_depth} nearest documents are looked "
                "through; raise selection.search_depth"
            )

    def attach(self, model: MixedModal) -> None:
        """Gives the model the memory, where there is one."""
        if self.memory is not None:
            model.attach_memory(self.memory, self.encoder, self.selection)

    def describe(self) -> dict[str, Any]:
        """Plain data for a report; nothing without adapter and memory."""
        adapted = {} if self.adapter is None else {"adapter_sha256": hash_adapter(self.adapter)}
        if self.memory is None:
            return adapted
        settings = {name: getattr(self, name) for name in ("memory", "retrieve", "encoder", "selection", "random_seed")}
        settings["selection"] = {
            name: value for name, value in vars(self.selection).items() if name != "num_candidates"
        }
        return {**adapted, "retrieval": plain(settings)}


def local_device(device: str) -> str:
    """For `auto` the accelerator that is this process's where a launcher has started several on a machine."""
    if device == "auto" and is_launched() and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def resolve_device(device: str) -> str:
    """`choose_device` of `local_device`."""
    return choose_device(local_device(device))
