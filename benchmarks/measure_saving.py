"""Seconds that a checkpoint holds up training, beside the seconds of a step.

    python benchmarks/measure_saving.py [--dim 512] [--layers 8] [--saves 5]

A transformer in float32 with AdamW on random documents, a checkpoint every four steps: written while training waits,
and in the background.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from documents import SHAPE, VOCABULARY, write_documents
from record import record

from mixmodal.data.pipeline import DataConfig
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.training import trainer
from mixmodal.training.config import TrainerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain

EVERY = 4


def measure(folder: Path, shape: dict[str, Any], saves: int, background: bool) -> tuple[list[float], list[float]]:
    """Seconds of each save but the last, for which the end of training waits, and of each step without one."""
    held_up: list[float] = []
    steps: list[float] = []
    save, optimize = trainer.save, trainer.Loop._optimize  # pyright: ignore[reportPrivateUsage]
    settings = TrainerConfig(
        run_dir=folder / f"run_{background}",
        max_steps=EVERY * (saves + 1),
        micro_batch_size=4,
        save_every=EVERY,
        log_every=1000,
        tensorboard=False,
        async_save=background,
    )
    data = DataConfig(tokens=folder / "tokens", seq_len=shape["max_seq_len"])
    trainer.save = timed(save, held_up)
    trainer.Loop._optimize = timed(optimize, steps)  # pyright: ignore[reportPrivateUsage]
    try:
        pretrain(PretrainConfig(model=TransformerConfig(**shape), data=data, trainer=settings))
    finally:
        trainer.save, trainer.Loop._optimize = save, optimize  # pyright: ignore[reportPrivateUsage]
    return held_up[:-1], steps[1:]


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = function(*arguments, **options)
        seconds.append(time.perf_counter() - began)
        return found

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    shape = {
        **SHAPE,
        "dim": arguments.dim,
        "num_layers": arguments.layers,
        "num_heads": 8,
        "ffn_dim": 3 * arguments.dim,
    }
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        network = Transformer(TransformerConfig(**{**shape, "vocab_size": VOCABULARY.size}))
    settings = {"parameters": sum(p.numel() for p in network.parameters()), "zero_stage": 0, "num_ranks": 1, **shape}
    with tempfile.TemporaryDirectory() as name:
        write_documents(Path(name) / "tokens")
        for background in (False, True):
            held_up, steps = measure(Path(name), shape, arguments.saves, background)
            how = "in the background" if background else "while training waits"
            record("saving", f"a checkpoint written {how}", held_up, "s", kind, settings)
            record("saving", f"a step, checkpoints {how}", steps, "s", kind, settings)
