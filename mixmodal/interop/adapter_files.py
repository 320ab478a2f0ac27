"""Folders of adapters: written whole, and read without trust.

adapter_config.json  adapter_model.safetensors  rows.safetensors (where rows were trained)  base_model.json  README.md

The first two are peft's own: `PeftModel.from_pretrained(mixmodal.load_transformer(BASE), DIR)` reads them,
without the rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmodal.files import hash_files, read_object, write_whole
from mixmodal.interop.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_MODEL,
    ROWS,
    Adapter,
    AdapterError,
    AdapterSettings,
    MergedWeights,
    merge,
)
from mixmodal.interop.export import CARD, CONFIG, CONVERSATIONS, IMAGE_TOKENIZER, TEXT_TOKENIZERS, staged
from mixmodal.models.transformer import TOKEN_MATRICES
from mixmodal.records import write_json
from mixmodal.weights import open_safetensors, read_weights, save_tensors, write_weights

MOST = 2**31
"""Rank, alpha and ids lie below."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What tensors of an adapter are stored in."""
WITHOUT_EFFECT = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
    ),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
)
"""Keys of peft's config that say nothing of the weights of a trained adapter."""


def save_adapter(folder: Path, adapter: Adapter, card: str = "") -> None:
    """Writes the folder, whole or not at all; one that stood there is replaced.

    Args:
        card: sections of Markdown behind what the card says of the adapter.

    Raises:
        OSError: where the disk is full.
    """
    settings = adapter.settings
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_dora": settings.kind == "dora",
        "target_modules": list(settings.targets),
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
    }
    base: dict[str, Any] = {"format_version": 1, "base_model": adapter.base, "weights_sha256": adapter.base_sha256}
    if adapter.conversations:
        base[CONVERSATIONS] = True
    with staged(folder) as staging:
        save_tensors(adapter.tensors, staging / ADAPTER_WEIGHTS)
        if adapter.rows:
            base["rows"] = [[ids.start, ids.stop] for ids in adapter.spans]
            save_tensors(adapter.rows, staging / ROWS)
        for name, content in ((ADAPTER_CONFIG, config), (BASE_MODEL, base)):
            write_json(staging / name, content)
        write_whole(staging / CARD, describe(adapter, card).encode())


def describe(adapter: Adapter, card: str) -> str:
    """The card of an adapter, in Markdown."""
    settings = adapter.settings
    numbers = [sum(tensor.numel() for tensor in kept.values()) for kept in (adapter.tensors, adapter.rows)]
    lines = [
        *("---", "library_name: mixmodal", f"base_model: {json.dumps(adapter.base)}"),
        *("tags: [mixmodal, peft, lora]", "---", ""),
        *(f"# An adapter of {adapter.base}", ""),
        f"Use it with `mixmodal.MixedModal.from_pretrained({adapter.base!r}, adapter='this folder')`, or merge it by",
        "`mixmodal export`. It belongs to exactly these weights of the base model:",
        *("", f"- weights_sha256: {adapter.base_sha256}"),
        f"- kind {settings.kind}, rank {settings.rank}, alpha {settings.alpha:g}, {len(settings.targets)} layers",
        f"- {numbers[0]:,} parameters, and {numbers[1]:,} in trained rows of {', '.join(adapter.rows) or 'nothing'}",
    ]
    return "\n".join([*lines, *(["", card.strip()] if card.strip() else [])]) + "\n"


def load_adapter(folder: Path) -> Adapter:
    """Reads what `save_adapter` wrote; nothing in the folder is trusted, and no code in it runs.

    Raises:
        AdapterError: naming the file and the key that is missing, broken, or asks for what is not known here.
    """
    folder = Path(folder)
    check_whole(folder)
    settings = read_settings(folder / ADAPTER_CONFIG)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    check_names(settings, tensors, folder)
    base = _read(folder / BASE_MODEL)
    name, sha256 = (base.get(key) for key in ("base_model", "weights_sha256"))
    if base.get("format_version") != 1 or not isinstance(name, str) or not isinstance(sha256, str):
        raise AdapterError(f"{folder / BASE_MODEL} needs format_version 1, base_model and weights_sha256")
    conversations = base.get(CONVERSATIONS, False)
    if not isinstance(conversations, bool):
        raise AdapterError(f"{folder / BASE_MODEL}: {CONVERSATIONS} is {conversations!r}; it must be true or false")
    spans = read_spans(base.get("rows", []), folder / BASE_MODEL)
    count = sum(map(len, spans))
    if not spans and (folder / ROWS).exists():
        raise AdapterError(f"{folder / BASE_MODEL} names no rows, but {ROWS} stands beside it")
    rows = read_tensors(folder / ROWS) if spans else {}
    for key, tensor in rows.items():
        if key not in TOKEN_MATRICES or tensor.dim() != 2 or len(tensor) != count:
            raise AdapterError(
                f"{folder / ROWS}: {_short(key)} has the shape {tuple(tensor.shape)}; {BASE_MODEL} names {count} rows "
                f"of {' and '.join(TOKEN_MATRICES)}"
            )
    if spans and TOKEN_MATRICES[0] not in rows:
        raise AdapterError(f"{folder / ROWS}: {TOKEN_MATRICES[0]} is missing")
    return Adapter(
        settings=settings,
        tensors=tensors,
        spans=spans,
        rows=rows,
        base=name,
        base_sha256=sha256,
        folder=folder,
        conversations=conversations,
    )


def apply_adapter(model: nn.Module, base: Path, folder: Path) -> Adapter:
    """Merges the adapter in a folder into the model that was loaded from `base`.

    Raises:
        AdapterError: naming the files, where it is no adapter, or one of another model.
    """
    adapter = load_adapter(folder)
    adapter.check_base(base)
    merge(model, adapter, keep=False)
    return adapter


def save_merged(base: Path, adapter: Adapter, folder: Path) -> int:
    """Writes a model with an adapter merged into it, tensor by tensor, with all else that the base model's folder has.

    Returns:
        Bytes of all tensors.

    Raises:
        AdapterError: naming the files, where the adapter is one of another model.
        OSError: where the disk is full.
    """
    adapter.check_base(base)
    with staged(folder) as staging:
        tuned = {CONVERSATIONS: True} if adapter.conversations else {}
        config = json.dumps({**read_object(base / CONFIG), **tuned}, indent=2) + "\n"
        write_whole(staging / CONFIG, config.encode())
        for name in TEXT_TOKENIZERS.values():
            if (base / name).is_file():
                shutil.copyfile(base / name, staging / name)
        if (base / IMAGE_TOKENIZER).is_dir():
            shutil.copytree(base / IMAGE_TOKENIZER, staging / IMAGE_TOKENIZER)
        card = (base / CARD).read_text(encoding="utf-8") if (base / CARD).is_file() else f"# {folder.name}\n"
        write_whole(staging / CARD, tell_of(adapter, card).encode())
        return write_weights(staging, MergedWeights(read_weights(base), adapter).items())


def tell_of(adapter: Adapter, card: str) -> str:
    """The card of a model into which an adapter was merged."""
    settings = adapter.settings
    what = f"{settings.kind} of rank {settings.rank}, alpha {settings.alpha:g}, weights_sha256 {adapter.base_sha256}"
    return f"{card.rstrip()}\n\n## Adapter\n\nThese are the weights of {adapter.base} with an adapter: {what}.\n"


def hash_adapter(folder: Path) -> str:
    """SHA-256 over an adapter's files but its card, hexadecimal.

    Raises:
        AdapterError: where it is none.
    """
    check_whole(folder)
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROWS, BASE_MODEL)
    return hash_files((name, folder / name) for name in names if (folder / name).is_file())


def check_whole(folder: Path) -> None:
    """Whether the files that every adapter has are there.

    Raises:
        AdapterError: naming the one that is not.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_MODEL):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} is not an adapter: {name} is missing; give a folder such as runs/NAME/adapter"
            )


def read_settings(path: Path) -> AdapterSettings:
    """What peft's config says.

    Raises:
        AdapterError: naming the key of a value that can not be used here, also where peft could.
    """
    found = _read(path)
    rank, alpha, targets = (found.get(key) for key in ("r", "lora_alpha", "target_modules"))
    fine = {
        "peft_type": found.get("peft_type") == "LORA",
        "r": type(rank) is int and 0 < rank < MOST,
        "lora_alpha": isinstance(alpha, (int, float)) and alpha is not True and 0 < alpha < MOST,
        "use_dora": found.get("use_dora") in (True, False, None),
        "target_modules": isinstance(targets, list) and bool(targets) and all(type(t) is str for t in targets),
    }
    others = set(found) - set(fine) - set(WITHOUT_EFFECT)
    fine |= {key: not found[key] or found[key] == "none" for key in sorted(others)}
    wrong = [f"{key} is {_short(found.get(key))}" for key, is_fine in fine.items() if not is_fine]
    if wrong:
        raise AdapterError(f"{path}: {', '.join(wrong)}, which is no adapter that is known here")
    assert isinstance(rank, int)
    assert isinstance(targets, list)
    kind = "dora" if found.get("use_dora") else "lora"
    return AdapterSettings(kind=kind, rank=rank, alpha=float(found["lora_alpha"]), targets=tuple(targets))


def check_names(settings: AdapterSettings, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Whether config and weights of an adapter tell of the same layers.

    Raises:
        AdapterError: naming the file and the tensor.
    """
    wanted = {key for target in settings.targets for key in settings.shapes(target, (1, 1))}
    for key in sorted(wanted ^ set(tensors)):
        how = "missing" if key in wanted else f"not of {ADAPTER_CONFIG}"
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: tensor {_short(key)} is {how}")


def read_spans(rows: Any, path: Path) -> tuple[range, ...]:
    """Ids of rows from pairs of first and behind the last.

    Raises:
        AdapterError: where they are none, or do not stand in order.
    """
    last, spans = 0, []
    for pair in rows if isinstance(rows, list) else [None]:
        start, stop = pair if isinstance(pair, list) and len(pair) == 2 else (-1, -1)
        if type(start) is not int or type(stop) is not int or not last <= start < stop < MOST:
            raise AdapterError(f"{path}: rows is {_short(rows)}; it must be pairs of ids in order, as [[4, 8196]]")
        last = stop
        spans.append(range(start, stop))
    return tuple(spans)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        AdapterError: naming the file, where it is missing or broken, and a tensor that holds no finite fractions.
    """
    try:
        found = open_safetensors(path)
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - it is no mapping
    except (ValueError, OSError) as error:
        raise AdapterError(str(error)) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{path}: tensor {_short(name)} is of {tensor.dtype}; an adapter has {_listed(FLOATS)}")
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: tensor {_short(name)} holds values that are not finite")
    return tensors


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
