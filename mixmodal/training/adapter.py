"""Tuning by an adapter: the base model is frozen, and matrices of low rank beside its linear layers are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mixmodal.data.packing import Batch
from mixmodal.interop.adapter_files import save_adapter
from mixmodal.interop.adapters import PREFIX, Adapter, AdapterSettings, Kind, merge, weights_sha256
from mixmodal.models.transformer import TOKEN_MATRICES, Transformer
from mixmodal.training.deepspeed_config import read_zero_file
from mixmodal.training.pretrain import PretrainConfig, PretrainTask
from mixmodal.training.quantized import quantize
from mixmodal.training.trainable import TrainableConfig, choose_names, choose_rows, restrict
from mixmodal.weights import read_weights

NOTE = "adapter"
"""Key of a loader's state."""
LAYER = "lora_"
"""What the names of peft's parameters begin with."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter that is trained in the place of the network, by peft.

    Args:
        kind: `lora` adds a product of two thin matrices to each (arXiv 2106.09685); `dora` trains the length of each
            row beside it (arXiv 2402.09353).
        rank: of the product.
        alpha: the product counts `alpha / rank` times.
        dropout: share dropped of what goes into the product.
        targets: linear layers, as `blocks.*.attention`, `*.ffn.up`, with `*` for anything; all of the blocks by
            default. Query, key and value are one matrix, `qkv`, and so are gate and value of the feed-forward, `up`.
        rows: of embedding and output, those that are trained as a whole beside it, named as in `trainable.rows`; the
            image codes by default, none with `[]`.
        quantize: `nf4` keeps the frozen linear layers of the blocks in 4 bits while training, as QLoRA does (arXiv
            2305.14314); null as they are. What is exported is the base model as it is stored, with the adapter.
    """

    kind: Kind = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["blocks"])
    rows: list[str] = field(default_factory=lambda: ["image"])
    quantize: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"adapter.rank is {self.rank} and adapter.alpha {self.alpha}; both must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must lie in [0, 1)")


class AdapterLoader:
    """Rows with the note, in their state, of what an adapter is of: a run does not go on with another.

    A checkpoint has the frozen weights, the adapter and the trained rows; but what is exported is the base model at
    hand with the rows that the config names, and the adapter counts as often as the config says.

    Args:
        rows: what is trained on.
        build_note: plain data by the key of the config; asked once, when a state is first wanted.
    """

    def __init__(self, rows: Any, build_note: Callable[[], dict[str, Any]]) -> None:
        self._rows, self._build_note = rows, build_note

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._rows)

    @cached_property
    def _note(self) -> dict[str, Any]:
        return self._build_note()

    def state_dict(self) -> dict[str, Any]:
        return {**self._rows.state_dict(), NOTE: self._note}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        written = state.get(NOTE, self._note)  # which an earlier version did not keep
        for key, own in self._note.items():
            if written[key] != own:
                raise ValueError(
                    f"{key} is {own}, but the checkpoint's adapter was trained with {written[key]}; go on with that, "
                    "or start a new run folder"
                )
        self._rows.load_state_dict(state)


class AdapterTask(PretrainTask):
    """Pretraining of an adapter: all of the base model is frozen bit for bit but for the rows that are named.

    Args:
        config: see there; with `init_from`.
        adapter: what is trained.

    Raises:
        ValueError: as for `PretrainTask`, and for DoRA and quantized weights at ZeRO stage 3.
    """

    def __init__(self, config: PretrainConfig, adapter: AdapterConfig) -> None:
        super().__init__(config)
        self.adapter = adapter
        zero = read_zero_file(config.trainer.deepspeed, config.trainer.precision)["zero_optimization"]
        acting = {"adapter.kind is dora": adapter.kind == "dora", "adapter.quantize is nf4": bool(adapter.quantize)}
        for what, acts in acting.items():
            if acts and zero.get("stage") == 3:
                raise ValueError(
                    f"{what}, which needs whole weights; ZeRO stage 3 does not keep them: choose stage 2 "
                    "(gradients and optimizer states, of an adapter few, are shared there, too)"
                )

    def restrict(self, model: nn.Module) -> None:
        """Puts the adapter in, unless it is there, and freezes all but it and the rows."""
        assert isinstance(model, Transformer)
        if not any(LAYER in name for name, _ in model.named_parameters()):
            inject(model, self.adapter, self.config.trainer.precision)
        matrices = [name for name, _ in model.named_parameters() if name in TOKEN_MATRICES and self.adapter.rows]
        trained = TrainableConfig(parameters=[f"*.{LAYER}*", *matrices], rows=self.adapter.rows)
        restrict(model, trained, self.vocabulary, "adapter")

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> Any:
        return AdapterLoader(super().build_loader(micro_batch_size, grad_accum_steps, rank, world_size), self._note)

    def _note(self) -> dict[str, Any]:
        spans = choose_rows(self.vocabulary, self.adapter.rows)
        return {
            "init_from": f"a model of weights_sha256 {self._base_sha256}",
            "adapter.alpha": float(self.adapter.alpha),
            "adapter.rows": [[ids.start, ids.stop] for ids in spans],
        }

    @cached_property
    def _base_sha256(self) -> str:
        assert self.base
        return weights_sha256(read_weights(self.base.folder))

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the merged model to `folder`, and the adapter alone to `adapter` beside it."""
        assert self.base
        dtype = model.get_parameter(TOKEN_MATRICES[0]).dtype
        with torch.no_grad():
            adapter = self.read_adapter(model)
            merged = self.base.build(self.model_config)
            merge(merged, adapter, keep=False)
        super().export(merged.to(dtype), folder)
        sections = self.base.extend_card(self.config.card)
        text = "\n\n".join(f"## {name.capitalize()}\n\n{section}" for name, section in sections.items() if section)
        save_adapter(folder.parent / "adapter", adapter, text)

    def read_adapter(self, model: nn.Module) -> Adapter:
        """What has been trained, on the CPU."""
        assert self.base
        tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
        spans = choose_rows(self.vocabulary, self.adapter.rows)
        kept = {name: tensors[name] for name in TOKEN_MATRICES if spans and name in tensors}
        targets = [name.partition(f".{LAYER}A.")[0] for name in tensors if f".{LAYER}A." in name]
        return Adapter(
            settings=AdapterSettings(
                kind=self.adapter.kind, rank=self.adapter.rank, alpha=self.adapter.alpha, targets=tuple(targets)
            ),
            tensors={stored_name(name): tensor for name, tensor in tensors.items() if LAYER in name},
            spans=tuple(spans),
            rows={name: torch.cat([t[ids.start : ids.stop] for ids in spans]) for name, t in kept.items()},
            base=self.base.name,
            base_sha256=self._base_sha256,
            conversations=self.conversations,
        )


def stored_name(name: str) -> str:
    """The name in a file of a parameter of an adapted network, as peft has it."""
    found = name.replace(".default", "")
    return PREFIX + (found.removesuffix(".weight") if "magnitude" in found else found)


def inject(model: Transformer, config: AdapterConfig, precision: str = "float32") -> None:
    """Puts peft's layers around linear layers of the blocks; the network computes what it did before.

    Its own parameters keep their values, unless they are quantized, and get `.base_layer` into their names.

    Args:
        precision: of training; quantized weights are multiplied in it.

    Raises:
        ValueError: without peft, for a target that names nothing, or weights that DoRA can not take.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"adapter needs peft: pip install 'mixmodal[finetune]' ({error})") from error
    linear = {
        f"blocks.{name}": module for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)
    }
    chosen = choose_names(linear, config.targets, "adapter.targets", "linear layer of a block")
    targets = [name for name in linear if name in chosen]
    for name in targets if config.kind == "dora" else ():
        weight = linear[name].weight
        if weight.device.type != "meta" and not weight.any(dim=1).all():
            raise ValueError(
                f"adapter.kind is dora, which has no direction for rows of zeros, as {name} has; choose lora"
            )
    if config.quantize:
        quantize(model, precision)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - it is a number
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        target_modules=targets,
    )
    inject_adapter_in_model(lora, model)
