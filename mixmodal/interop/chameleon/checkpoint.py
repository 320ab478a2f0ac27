"""A foreign checkpoint on disk: its transformer's tensors, in however many files, and what lies beside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixmodal.files import read_object
from mixmodal.interop.chameleon.layouts import LAYOUTS, Layout, LayoutName, check_layout, find_layout, is_transformer
from mixmodal.interop.chameleon.settings import CONFIG, Placement, Settings, read_settings
from mixmodal.weights import LazyFiles, find_file, read_weights

SHARD = re.compile(r"consolidated(\.\d+)?\.pth")
"""Meta's names: one file, or one for each shard."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors by their names, merged from shards.

    Args:
        folder: where it lies.
        layout: how.
        settings: what the JSON file says.
        shards: the tensors of each shard; one where the model is not cut.
        shapes: of all tensors, merged; QK-norms of shards stand on each other, `(shards, head_dim)`.
    """

    folder: Path
    layout: Layout
    settings: Settings
    shards: tuple[LazyFiles, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One of their tensors, merged."""
        parts = [shard[name] for shard in self.shards]
        if is_norm_of_heads(name) and self.layout.norms == "shard" and parts[0].ndim == 1:
            return torch.stack(parts)
        if len(parts) == 1:
            return parts[0]
        dimension = self.layout.cut(name)
        if dimension is not None:
            return torch.cat(parts, dimension)
        return average(parts)


def is_norm_of_heads(name: str) -> bool:
    """Whether a tensor of theirs is a QK-norm's."""
    return bool(re.search(r"\.[qk]_norm(alization)?\.(weight|bias)$", name))


def average(copies: list[Tensor]) -> Tensor:
    """The mean of what shards hold alike; bit for bit each of them where they are equal."""
    if all(torch.equal(copy, copies[0]) for copy in copies[1:]):
        return copies[0]
    return torch.stack([copy.float() for copy in copies]).mean(dim=0).to(copies[0].dtype)


def open_checkpoint(
    source: Path, layout: LayoutName | None = None, norm_placement: Placement | None = None
) -> Checkpoint | None:
    """The transformer at `source`, of which nothing but names and shapes is read; None where there is none.

    Args:
        source: a folder or a file of the transformer's weights. In a folder, Meta's `consolidated.*.pth` are found,
            in `models/NAME` of their download as well.
        layout: what the user says that it is; checked.
        norm_placement: where norms stand, for checkpoints without a JSON file.

    Raises:
        ValueError: naming file and key for what is broken, missing, of an unknown layout, or not of the given one.
    """
    files = find_shards(source)
    shards = tuple(read_weights(file, len(files)) for file in files)
    if not is_transformer(shards[0]):
        return None
    folder = files[0].parent
    try:
        first = {name: shards[0].shape(name) for name in shards[0]}
        found = find_layout(first, _stated_shards(folder))
        if layout is not None:
            check_layout(LAYOUTS[layout], found, first)
            found = LAYOUTS[layout]
        settings = read_settings(folder, found, norm_placement)
        check_shards(files, shards, settings)
        shapes = merged_shapes(found, shards)
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{source}: {error}") from error
    return Checkpoint(folder=folder, layout=found, settings=settings, shards=shards, shapes=shapes)


def find_shards(source: Path) -> list[Path]:
    """Files of the shards in their order; one for what is not cut.

    Raises:
        ValueError: where a shard is missing, or several models are there.
    """
    if source.is_dir():
        folders = [source] if any(SHARD.fullmatch(path.name) for path in source.iterdir()) else []
        if not folders:
            inner = "*" if source.name == "models" else "models/*"
            found = source.glob(f"{inner}/consolidated*.pth")
            folders = sorted({path.parent for path in found if SHARD.fullmatch(path.name)})
        if len(folders) > 1:
            raise ValueError(f"{source} holds {len(folders)} models ({', '.join(map(str, folders))}); give one of them")
        if folders:
            return _numbered(folders[0])
    elif SHARD.fullmatch(source.name) and source.is_file():
        return _numbered(source.parent)
    return [find_file(source)]


def _numbered(folder: Path) -> list[Path]:
    if (folder / "consolidated.pth").is_file():
        return [folder / "consolidated.pth"]
    files = sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))
    for number, path in enumerate(files):
        if path.name != f"consolidated.{number:02}.pth":
            raise ValueError(f"{folder}: consolidated.{number:02}.pth is missing; there is {path.name}")
    return files


def _stated_shards(folder: Path) -> int:
    """`model_parallel_size` of a config of transformers; 0 where nothing says it."""
    path = folder / CONFIG
    stated = read_object(path).get("model_parallel_size") if path.is_file() else None
    return stated if isinstance(stated, int) else 0


def check_shards(files: list[Path], shards: tuple[LazyFiles, ...], settings: Settings) -> None:
    """Whether all shards are there and hold the same names.

    Raises:
        ValueError: naming the file and the key.
    """
    if SHARD.fullmatch(files[0].name) and settings.num_shards not in (0, len(files)):
        raise ValueError(
            f"{settings.path}: model_parallel_size is {settings.num_shards}, and there are {len(files)} shards "
            f"({files[0].name} to {files[-1].name})"
        )
    for path, shard in zip(files[1:], shards[1:]):
        for name in sorted(set(shard) ^ set(shards[0])):
            raise ValueError(f"{path if name in shards[0] else files[0]} has no tensor {name}, as other shards do")


def merged_shapes(layout: Layout, shards: tuple[LazyFiles, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors as `Checkpoint.read` gives them.

    Raises:
        ValueError: naming the file and the key, for shards that do not fit together.
    """
    shapes = {}
    for name in shards[0]:
        shape = shards[0].shape(name)
        for shard in shards[1:]:
            if shard.shape(name) != shape:
                raise ValueError(f"{shard.path(name)}: {name} has shape {shard.shape(name)}, not {shape}")
        dimension = layout.cut(name)
        if is_norm_of_heads(name) and layout.norms == "shard" and len(shape) == 1:
            shape = (len(shards), *shape)
        elif dimension is not None and dimension < len(shape):
            shape = tuple(size * len(shards) if place == dimension else size for place, size in enumerate(shape))
        shapes[name] = shape
    return shapes
