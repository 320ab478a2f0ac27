"""What the model that preference tuning starts from thinks of all answers: computed once, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mixmodal.data.packing import Batch
from mixmodal.data.token_shards import TokenShards
from mixmodal.files import replacing, sha256_of
from mixmodal.objectives.preference import Pairs
from mixmodal.weights import open_safetensors, read_weights, save_tensors

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
SOURCE = "source:"
"""What the names of tensors in the file begin with."""
Score = Callable[[TokenShards, int, int], Iterable[tuple[list[list[str]], Tensor]]]
"""Keys of the pairs of each row, and log-probabilities `(B, S)` of their answers, for one rank's part of the shards."""


class AnswerBatch(NamedTuple):
    """Rows of pairs, and what the reference thinks of them.

    Args:
        rows: segments 1 and 2 are a pair, 3 and 4 the next one; see `split_pairs`.
        reference: log-probabilities `(B, S)` float32 of the answers; see `Pairs`.
    """

    rows: Batch
    reference: Tensor

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.rows.tokens, self.rows.segment_ids, self.rows.loss_weights != 0, self.reference)


class Reference:
    """Log-probabilities of the answers of all pairs under the reference, by folder of token shards.

    Args:
        shards: folders by name, as the reference was asked about them.
        values: `(documents, 2)` float32 of each, nats; not a number for a pair that no row can hold.

    Raises:
        ValueError: where two pairs of a folder have one key.
    """

    def __init__(self, shards: Mapping[str, TokenShards], values: Mapping[str, Tensor]) -> None:
        self._values = {name: value.numpy() for name, value in values.items()}
        self._rows = {name: number_keys(found) for name, found in shards.items()}

    def attach(self, rows: Batch, name: str | None = None) -> AnswerBatch:
        """A batch with its reference.

        Args:
            rows: as `split_pairs` gives them.
            name: of the folder that the keys are of; without it they begin with a source's name where it has one.
        """
        num_segments = 2 * max([1, *map(len, rows.keys)])
        found = np.zeros((len(rows.keys), num_segments), np.float32)
        for row, keys in enumerate(rows.keys):
            for number, key in enumerate(keys):
                folder, own = (name, key) if name is not None else self._place(key)
                found[row, 2 * number : 2 * number + 2] = self._values[folder][self._rows[folder][own]]
        return AnswerBatch(rows, torch.from_numpy(found))

    def _place(self, key: str) -> tuple[str, str]:
        folder, _, own = key.partition(":")
        return (folder, own) if folder in self._rows and own in self._rows[folder] else ("", key)


def number_keys(shards: TokenShards) -> dict[str, int]:
    """The index of each document by its key.

    Raises:
        ValueError: for a key that comes twice.
    """
    found: dict[str, int] = {}
    for index in range(len(shards)):
        key = shards.keys[index]
        if found.setdefault(key, index) != index:
            raise ValueError(f"{shards.folder}: the key {key} comes twice; give each pair its own, and prepare again")
    return found


def model_digest(folder: Path) -> str:
    """SHA-256 over the files of a model's weights."""
    found = read_weights(folder)
    paths = sorted({found.path(name) for name in found})
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()


def load_reference(
    path: Path, settings: Mapping[str, Any], shards: Mapping[str, TokenShards], score: Score, device: torch.device
) -> Reference:
    """What stands in the file, where it is of these settings; otherwise it is computed and written, by all ranks.

    A file of another model, of other shards or of an older format is never used: it is written anew, and the log says
    why.

    Args:
        path: of the file.
        settings: what the values follow from, as plain data; of rank 0.
        shards: folders of pairs by name.
        score: asks the reference.
        device: of this process, for what ranks send each other.

    Raises:
        ValueError: see `read_values`; and for shards of which no pair fits a row.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    settings = {"format_version": FORMAT_VERSION, **settings}
    values = read_values(path, settings) if rank == 0 else None
    known: list[Any] = [values]
    if world_size > 1:
        dist.broadcast_object_list(known, src=0, device=device)
    if known[0] is None:
        known[0] = {name: _compute(found, score, rank, world_size, device) for name, found in shards.items()}
        if rank == 0:
            write_values(path, settings, known[0])
    return Reference(shards, known[0])


def _compute(shards: TokenShards, score: Score, rank: int, world_size: int, device: torch.device) -> Tensor:
    rows = number_keys(shards)
    found = torch.zeros(len(shards), 3)  # two answers, and whether there are any
    for keys, logps in score(shards, rank, world_size):
        for own, values in zip(keys, logps.float().cpu()):
            for number, key in enumerate(own):
                found[rows[key], :2] = values[2 * number : 2 * number + 2]
                found[rows[key], 2] = 1
    if world_size > 1:
        found = found.to(device)
        dist.all_reduce(found)  # each document is one rank's
    found = found.cpu()
    if not found[:, 2].any():
        raise ValueError(f"{shards.folder}: no pair fits a row; raise data.seq_len")
    return torch.where(found[:, 2:] != 0, found[:, :2], torch.nan)


def write_values(path: Path, settings: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Writes the file, whole or not at all: a safetensors file, whose settings stand beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    beside.unlink(missing_ok=True)  # values without settings are never read
    with replacing(path) as part:
        save_tensors({f"{SOURCE}{name}": value for name, value in values.items()}, part)
    with replacing(beside) as part:
        part.write_text(json.dumps({**settings, "sha256": sha256_of(path)}, indent=1))


def read_values(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The values in the file; None where there is none, or one of other settings, which the log then says.

    Raises:
        ValueError: for a file of something else, such as a model's weights, which would be written over.
    """
    if path.exists() and not (path.is_file() and _is_reference(path)):
        raise ValueError(
            f"preference.reference_file {path} holds something else than log-probabilities of a reference; give the "
            "name of a new file"
        )
    beside = path.with_suffix(".json")
    if not (path.is_file() and beside.is_file()):
        return None
    try:
        written = dict(json.loads(beside.read_bytes()))
    except (ValueError, TypeError):
        written = {}
    differing = [key for key, value in settings.items() if written.get(key) != value]
    if not differing and written.get("sha256") != sha256_of(path):
        differing = ["sha256"]
    if differing:
        logger.warning("%s: its %s is another; the reference is computed anew", path, ", ".join(differing))
        return None
    found = read_weights(path)
    return {name.removeprefix(SOURCE): found[name] for name in found}


def _is_reference(path: Path) -> bool:
    try:
        return all(name.startswith(SOURCE) for name in open_safetensors(path).keys())  # noqa: SIM118 - it is no mapping
    except ValueError:
        return False
