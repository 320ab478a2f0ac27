"""Tensors out of foreign checkpoints: safetensors, whole or in shards, and pickles read without running their code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "vqgan.ckpt",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""What a folder is looked through for, in this order."""
CONTAINERS = ("ema", "state_dict", "model", "module")
"""Keys under which trainers put the weights; averaged weights first, as LlamaGen takes them."""


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors of safetensors files by name; each is read when it is asked for, so that a large model stays on disk."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_weights(source: Path) -> Mapping[str, Tensor]:
    """The named tensors of a checkpoint, on the CPU.

    Args:
        source: a safetensors file, the index of a sharded one, a file of torch.save, or a folder with one of `FILES`.

    Raises:
        ValueError: naming the file: not there, broken, without tensors, with shards outside its folder, or a pickle
            that would have to run code.
    """
    path = find_file(source)
    if path.name.endswith(".index.json"):
        return read_index(path)
    if path.suffix == ".safetensors":
        return SafetensorsFiles(dict.fromkeys(open_safetensors(path).keys(), path))
    return read_pickle(path)


def find_file(source: Path) -> Path:
    """The file that holds the weights.

    Raises:
        ValueError: where there is none.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; give a checkpoint file, or a folder with one")
    for name in FILES:
        if (source / name).is_file():
            return source / name
    raise ValueError(f"{source} holds no checkpoint of a known name ({', '.join(FILES)}); give the file itself")


def read_index(path: Path) -> SafetensorsFiles:
    """The tensors of the shards that an index names.

    Raises:
        ValueError: naming the index, where it is none, or leads out of its folder.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the index of a sharded checkpoint: {error}") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: shard {file!r} is not the name of a safetensors file in the same folder")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}: shard {file} is missing; download it, too")
    return SafetensorsFiles({name: path.parent / file for name, file in files.items()})


def open_safetensors(path: Path) -> Any:
    """An open safetensors file.

    Raises:
        ValueError: naming the file, where it is broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, those in a container such as `state_dict` where there is one.

    Raises:
        ValueError: naming the file; what it holds besides tensors is never run.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} can not be read without running code that it holds ({reason}). Where you trust the file, save "
            "its tensors alone and give the new file: torch.save({'state_dict': torch.load(FILE, "
            "weights_only=False)['state_dict']}, NEW)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole file of torch.save ({type(error).__name__}: {error})") from error
    for name in CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)} if _maps(found) else {}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors, neither alone nor under {', '.join(CONTAINERS)}")
    return tensors


def _maps(value: Any) -> bool:
    return isinstance(value, Mapping)
