"""Tensors in checkpoint files: safetensors, whole or in shards, and pickles read without running their code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILES = (
    SAFETENSORS,
    INDEX,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "vqgan.ckpt",
)
"""What a folder is looked through for, in this order: a vqgan.ckpt may lie beside the model that it belongs to."""
CONTAINERS = ("ema", "state_dict", "model", "module")
"""Keys under which trainers put the weights; averaged weights first, as LlamaGen takes them."""
PICKLES = (b"PK", b"\x80")
"""How files of torch.save begin: zip files since version 1.6, pickles before."""
LFS_POINTER = b"version https://git-lfs"

SHARD_BYTES = 1 << 30
"""Most bytes of a file that `write_weights` writes, unless one tensor has more: what it holds in memory."""
SHOWN = 10
"""Names of each kind that an error lists."""
READ_BYTES = 1 << 30
"""Files are opened anew after this many bytes: what was read of a mapped file counts as memory while it is open."""


class LazyFiles(Mapping[str, Tensor]):
    """Tensors of checkpoint files by name; each is read when it is asked for, so that a large model stays on disk."""

    def __init__(
        self, files: Mapping[str, Path], opened: Mapping[Path, Any] | None = None, num_beside: int = 1
    ) -> None:
        self._files, self._num_beside = dict(files), num_beside
        self._open = dict(opened or {})
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that shares memory with no other: neither with the mapped file nor with one that is stored once.

        Raises:
            ValueError: naming the file, for one that is sparse, or larger than what is stored of it.
        """
        if self._read * self._num_beside > READ_BYTES:
            self._open, self._read = {path: found for path, found in self._open.items() if not can_map(path)}, 0
        found = self._file(name)
        tensor = found[name] if isinstance(found, dict) else found.get_tensor(name)
        if tensor.layout is not torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{self._files[name]}: tensor {name} is sparse, or an expanded view; save it dense")
        self._read += tensor.nbytes
        return tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of which nothing else is read."""
        found = self._file(name)
        return tuple(found[name].shape if isinstance(found, dict) else found.get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        found = self._open[path]
        if name not in found.keys():  # noqa: SIM118 - an open safetensors file is no mapping
            raise ValueError(f"{path} has no tensor {name}, though the index of the checkpoint says so")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files[name]


def read_weights(source: Path, num_beside: int = 1) -> LazyFiles:
    """The named tensors of a checkpoint, on the CPU.

    Args:
        source: a safetensors file, the index of a sharded one, a file of torch.save, or a folder with one of `FILES`.
        num_beside: files that are read by turns, as the shards of a model are; they share what may be in memory.

    Raises:
        ValueError: naming the file: not there, broken, without tensors, with shards outside its folder, or a pickle
            that would have to run code.
    """
    path = find_file(source)
    if path.name.endswith(".index.json"):
        return read_index(path)
    found = open_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return LazyFiles(dict.fromkeys(found.keys(), path), {path: found}, num_beside)


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
    for shard in sorted(source.glob("*-00*-of-*.*")):
        raise ValueError(f"{source} holds {shard.name}, and no index of the shards (*.index.json); download it, too")
    raise ValueError(f"{source} holds no checkpoint of a known name ({', '.join(FILES)}); give the file itself")


def read_index(path: Path) -> LazyFiles:
    """The tensors of the shards that an index names.

    Raises:
        ValueError: naming the index, where it is none, or leads out of its folder.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the index of a sharded checkpoint: {error}") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{path}: shard {file!r} is not the name of a .safetensors or .bin file in the same folder"
            )
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}: shard {file} is missing; download it, too")
    return LazyFiles({name: path.parent / file for name, file in files.items()})


def open_safetensors(path: Path) -> Any:
    """An open safetensors file.

    Raises:
        ValueError: naming the file, where it is broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        check_start(path)
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_start(path: Path, starts: tuple[bytes, ...] = (b"",)) -> None:
    """Whether a file begins as one of weights can.

    Args:
        starts: how files of its kind begin.

    Raises:
        ValueError: naming the file, where it is empty, a pointer of Git LFS, or of another kind.
    """
    with open(path, "rb") as file:
        found = file.read(len(LFS_POINTER))
    if not found:
        raise ValueError(f"{path} is empty; download it again")
    if found == LFS_POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS; fetch the file itself (git lfs pull)")
    if not found.startswith(starts):
        raise ValueError(f"{path} is no file of weights: neither of torch.save nor named .safetensors")


def can_map(path: Path) -> bool:
    """Whether a file's tensors can be mapped, not read at once: files of torch.save before version 1.6 can not."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, those in a container such as `state_dict` where there is one.

    Raises:
        ValueError: naming the file; what it holds besides tensors is never run.
    """
    check_start(path, PICKLES)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map(path))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} can not be read without running code that it holds ({reason}). Where you trust the file, save "
            "its tensors alone and give the new file: torch.save({'state_dict': torch.load(FILE, "
            "weights_only=False)['state_dict']}, NEW)"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a broken file makes torch raise nearly anything
        reason = str(error).partition(". ")[0]  # torch goes on with guesses
        raise ValueError(f"{path} is not a whole file of torch.save ({type(error).__name__}: {reason})") from error
    for name in CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    named = found if isinstance(found, Mapping) else {}
    tensors = {str(key): value for key, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors, neither alone nor under {', '.join(CONTAINERS)}")
    return tensors


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes safetensors as they come: `model.safetensors`, or shards of it with an index, as transformers names them.

    Args:
        tensors: names and tensors; no more of them than fill a shard are held.
        shard_bytes: most bytes of a file, unless one tensor has more.

    Returns:
        Bytes of all tensors.

    Raises:
        OSError: naming the file, where the disk is full or does not let it be written.
    """
    shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_gather(tensors, shard_bytes)):
        save_tensors(shard, folder / f"shard-{number}.partial")
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    places = {}
    for number, names in enumerate(shards):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"shard-{number}.partial", folder / file)
        places.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        try:
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder / INDEX)) from error
    return total


def say_size(num_bytes: int) -> str:
    """Bytes in words, `13.48 GB` or `0.17 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def list_names(kinds: Mapping[str, Sequence[str]]) -> str:
    """Names of tensors in words, with how many there are of each kind; kinds without one are left out."""
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})")
    return "; ".join(parts)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one safetensors file.

    Raises:
        OSError: naming the file, where the disk is full or does not let it be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777  # the library lets its owner alone read what it writes
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
        )
        path.chmod(mode)
    except SafetensorError as error:  # it holds the number of the system's error in its text alone
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def _gather(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most so many bytes."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > most:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group
