"""Adapters of a model: LoRA and DoRA, and rows of embedding and output trained beside them; into its weights and out.

Merging needs no peft: the network stays a plain `Transformer`, which samples as fast as its base. Shapes: O outputs, I
inputs, R rank, D model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from mixmodal.interop.export import ExportError
from mixmodal.models.transformer import TOKEN_MATRICES
from mixmodal.weights import read_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROWS, BASE_MODEL = "rows.safetensors", "base_model.json"
PREFIX = "base_model.model."
"""What peft puts before the name of a layer."""

Kind = Literal["lora", "dora"]


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What an adapter is of.

    Args:
        kind: `lora` (arXiv 2106.09685) or `dora` (arXiv 2402.09353).
        rank: R.
        alpha: the product of the two matrices counts `alpha / rank` times.
        targets: names of linear layers, as `blocks.0.attention.qkv`.
    """

    kind: Kind
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def shapes(self, target: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Tensors of a layer whose weight is `(O, I)`, by their names in the file."""
        outputs, inputs = weight
        found: dict[str, tuple[int, ...]] = {f"{PREFIX}{target}.lora_A.weight": (self.rank, inputs)}
        found[f"{PREFIX}{target}.lora_B.weight"] = (outputs, self.rank)
        if self.kind == "dora":
            found[f"{PREFIX}{target}.lora_magnitude_vector"] = (outputs,)
        return found


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter.

    Args:
        settings: what it is of.
        tensors: of its layers, by their names in the file.
        spans: ids of the rows that were trained beside it.
        rows: these rows, `(rows, D)`, of `embedding.weight` and, where it is not tied, `output.weight`.
        base: name of the model that it was trained on.
        base_sha256: of that model's weights, see `weights_sha256`.
        folder: that it was read from, for messages.
        conversations: whether it was trained on them, see `Codec`.
    """

    settings: AdapterSettings
    tensors: Mapping[str, Tensor]
    spans: tuple[range, ...]
    rows: Mapping[str, Tensor]
    base: str
    base_sha256: str
    folder: Path = Path("adapter")
    conversations: bool = False

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight that stands in for the base model's: itself where the adapter says nothing of it, else a new one.

        It is computed in float32 and rounded once to the type of `weight`. LoRA: `W + alpha / R B A`; DoRA: that with
        the length of each row (an output's weights) set to its magnitude.
        """
        target = name.removesuffix(".weight")
        if name in self.rows:
            found, start = weight.clone(), 0
            for ids in self.spans:
                found[ids.start : ids.stop] = self.rows[name][start : start + len(ids)].to(weight)
                start += len(ids)
            return found
        if target == name or target not in self.settings.targets:
            return weight
        keys = self.settings.shapes(target, tuple(weight.shape))
        down, up, *magnitude = (self.tensors[key].to(weight.device, torch.float32) for key in keys)
        with torch.autocast(weight.device.type, enabled=False):
            found = weight.float() + (self.settings.alpha / self.settings.rank) * (up @ down)
        if magnitude:
            found *= (magnitude[0] / torch.linalg.norm(found, dim=1))[:, None]
        return found.to(weight.dtype)

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Whether this can be an adapter of a network with parameters of these shapes.

        Args:
            where: the network is, for messages.

        Raises:
            AdapterError: naming both sides, and the tensor that does not fit.
        """
        for target in self.settings.targets:
            shape = shapes.get(f"{target}.weight", ())
            if len(shape) != 2:
                self._refuse(ADAPTER_CONFIG, f"target_modules has {target!r}, of which {where} has no matrix")
            for key, wanted in self.settings.shapes(target, shape).items():
                own = tuple(self.tensors[key].shape)
                if own != wanted:
                    self._refuse(ADAPTER_WEIGHTS, f"{key} has the shape {own}; {where} needs {wanted}")
        for name, rows in self.rows.items():
            shape = shapes.get(name, ())
            if shape[1:] != rows.shape[1:] or self.spans[-1].stop > shape[0]:
                wanted = f"rows of {rows.shape[1]} up to id {self.spans[-1].stop - 1}"
                self._refuse(ROWS, f"{name} has {wanted}; {where} has the shape {shape}")
        for name in TOKEN_MATRICES if self.rows else ():
            if name in shapes and name not in self.rows:
                self._refuse(ROWS, f"{name}, which {where} has, is missing")

    def check_base(self, folder: Path) -> None:
        """Whether this is an adapter of the model in a folder, whose weights are read for it.

        Raises:
            AdapterError: naming both files and the key that differs.
        """
        found = read_weights(folder)
        path = found.path(next(iter(found)))
        self.check({name: found.shape(name) for name in found}, str(path))
        sha256 = weights_sha256(found)
        if sha256 != self.base_sha256:
            self._refuse(
                BASE_MODEL,
                f"weights_sha256 is {self.base_sha256[:12]}... of the model {self.base}; {path} has {sha256[:12]}...",
            )

    def _refuse(self, file: str, why: str) -> NoReturn:
        raise AdapterError(f"{self.folder / file}: an adapter of another base model: {why}")


class AdapterError(ExportError):
    """A folder that is no whole adapter, or one of another model; the message names the file and the key."""


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, however they are spread over files."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# merging


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter, *, keep: bool = True) -> dict[str, Tensor]:
    """Puts an adapter into the weights of its base model.

    Args:
        keep: whether to hold the weights that it replaces.

    Returns:
        These weights by name, for `unmerge`; none without `keep`.

    Raises:
        AdapterError: naming file and tensor, where it is of another network; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    adapter.check({name: tuple(parameter.shape) for name, parameter in parameters.items()}, "the network")
    replaced = {}
    for name, parameter in parameters.items():
        weight = parameter.data
        merged = adapter.merged(name, weight)
        if merged is not weight:
            parameter.data = merged
            replaced |= {name: weight} if keep else {}
    return replaced


def unmerge(model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    """The inverse of `merge`, bit for bit: the base model's own weights stand again."""
    parameters = dict(model.named_parameters())
    for name, tensor in replaced.items():
        parameters[name].data = tensor


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a base model with an adapter in them, each computed when it is asked for, in its stored type."""

    def __init__(self, base: Mapping[str, Tensor], adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter

    def __getitem__(self, name: str) -> Tensor:
        return self._adapter.merged(name, self._base[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
