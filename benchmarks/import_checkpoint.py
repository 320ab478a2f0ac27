"""Seconds and memory of importing a checkpoint of a given shape: random weights under the true names, in bfloat16.

    python benchmarks/import_checkpoint.py [--shape chameleon_7b] [--layout transformers] [--num_shards 4] [--dir DIR]

`mixmodal import` runs as a process of its own, and then `mixmodal.load_transformer`, or `mixmodal export` back. Memory
is the peak of what is resident, pages of mapped files among it. The disk needs room for the checkpoint three times;
what was written is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from record import record
from torch import Tensor

from mixmodal.interop.chameleon.layouts import LAYOUTS, META, Layout
from mixmodal.models.presets import PRESETS
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.weights import write_weights

FILE_BYTES = 5 << 30
"""Of each file of transformers: what it wrote by default when Chameleon was released."""
DTYPE = torch.bfloat16


class Cost(NamedTuple):
    """Of a process."""

    seconds: float
    peak_bytes: int


def measure(arguments: Sequence[str]) -> Cost:
    """Runs Python with the arguments.

    Raises:
        SystemExit: where it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss * 1024)


def draw(layout: Layout, config: TransformerConfig, num_shards: int, rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a shard under the layout's names, one after another."""
    generator = torch.Generator().manual_seed(rank)
    sizes = config.attention_sizes
    head_dim = sizes["head_dim"]
    rows = {"q": sizes["num_heads"] * head_dim, "k": sizes["num_kv_heads"] * head_dim, "ffn": config.ffn_dim}
    sets = {"q_norm": sizes["num_heads"], "k_norm": sizes["num_kv_heads"]}
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    for own, theirs in layout.names(config.num_layers, has_output=True):
        shape = shapes[own]
        if "attention.qkv" in own:
            parts = [(rows["q"], config.dim), *[(rows["k"], config.dim)] * 2]
        elif "ffn.up" in own:
            parts = [(rows["ffn"], config.dim)] * 2
        elif norm := next((norm for norm in sets if norm in own), None):
            shape = {"head": (sets[norm], head_dim), "shard": (num_shards, head_dim), "one": (head_dim,)}[layout.norms]
            parts = [(head_dim,) if layout is META else shape]
        else:
            parts = [shape]
        for name, part in zip(theirs, parts, strict=True):
            cut = layout.cut(name)
            part = tuple(size // num_shards if place == cut else size for place, size in enumerate(part))
            tensor = torch.ones(part, dtype=DTYPE)  # as norms are that all shards hold
            yield name, tensor.normal_(std=0.02, generator=generator) if tensor.ndim == 2 else tensor


def write_checkpoint(folder: Path, layout: Layout, config: TransformerConfig, num_shards: int) -> None:
    """A checkpoint as it is downloaded, with the file that says what weights do not show."""
    folder.mkdir(parents=True)
    sizes, is_post = config.attention_sizes, config.norm_placement == "post_sublayer"
    if layout is META:
        for rank in range(num_shards):
            torch.save(dict(draw(layout, config, num_shards, rank)), folder / f"consolidated.{rank:02}.pth")
        said = {"model": {"swin_norm": is_post, "n_heads": sizes["num_heads"], "dim": config.dim}}
        (folder / "params.json").write_text(json.dumps(said))
        return
    write_weights(folder, draw(layout, config, num_shards), FILE_BYTES)
    said = {"model_type": "chameleon", "swin_norm": is_post, "hidden_size": config.dim, "vocab_size": config.vocab_size}
    (folder / "config.json").write_text(json.dumps(said))


def main(options: argparse.Namespace) -> None:
    config = replace(PRESETS[options.shape], dropout=0.0)
    layout = LAYOUTS[options.layout]
    num_shards = options.num_shards if layout.norms == "shard" else 1
    settings = {"layout": options.layout, "num_shards": num_shards, "dtype": str(DTYPE).removeprefix("torch.")}
    if options.write is not None:
        write_checkpoint(options.write, layout, config, num_shards)
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        source, ours, back = (Path(name) / part for part in ("source", "ours", "back"))
        measure([*sys.argv, "--write", str(source)])  # a process keeps the peak of the one that it was forked from
        files = [path.stat().st_size for path in source.iterdir()]
        load = f"import mixmodal; mixmodal.load_transformer({str(ours)!r})"
        commands = {
            "import": ["-m", "mixmodal.cli", "import", str(source), "--out", str(ours)],
            "export": ["-m", "mixmodal.cli", "export", str(ours), str(back), "--to", options.layout],
            "load_transformer": ["-c", load],
        }
        label = f"{options.shape}, {options.layout}" + f" in {num_shards} shards" * (num_shards > 1)

        def put(what: str, value: float, unit: str) -> None:
            record("import", f"{label}: {what}, {unit}", [value], unit, "cpu", settings)

        put("checkpoint", sum(files) / 1e9, "GB")
        put("largest file", max(files) / 1e9, "GB")
        for what in options.steps:
            cost = measure(commands[what])
            put(what, cost.seconds, "s")
            put(f"{what}, peak of memory", cost.peak_bytes / 1e9, "GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*PRESETS], default="chameleon_7b")
    parser.add_argument("--layout", choices=[*LAYOUTS], default="transformers")
    parser.add_argument("--num_shards", type=int, default=4, help="of Meta's layout and that of transformers 4.43")
    parser.add_argument("--dir", type=Path, help="where there is room")
    parser.add_argument("--write", type=Path, help="only writes the checkpoint there")
    parser.add_argument("--steps", nargs="+", default=["import", "load_transformer"])
    main(parser.parse_args())
