"""What the weights of a foreign checkpoint do not show: where norms stand, rotary base, context; from its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mixmodal.files import read_object
from mixmodal.interop.chameleon.layouts import META, Layout
from mixmodal.models.transformer import TransformerConfig

Placement = Literal["pre", "post_sublayer"]
PARAMS, CONSOLIDATE_PARAMS, CONFIG = "params.json", "consolidate_params.json", "config.json"
CLASSES = {"chameleon": 1e-5, "llama": 1e-6}
"""The `model_type`s of transformers that are read, and `rms_norm_eps` where their file leaves it out."""
MAX_POSITIONS = {"chameleon": 4096, "llama": 2048}
"""`max_position_embeddings` where a file of transformers leaves it out, as it does with every default."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a checkpoint's JSON file says; None is what it does not say.

    Args:
        path: the file, for messages; None where there is none.
        norm_placement: as `TransformerConfig` has it, as the rest.
        num_shards: shards that the model was trained in, each with QK-norm sets of its own; 0 where nothing says it.
        sizes: what the file says of `vocab_size`, `dim`, `num_layers`, `num_heads`, `num_kv_heads`, `head_dim` and
            `ffn_dim`, which the weights must bear out.
        special: ids of the tokens `bos` and `eos` of a text model.
    """

    path: Path | None = None
    norm_placement: Placement | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096
    num_shards: int = 0
    sizes: Mapping[str, int]
    special: Mapping[str, int] = field(default_factory=dict)

    def check(self, model: TransformerConfig) -> None:
        """Whether the weights have the sizes that the file names.

        Raises:
            ValueError: naming the file and the size.
        """
        found = {**vars(model), **model.attention_sizes}
        for name, size in self.sizes.items():
            if size != found[name]:
                raise ValueError(f"{self.path}: {name} is {size} there, and {found[name]} in the weights beside it")


def read_settings(folder: Path, layout: Layout, norm_placement: Placement | None = None) -> Settings:
    """The settings in a checkpoint's folder.

    Args:
        norm_placement: what the user says where no file does.

    Raises:
        ValueError: naming file and key: a file that is missing, broken or says what ours does not compute.
    """
    path = folder / (PARAMS if layout is META else CONFIG)
    if path.is_file():
        data = read_object(path)
        found = _from_meta(path, data) if layout is META else _from_transformers(path, data)
    elif norm_placement is None and layout.norms != "none":
        raise ValueError(
            f"{path} is missing: weights do not show whether norms stand before sublayers (7B) or behind them (34B); "
            "put the file beside them, or say --norm_placement pre or post_sublayer"
        )
    else:
        found = Settings(sizes={})
    if norm_placement is not None:
        if found.norm_placement not in (None, norm_placement):
            raise ValueError(
                f"{path}: norms stand at {found.norm_placement}; leave norm_placement {norm_placement} out"
            )
        found = replace(found, norm_placement=norm_placement)
    if found.norm_placement is None:
        if layout.norms != "none":
            raise ValueError(f"{path}: the key swin_norm is missing, and no --norm_placement is given")
        found = replace(found, norm_placement="pre")
    return found


def _from_meta(path: Path, data: dict[str, Any]) -> Settings:
    beside = path.with_name(CONSOLIDATE_PARAMS)
    shards = {**data, **(read_object(beside) if beside.is_file() else {})}.get("model_parallel_size", 0)
    model = data.get("model", data)
    if not isinstance(model, dict):
        raise ValueError(f"{path}: the key model holds no object")
    if not model.get("qk_normalization", True):
        raise ValueError(f"{path}: qk_normalization is false, and no model of the family goes without")
    keys = {"vocab_size": "vocab_size", "dim": "dim", "num_layers": "n_layers", "num_heads": "n_heads"}
    swin = _value(path, model, "swin_norm", bool)
    return Settings(
        path=path,
        norm_placement=None if swin is None else ("post_sublayer" if swin else "pre"),
        norm_eps=_value(path, model, "norm_eps", float, 1e-5),
        rope_theta=_value(path, model, "rope_theta", float, 10000.0),
        max_seq_len=_value(path, model, "max_seq_len", int, 4096),
        num_shards=_value(path, {"model_parallel_size": shards}, "model_parallel_size", int, 0),
        sizes=_sizes(path, model, {**keys, "num_kv_heads": "n_kv_heads"}),
    )


def _from_transformers(path: Path, data: dict[str, Any]) -> Settings:
    kind = str(data.get("model_type"))
    if kind not in CLASSES:
        raise ValueError(f"{path}: model_type is {kind!r}; {' or '.join(CLASSES)} can be imported")
    for key, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if data.get(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {data[key]!r}; only {wanted!r} can be imported")
    rope = data.get("rope_parameters") or {}
    scaled = data.get("rope_scaling") or {
        key: rope[key] for key in ("rope_type",) if rope.get(key) != "default" and rope
    }
    if scaled:
        raise ValueError(f"{path}: rotary positions are scaled ({scaled}), which can not be imported")
    keys = {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
    }
    swin = _value(path, data, "swin_norm", bool, False)
    return Settings(
        path=path,
        norm_placement="post_sublayer" if swin else "pre",
        norm_eps=_value(path, data, "rms_norm_eps", float, CLASSES[kind]),
        rope_theta=_value(path, {**rope, **data}, "rope_theta", float, 10000.0),
        max_seq_len=_value(path, data, "max_position_embeddings", int, MAX_POSITIONS[kind]),
        num_shards=_value(path, data, "model_parallel_size", int, 0),
        sizes=_sizes(path, data, keys),
        special={
            name: data[f"{name}_token_id"] for name in ("bos", "eos") if isinstance(data.get(f"{name}_token_id"), int)
        },
    )


def _sizes(path: Path, data: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, int]:
    sizes = {own: _value(path, data, theirs, int) for own, theirs in keys.items()}
    return {own: size for own, size in sizes.items() if size is not None and size > 0}


def _value(path: Path, data: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of the file in its type; what is absent or null has the default."""
    found = data.get(key)
    if found is None:
        return default
    if isinstance(found, bool) != (kind is bool) or not isinstance(found, (int, float)) or kind(found) != found:
        raise ValueError(f"{path}: {key} is {found!r}; {kind.__name__} is needed")
    return kind(found)
