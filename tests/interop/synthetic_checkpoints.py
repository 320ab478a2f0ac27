"""Small random checkpoints of the Chameleon family in the four layouts, written from the facts of the formats.

They share nothing with mixmodal, so that a test can tell. Start is a state of transformers' Chameleon (layout
`transformers`), whose QK-norms are the same in all heads of a shard; the others are spelled from it index by index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
HEAD = 8
NORMS = [f"self_attn.{one}_norm.{part}" for one in "qk" for part in ("weight", "bias")]


class Size(NamedTuple):
    """Of a synthetic model; `swin` puts norms behind sublayers."""

    vocab: int = 96
    dim: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 48
    shards: int = 1
    swin: bool = False
    positions: int = 64


SMALL = Size()
SHARDED = Size(dim=64, heads=8, kv_heads=4, shards=4, swin=True)
"""As 34B: grouped queries, norms behind sublayers, four shards with QK-norms of their own."""


def draw_state(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """A random model under transformers' names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.2, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator)).to(dtype)

    state = {"model.embed_tokens.weight": draw(size.vocab, size.dim)}
    for layer in range(size.layers):
        name = f"model.layers.{layer}."
        for part, rows in (("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads)):
            state[f"{name}self_attn.{part}_proj.weight"] = draw(rows * HEAD, size.dim)
        state[f"{name}self_attn.o_proj.weight"] = draw(size.dim, size.heads * HEAD)
        for part, heads in (("q", size.heads), ("k", size.kv_heads)):
            for kind, mean in (("weight", 1.0), ("bias", 0.0)):
                sets = draw(size.shards, HEAD, mean=mean)
                state[f"{name}self_attn.{part}_norm.{kind}"] = sets.repeat_interleave(heads // size.shards, 0)
        state[f"{name}mlp.gate_proj.weight"] = draw(size.ffn, size.dim)
        state[f"{name}mlp.up_proj.weight"] = draw(size.ffn, size.dim)
        state[f"{name}mlp.down_proj.weight"] = draw(size.dim, size.ffn)
        state[f"{name}input_layernorm.weight"] = draw(size.dim, mean=1.0)
        state[f"{name}post_attention_layernorm.weight"] = draw(size.dim, mean=1.0)
    state["model.norm.weight"] = draw(size.dim, mean=1.0)
    state["lm_head.weight"] = draw(size.vocab, size.dim)
    return state


def chameleon_config(size: Size, **changes: Any) -> dict[str, Any]:
    """What stands in transformers' config.json of a model."""
    return {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": size.vocab,
        "hidden_size": size.dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.ffn,
        "max_position_embeddings": size.positions,
        "swin_norm": size.swin,
        "model_parallel_size": size.shards,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **changes,
    }


def of_shards(state: State, size: Size) -> State:
    """Layout `transformers-4.43`: one QK-norm for each shard."""
    found = dict(state)
    for name in state:
        for norm, heads in (("q_norm", size.heads), ("k_norm", size.kv_heads)):
            if norm in name:
                found[name] = state[name][:: heads // size.shards].clone()
    return found


def in_pairs(vector: Tensor) -> Tensor:
    """Halves of heads, in the first dimension, to adjacent pairs: row i + j HEAD/2 of a head goes to 2 i + j."""
    order = [
        head * HEAD + half * HEAD // 2 + place
        for head in range(len(vector) // HEAD)
        for place in range(HEAD // 2)
        for half in range(2)
    ]
    return vector[order]


def as_trained(state: State, size: Size) -> State:
    """`of_shards` with rows and norms as Meta stores them."""
    found = of_shards(state, size)
    for name, tensor in found.items():
        if "q_proj" in name or "k_proj" in name:
            found[name] = in_pairs(tensor)
        elif "q_norm" in name or "k_norm" in name:
            found[name] = torch.stack([in_pairs(one) for one in tensor])
    return found


def of_anole(state: State, size: Size) -> State:
    """Layout `anole`: rows as Meta's, one QK-norm, the mean of the shards'."""
    found = as_trained(state, size)
    return {name: one.mean(0) if "q_norm" in name or "k_norm" in name else one for name, one in found.items()}


META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_normalization",
    "self_attn.k_norm": "attention.k_normalization",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
}


def of_meta(state: State, size: Size) -> list[State]:
    """Layout `meta`: the shards."""
    shards: list[State] = [{"rope.freqs": torch.rand(HEAD // 2)} for _ in range(size.shards)]
    for name, tensor in as_trained(state, size).items():
        theirs = name
        for old, new in META_NAMES.items():
            theirs = theirs.replace(old, new)
        for rank, shard in enumerate(shards):
            if "q_norm" in name or "k_norm" in name:
                shard[theirs] = tensor[rank].clone()
            elif tensor.ndim == 1:
                shard[theirs] = tensor.clone()
            else:
                on_columns = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
                shard[theirs] = tensor.chunk(size.shards, 1 if on_columns else 0)[rank].clone()
    return shards


def write_meta(folder: Path, state: State, size: Size) -> Path:
    """A folder as Meta's `models/7b` or `models/30b`."""
    folder.mkdir(parents=True)
    shards = of_meta(state, size)
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / ("consolidated.pth" if len(shards) == 1 else f"consolidated.{rank:02}.pth"))
    model = {"dim": size.dim, "n_layers": size.layers, "n_heads": size.heads, "n_kv_heads": size.kv_heads}
    model |= {"vocab_size": size.vocab, "swin_norm": size.swin, "qk_normalization": True, "norm_eps": 1e-5}
    model |= {"rope_theta": 10000.0, "max_seq_len": size.positions}
    (folder / "params.json").write_text(json.dumps({"model": model}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": size.shards}))
    return folder


def write_transformers(folder: Path, state: State, size: Size, **changes: Any) -> Path:
    """A folder with `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(chameleon_config(size, **changes)))
    return folder


def write_all(root: Path, state: State, size: Size) -> dict[str, Path]:
    """The four layouts of one model, by name; Anole's is the same model only where there is one shard."""
    return {
        "meta": write_meta(root / "meta", state, size),
        "anole": write_transformers(
            root / "anole", of_anole(state, size), size, architectures=["ChameleonForCausalLM"]
        ),
        "transformers-4.43": write_transformers(root / "old", of_shards(state, size), size),
        "transformers": write_transformers(root / "new", state, size),
    }
