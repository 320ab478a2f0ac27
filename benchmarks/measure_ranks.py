"""How far apart trainings end that share one batch among processes in different ways.

    python benchmarks/measure_ranks.py [--steps 20]

A tiny transformer on random documents with CM3's masks, in float32 with AdamW and clipping: the same config and the
same 8 rows a step by `python train/pretrain.py`, by `deepspeed --num_gpus N train/pretrain.py` at every ZeRO stage, and
on two hosts (127.0.0.1 and 127.0.0.2, a hostfile and a launcher on each, as docs/launching.md says). Recorded is the
worst difference to the first: of the losses of all steps, relative, and of the exported weights after the last one.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from documents import SHAPE, write_documents
from record import record
from safetensors.torch import load_file

from mixmodal.config import save_config
from mixmodal.data.pipeline import DataConfig
from mixmodal.models.transformer import TransformerConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.quickstart.report import read_metrics
from mixmodal.training.config import TrainerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
ROWS = 8
"""In a step, whoever computes them."""
RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)


def write_config(folder: Path, steps: int) -> Path:
    """The training that all do; how it is shared is told on the command line."""
    write_documents(folder / "tokens", count=200)
    config = PretrainConfig(
        model=TransformerConfig(**SHAPE),
        data=DataConfig(tokens=folder / "tokens", seq_len=SHAPE["max_seq_len"]),
        objective=CausalMaskedConfig(min_masks=0, max_masks=4, poisson_rate=0.0),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
        trainer=TrainerConfig(
            run_dir=folder / "one", max_steps=steps, micro_batch_size=ROWS, log_every=1, tensorboard=False
        ),
    )
    save_config(config, folder / "train.yaml")
    return folder / "train.yaml"


def share(config: Path, name: str, ranks: int, stage: int) -> list[str]:
    """The script and its options for a run by `ranks` processes, its folder beside the config."""
    micro = min(ROWS // ranks, 2)
    return [
        str(ROOT / "train" / "pretrain.py"),
        f"--config={config}",
        f"--trainer.run_dir={config.parent / name}",
        f"--trainer.micro_batch_size={micro}",
        f"--trainer.grad_accum_steps={ROWS // ranks // micro}",
        f"--deepspeed={ROOT / 'configs' / 'deepspeed' / f'zero{stage}.json'}",
    ]


def launcher(*options: str) -> list[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--master_port={port}", *options]


def finish(commands: list[list[str]], log: Path) -> None:
    """Runs commands side by side, each on one thread.

    Raises:
        SystemExit: one failed; with the end of what they printed.
    """
    settings = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        children = [
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings) for command in commands
        ]
        codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"a training failed ({codes}):\n{log.read_text()[-3000:]}")


def differences(run: Path, other: Path) -> tuple[float, float]:
    """The worst of the losses, relative, and of the weights."""
    curves = []
    for folder in (run, other):
        lines = read_metrics(folder / "metrics.jsonl")
        curves.append([line["loss"] for line in lines if "loss" in line])
    losses = max(abs(one / two - 1) for one, two in zip(*curves, strict=True))
    ours, theirs = (load_file(next((folder / "export").glob("*.safetensors"))) for folder in (run, other))
    return losses, max(float((ours[name] - theirs[name]).abs().max()) for name in ours | theirs)


def measure(steps: int, folder: Path) -> None:
    config = write_config(folder, steps)
    finish([[sys.executable, str(ROOT / "train" / "pretrain.py"), f"--config={config}"]], folder / "one.log")
    found = {}
    for ranks in RANKS:
        for stage in STAGES:
            name = f"{ranks} process{'es' * (ranks > 1)}, ZeRO {stage}"
            options = share(config, name.replace(" ", "_"), ranks, stage)
            finish([[*launcher(f"--num_gpus={ranks}"), *options]], folder / "log")
            found[name] = differences(folder / name.replace(" ", "_"), folder / "one")
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    start = launcher(f"--hostfile={folder / 'hosts'}", "--no_ssh", "--master_addr=127.0.0.1")
    options = share(config, "hosts_run", 2, 2)
    finish([[*start, f"--node_rank={node}", *options] for node in (0, 1)], folder / "log")
    found["2 hosts of one process, ZeRO 2"] = differences(folder / "hosts_run", folder / "one")
    settings = {"steps": steps, "rows": ROWS, **SHAPE}
    for name, (losses, weights) in found.items():
        record("ranks", f"{name}: losses", [losses], "relative", "cpu", settings)
        record("ranks", f"{name}: weights after the last step", [weights], "absolute", "cpu", settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(arguments.steps, Path(name))
