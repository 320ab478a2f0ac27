"""Kills a run again and again, and looks whether it ends with the weights of one that was left alone.

    python benchmarks/interruptions.py [--kills 50] [--steps 150] [--seed 0] [--dry_run]

A small transformer trains with dropout on random documents and saves after every step. `kill -9` hits it at random
moments: at its start, within steps and within saves. After each it is started again. At the end its exported weights,
its losses and its last checkpoint must be those of the uninterrupted run, bit for bit. All this for saves that training
waits for, and for saves in the background.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from documents import SHAPE, write_documents
from record import record

from mixmodal.data.pipeline import DataConfig
from mixmodal.models.transformer import TransformerConfig
from mixmodal.quickstart.report import read_metrics
from mixmodal.training.checkpoint import PARTIAL, latest_checkpoint, read_json
from mixmodal.training.config import TrainerConfig
from mixmodal.training.engine import load_deepspeed
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain

TINY: dict[str, Any] = {**SHAPE, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "dropout": 0.1}
OPTIONS = {"micro_batch_size": 2, "save_every": 1, "log_every": 1, "tensorboard": False, "keep_checkpoints": 3}


@dataclass
class Outcome:
    """How it went.

    Args:
        runs: that were killed, again and again; one unless it came to its end before the last kill.
        kills: how often.
        in_saves: how many kills left a part of a checkpoint.
        steps: at which step the run stood each time.
        same: whether all runs ended as the uninterrupted one did.
    """

    runs: int = 1
    kills: int = 0
    in_saves: int = 0
    steps: list[int] = field(default_factory=list)
    same: bool = True


def start(run: Path, tokens: Path, steps: int, background: bool) -> int:
    """A process that trains; a copy of this one, so that it need not import everything again."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(run.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)  # a copied process has none of the threads that torch may have started
        trainer = TrainerConfig(run_dir=run, max_steps=steps, async_save=background, **OPTIONS)
        data = DataConfig(tokens=tokens, seq_len=TINY["max_seq_len"])
        optimizer = OptimizerConfig(lr=1e-3, warmup_steps=5)
        pretrain(PretrainConfig(model=TransformerConfig(**TINY), data=data, optimizer=optimizer, trainer=trainer))
        status = 0
    finally:
        os._exit(status)  # even where training raised: nothing of this process's own may go on here


def finish(child: int, run: Path) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"training failed:\n{run.with_suffix('.log').read_text()[-2000:]}")


def step_of(run: Path) -> int:
    folder = latest_checkpoint(run / "checkpoints")
    return int(folder.name[-8:]) if folder else 0


def result(run: Path) -> tuple[list[Any], Any]:
    """Losses and checksums of the last checkpoint and of the exported weights."""
    lines = read_metrics(run / "metrics.jsonl")
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    folder = latest_checkpoint(run / "checkpoints")
    assert folder is not None
    sums = read_json(folder / "checksums.json")
    weights = [path.read_bytes() for path in sorted((run / "export").glob("*.safetensors"))]
    assert weights
    return losses, (folder.name, sums["model_00000.pt"], sums["rank_00000.pt"], weights)


def interrupt(folder: Path, tokens: Path, kills: int, steps: int, background: bool, rng: random.Random) -> Outcome:
    """Trains once in peace and once with interruptions."""
    began = time.perf_counter()
    whole, run = folder / "whole", folder / "killed_0"
    child = start(whole, tokens, steps, background)
    while step_of(whole) < 1:
        time.sleep(0.001)
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"training failed:\n{whole.with_suffix('.log').read_text()[-2000:]}")
    start_s = time.perf_counter() - began
    finish(child, whole)
    step_s = (time.perf_counter() - began - start_s) / steps
    print(f"{start_s:.1f} s to the first checkpoint, {step_s:.3f} s a step with its checkpoint", flush=True)
    outcome = Outcome()
    while outcome.kills < kills:
        child = start(run, tokens, steps, background)
        if rng.random() < 0.1:
            time.sleep(start_s * rng.random())
        else:  # some steps from here, and a part of a step; the machine may be slower than it was
            left = (steps - step_of(run)) / (kills - outcome.kills + 1)
            target = step_of(run) + int(left * rng.random() * 1.5)
            while step_of(run) < target and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(step_s / 20)
            time.sleep(step_s * 1.5 * rng.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:  # it was faster than the kill: that run is done, another one takes the kills that are left
            outcome.same &= result(run) == result(whole)
            outcome.runs += 1
            run = folder / f"killed_{outcome.runs}"
            continue
        if status != signal.SIGKILL:
            raise SystemExit(f"training failed:\n{run.with_suffix('.log').read_text()[-2000:]}")
        outcome.kills += 1
        outcome.in_saves += any((run / "checkpoints").glob(f"*{PARTIAL}"))
        outcome.steps.append(step_of(run))
    finish(start(run, tokens, steps, background), run)
    outcome.same &= result(run) == result(whole)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--dry_run", action="store_true", help="record nothing")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a copied process can not use a GPU: on the CPU, as it is recorded
    load_deepspeed()
    different = 0
    with tempfile.TemporaryDirectory() as name:
        write_documents(Path(name) / "tokens", count=200)
        for background in (False, True):
            folder = Path(name) / f"background_{background}"
            folder.mkdir()
            rng = random.Random(arguments.seed)
            found = interrupt(folder, Path(name) / "tokens", arguments.kills, arguments.steps, background, rng)
            how = "saving in the background" if background else "saving while training waits"
            ending = "ended with the same weights" if found.same else "ENDED WITH OTHER WEIGHTS"
            print(f"{how}: {found.kills} kills, {found.in_saves} within a save, at steps {found.steps}")
            print(f"{how}: {found.runs} runs {ending}")
            different += not found.same
            if found.same and not arguments.dry_run:
                subject = f"{how}: kills -9 of a run that ended with exactly the weights of the uninterrupted one"
                settings = {
                    "steps": arguments.steps,
                    "seed": arguments.seed,
                    "within_a_save": found.in_saves,
                    "runs": found.runs,
                }
                record("interruptions", subject, [found.kills], "kills", "cpu", {**settings, **TINY, **OPTIONS})
    raise SystemExit(different)


if __name__ == "__main__":
    main()
