"""Tokens a second and peak memory of training: the trainer against a plain PyTorch loop over transformers' Chameleon.

    python benchmarks/train_throughput.py compare [--shape cpu] [--repeats 3] [--steps 4] [--threads 2]
    python benchmarks/train_throughput.py length  [--shape cpu] [--max_length 8192]

Both train a network of the same shape with random weights on the same packed rows, with AdamW and clipping. The
trainer also packs, checks for non-finite values and logs, which the plain loop does not. The plain loop gives positions
that restart with every document, from which transformers makes a dense mask that keeps documents apart (`isolated`: the
same loss as the trainer's), or leaves them out, so that documents see those before them in the row (`causal`). Each
turn is a process of its own; subjects take turns. Tokens are those that are not padding. Memory is what the resident
set (on a GPU: what torch allocates) has at its peak beyond what stood before the network was built.

`length` measures forward and backward of one row's worth of tokens for rows of 1k to 8k tokens and 1 to 64 documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from documents import write_texts
from record import record
from torch import nn

from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.objectives.loss import next_token_targets
from mixmodal.quickstart.report import read_metrics
from mixmodal.training.config import TrainerConfig
from mixmodal.training.engine import load_deepspeed
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain
from mixmodal.training.task import to_device

WARM_UP = 2
"""Steps before the clock starts."""
PEAK_FLOPS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}
"""Of GPUs by a part of their name, in bfloat16 without sparsity (NVIDIA's data sheets)."""
PEERS = {"transformers, isolated": True, "transformers, causal": False}


class Shape(NamedTuple):
    """A network and its rows.

    Args:
        model: options of `TransformerConfig`.
        rows: in a step.
        seq_len: tokens in a row.
        documents: shortest and longest document, in tokens.
    """

    model: dict[str, int]
    rows: int
    seq_len: int
    documents: tuple[int, int]


SHAPES = {
    "tiny": Shape({"vocab_size": 256, "dim": 32, "num_layers": 3, "num_heads": 2, "ffn_dim": 64}, 2, 64, (10, 30)),
    "cpu": Shape(
        {"vocab_size": 16384, "dim": 512, "num_layers": 6, "num_heads": 8, "ffn_dim": 1408}, 4, 2048, (100, 500)
    ),
    "350m": Shape(
        {"vocab_size": 65536, "dim": 1024, "num_layers": 24, "num_heads": 16, "ffn_dim": 2816}, 8, 4096, (200, 1500)
    ),
    "1b": Shape(
        {"vocab_size": 65536, "dim": 2048, "num_layers": 20, "num_heads": 16, "ffn_dim": 5632}, 4, 4096, (200, 1500)
    ),
}


def build_config(options: argparse.Namespace, folder: Path) -> PretrainConfig:
    """The training that both do, on documents that it writes to `folder / "tokens"`."""
    shape, steps = shape_of(options), WARM_UP + options.steps
    if not (folder / "tokens").exists():
        tokens = (steps + 1) * shape.rows * shape.seq_len
        lengths = np.random.default_rng(0).integers(*shape.documents, size=tokens // shape.documents[0])
        lengths = lengths[: int((lengths.cumsum() < tokens).sum())]
        write_texts(folder / "tokens", shape.model["vocab_size"], lengths.tolist())
    return PretrainConfig(
        model=TransformerConfig(**shape.model, max_seq_len=shape.seq_len),
        data=DataConfig(tokens=folder / "tokens", seq_len=shape.seq_len),
        objective=CausalMaskedConfig(min_masks=0, max_masks=0, poisson_rate=0.0),
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0),
        trainer=TrainerConfig(
            run_dir=folder / "run",
            max_steps=steps,
            micro_batch_size=shape.rows,
            precision=options.precision,
            compile=options.compile,
            log_every=WARM_UP,
            tensorboard=False,
        ),
        z_loss_weight=0.0,
    )


# one turn, in a process of its own


def turn(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Trains once: tokens a second after the warm-up, peak memory, and operations a token."""
    if options.threads:
        torch.set_num_threads(options.threads)
    config = build_config(options, folder)
    task = PretrainTask(config)
    loader = task.build_loader(shape_of(options).rows, 1, 0, 1)
    steps = list(islice(loader, config.trainer.max_steps))
    cuda = torch.cuda.is_available()
    import transformers  # noqa: F401  # libraries stand before memory is counted

    load_deepspeed()
    before = start_memory(cuda)
    if options.subject in PEERS:
        seconds, loss = train_plain(config, steps, PEERS[options.subject], options.precision)
    else:
        seconds, loss = train_ours(config)
    peak = peak_memory(cuda) - before
    tokens = sum(task.batch_tokens(batch) for batch in steps[WARM_UP:])
    return {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak,
        "loss": loss,
        "flops_per_token": sum(task.batch_flops(batch) for batch in steps[WARM_UP:]) / tokens,
    }


def train_ours(config: PretrainConfig) -> tuple[float, float]:
    """Seconds of the steps after the warm-up, and the loss of the last logged steps."""
    pretrain(config)
    lines = read_metrics(config.trainer.run_dir / "metrics.jsonl")
    lines = [line for line in lines if line.get("tokens_per_second")]
    warm = next(line for line in lines if line["step"] == WARM_UP)
    return lines[-1]["wall_time_s"] - warm["wall_time_s"], lines[-1]["loss"]


def train_plain(config: PretrainConfig, steps: list[Batch], isolated: bool, precision: str) -> tuple[float, float]:
    """The same of a loop as one writes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_peer(config.model).to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=0.1, betas=(0.9, 0.95))
    started, loss = 0.0, torch.zeros(())
    for number, batch in enumerate(steps):
        if number == WARM_UP:
            loss.item()  # waits for the device
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast_bfloat16"):
            loss = peer_loss(model, to_device(batch, device), isolated)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.trainer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    found = loss.item()
    return time.perf_counter() - started, found


def build_peer(shape: TransformerConfig) -> nn.Module:
    """transformers' Chameleon of the same shape, without its image tokenizer."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

    images = ChameleonVQVAEConfig(
        embed_dim=8, num_embeddings=4, latent_channels=8, resolution=16, base_channels=32, channel_multiplier=[1]
    )
    config = ChameleonConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_seq_len,
        vocabulary_map={"<image>": 5},  # no image codes: it would forbid them as targets
        vq_config=images.to_dict(),
        attn_implementation="sdpa",
        use_cache=False,
    )
    model: Any = ChameleonForConditionalGeneration(config)
    del model.model.vqmodel
    return model


def peer_loss(model: nn.Module, batch: Batch, isolated: bool) -> torch.Tensor:
    """Mean loss over the tokens that the trainer learns."""
    targets, weights = next_token_targets(batch.tokens, batch.segment_ids, batch.loss_weights)
    labels = targets.masked_fill(weights == 0, -100).roll(1, dims=1)  # transformers moves them back
    positions = {"position_ids": batch.positions} if isolated else {}
    return model(input_ids=batch.tokens, labels=labels, use_cache=False, **positions).loss


def start_memory(cuda: bool) -> int:
    """Bytes that stand, from where the peak is then counted."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# the comparison


def compare(options: argparse.Namespace) -> None:
    """Alternates subjects, each turn in a process of its own, and records medians and ratios."""
    found = read_turns(options.turns)
    for repeat in range(options.repeats):
        for name, turns in found.items():
            if len(turns) <= repeat:
                turns.append(take_turn(name, options))
                line = json.dumps({"subject": name, **turns[-1]})
                print(line, flush=True)
                if options.turns:
                    with open(options.turns, "a", encoding="utf-8") as file:
                        file.write(line + "\n")
    shape, kind = shape_of(options), "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**shape._asdict(), **{key: vars(options)[key] for key in ("steps", "precision", "threads", "compile")}}
    label = f"{options.shape} shape, {options.precision}"
    write: Callable[..., Any] = print if options.dry else record
    for name, turns in found.items():
        speed = [one["tokens_per_second"] for one in turns]
        write("train_throughput", f"{label}: {name}", speed, "tokens/s", kind, settings)
        memory = [one["peak_bytes"] / 1e9 for one in turns]
        write("train_throughput", f"{label}: {name}, peak memory", memory, "GB", kind, settings)
        if options.peak_flops:
            shares = [one["tokens_per_second"] * one["flops_per_token"] / options.peak_flops for one in turns]
            write("train_throughput", f"{label}: {name}, MFU", shares, "", kind, settings)
    for name in PEERS:
        ratios = [
            ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in zip(found["ours"], found[name])
        ]
        write("train_throughput", f"{label}: speed of ours over {name}", ratios, "times", kind, settings)
    print({name: statistics.median(one["tokens_per_second"] for one in turns) for name, turns in found.items()})


def read_turns(path: Path | None) -> dict[str, list[dict[str, float]]]:
    """What was measured before, by subject, where a machine was not there for long enough."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *PEERS)}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []:
        turn = json.loads(line)
        found[turn.pop("subject")].append(turn)
    return found


def take_turn(name: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = [f"--{key}={value}" for key, value in vars(options).items() if key in TURN_OPTIONS and value]
    arguments += ["--compile"] if options.compile else []
    command = [sys.executable, __file__, "turn", "--subject", name, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# cost against length


def length(options: argparse.Namespace) -> None:
    """Milliseconds a thousand tokens of forward and backward, by length of a row and number of its documents."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[options.shape]
    write: Callable[..., Any] = print if options.dry else record
    lengths = [length for length in (1024, 2048, 4096, 8192) if length <= options.max_length]
    model = Transformer(TransformerConfig(**shape.model, max_seq_len=max(lengths))).to(device)
    for kind in options.kinds.split(","):
        model.attention_kind = kind
        for size in lengths:
            for count in (1, 4, 16, 64):
                if device.type == "cuda":
                    time_row(model, size, count, device)  # for compilers and caches
                seconds = [time_row(model, size, count, device) for _ in range(options.repeats)]
                per_thousand = [1e6 * value / size for value in seconds]
                subject = f"{kind}, {size} tokens in a row, ms / 1k tokens: {count} documents"
                settings = {**shape.model, "threads": options.threads}
                write("train_length", subject, per_thousand, "ms / 1k tokens", device.type, settings)


def time_row(model: Transformer, size: int, count: int, device: torch.device) -> float:
    """Seconds of forward and backward of a row of `count` documents, hidden states alone: no output layer."""
    tokens = torch.randint(1, 100, (1, size), device=device)
    positions = torch.arange(size, device=device)[None] % (size // count)
    segments = 1 + torch.arange(size, device=device)[None] // (size // count)
    model.zero_grad()
    started = time.perf_counter()
    model.hidden(tokens, positions, segments).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


TURN_OPTIONS = ("shape", "rows", "steps", "threads", "precision")


def peak_flops() -> float | None:
    """Of the GPU at hand, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for part, value in PEAK_FLOPS.items() if part in name), None)


def shape_of(options: argparse.Namespace) -> Shape:
    shape = SHAPES[options.shape]
    return shape._replace(rows=options.rows or shape.rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["compare", "length", "turn"])
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--precision", choices=["float32", "autocast_bfloat16", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=0, help="in a step; 0 takes those of the shape")
    parser.add_argument("--compile", action="store_true", help="of ours: trainer.compile")
    parser.add_argument("--steps", type=int, default=4, help="timed steps, an even number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves them alone")
    parser.add_argument("--peak_flops", type=float, default=peak_flops(), help="of the device, for the MFU")
    parser.add_argument("--max_length", type=int, default=8192)
    parser.add_argument("--kinds", default="auto,dense", help="of attention, in mode length")
    parser.add_argument("--subject", default="ours", help="in mode turn")
    parser.add_argument("--turns", type=Path, help="of compare: a file to go on with")
    parser.add_argument("--dry", action="store_true", help="print instead of recording")
    arguments = parser.parse_args()
    if arguments.mode == "turn":
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(turn(arguments, Path(name))))
    else:
        {"compare": compare, "length": length}[arguments.mode](arguments)
