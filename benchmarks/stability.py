"""What keeps a training stable at a deliberately high learning rate: QK-norm, z-loss and where the norms stand.

    python benchmarks/stability.py [--steps 600] [--lr 0.03] [--seeds 3] [--runs runs/stability]

Each arm trains a tiny transformer on captioned shapes from several seeds. Runs that are finished are not made again.
Writes a line for each figure (see record.py) and docs/stability.png; docs/stability.md says what to look at.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import draw_curves
from record import RESULTS, record

from mixmodal.data.pipeline import DataConfig
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.data.token_shards import build_manifest, write_token_shard
from mixmodal.document import CM3LeonFormat, Run
from mixmodal.manifests import write_manifest
from mixmodal.models.transformer import TransformerConfig
from mixmodal.training.checks import NonFiniteError
from mixmodal.training.config import TrainerConfig
from mixmodal.training.metrics import METRICS_FILE
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID, SIDE, LEVELS = (4, 4), 16, 4
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": LEVELS**3}, num_text_pieces=256, num_sentinels=16))
FORMAT = CM3LeonFormat(VOCABULARY, {"image": GRID})
NUM_DOCUMENTS = {"train": 4000, "held_out": 400}
SEQ_LEN, ROWS, LOG_EVERY, WARMUP_STEPS, Z_LOSS = 128, 8, 5, 20, 1e-4
SHAPE = TransformerConfig(dim=64, num_layers=4, num_heads=4, ffn_dim=176, max_seq_len=SEQ_LEN)

ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "pre-norm, QK-norm, z-loss": ({"qk_norm": True}, Z_LOSS),
    "pre-norm, QK-norm": ({"qk_norm": True}, 0.0),
    "pre-norm, z-loss": ({"qk_norm": False}, Z_LOSS),
    "pre-norm": ({"qk_norm": False}, 0.0),
    "post-norm, QK-norm, z-loss": ({"qk_norm": True, "norm_placement": "post_sublayer"}, Z_LOSS),
    "post-norm, z-loss": ({"qk_norm": False, "norm_placement": "post_sublayer"}, Z_LOSS),
}
"""What each changes of the network, and its weight of the z-loss."""
WATCHED = ("loss", "z_loss", "grad_norm", "logit_norm", "output_norm", "attention_logit_max")
PICTURE = RESULTS.parents[1] / "docs" / "stability.png"


def write_documents(folder: Path, count: int, seed: int) -> None:
    """Token shards of captioned shapes: bytes for text, averaged colours for codes."""
    documents, keys = [], []
    for key, picture, caption in synthetic_pairs(count, size=SIDE, seed=seed):
        cells = (
            np.asarray(picture, dtype=np.float64).reshape(GRID[0], SIDE // GRID[0], GRID[1], -1, 3).mean(axis=(1, 3))
        )
        levels = np.minimum(cells * LEVELS / 256, LEVELS - 1).astype(np.int64)
        parts = {"text": np.frombuffer(caption.encode(), np.uint8).astype(np.int64)}
        parts["image"] = (levels @ np.array([LEVELS**2, LEVELS, 1])).ravel()
        documents.append(FORMAT.join([Run(name, VOCABULARY.to_ids(name, found)) for name, found in parts.items()]))
        keys.append(key)
    folder.mkdir(parents=True)
    entry = write_token_shard(folder, "shard_00000", documents, keys, VOCABULARY.size)
    counts = {"documents": count, "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": "0" * 64, "image_tokenizer_sha256": "0" * 64}
    write_manifest(folder, build_manifest(FORMAT, [entry], counts=counts, **hashes))


def build_config(arm: str, seed: int, steps: int, lr: float, runs: Path) -> PretrainConfig:
    """The training of one arm from one seed: a constant rate behind a short warm-up."""
    changes, z_loss_weight = ARMS[arm]
    name = "".join(letter if letter.isalnum() else "_" for letter in arm)
    trainer = TrainerConfig(
        run_dir=runs / f"{name}-{lr:g}-{steps}-{seed}",
        max_steps=steps,
        micro_batch_size=ROWS,
        log_every=LOG_EVERY,
        seed=seed,
        tensorboard=False,
    )
    data = DataConfig(tokens=runs / "tokens" / "train", held_out_tokens=runs / "tokens" / "held_out", seq_len=SEQ_LEN)
    optimizer = OptimizerConfig(lr=lr, warmup_steps=WARMUP_STEPS, schedule="constant")
    return PretrainConfig(
        model=replace(SHAPE, **changes), data=data, optimizer=optimizer, trainer=trainer, z_loss_weight=z_loss_weight
    )


def train(config: PretrainConfig) -> dict[str, Any]:
    """The curves of a run, trained unless it has been before: `(step, value)` by quantity, held-out loss, alarms."""
    folder = config.trainer.run_dir
    failure = folder / "failure.txt"
    if not (folder / "export").is_dir() and not failure.exists():
        try:
            if not pretrain(config).finished:
                raise SystemExit("stopped; the same command goes on from here")
        except NonFiniteError as error:
            failure.write_text(str(error), encoding="utf-8")
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "loss" in line]
    curves = {name: [(line["step"], line[name]) for line in trained if line.get(name) is not None] for name in WATCHED}
    if failure.exists():
        for curve in curves.values():
            curve.append((trained[-1]["step"] + 1 if trained else 1, math.nan))
    return {
        "curves": curves,
        "held_out": next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), math.inf),
        "alarms": sum("alarm" in line for line in lines),
        "failed": failure.exists(),
    }


def figures(run: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """What is recorded of a run: values with units."""
    curves = {name: [value for _, value in curve if math.isfinite(value)] for name, curve in run["curves"].items()}
    losses = curves["loss"]
    settled = losses[WARMUP_STEPS // LOG_EVERY :] or losses
    rises = [later - min(settled[: place + 1]) for place, later in enumerate(settled)]
    found = {"held-out loss": (run["held_out"], "nats"), "largest rise of the loss": (max(rises), "nats")}
    for name in WATCHED[1:]:
        found[f"largest {name.replace('_', ' ')}"] = (max(curves[name]), "")
    found["alarms"] = (run["alarms"], "")
    found["stopped, not finite"] = (float(run["failed"]), "")
    return found


def main(arguments: argparse.Namespace) -> None:
    runs = arguments.runs
    for name, count in NUM_DOCUMENTS.items():
        if not (runs / "tokens" / name / "manifest.json").exists():
            write_documents(runs / "tokens" / name, count, seed=len(name))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for arm in arguments.arms or ARMS:
            config = build_config(arm, seed, arguments.steps, arguments.lr, runs)
            found.setdefault(arm, []).append(train(config))
            print(arm, seed, {name: round(value, 3) for name, (value, _) in figures(found[arm][-1]).items()})
    if arguments.no_record:
        return
    draw_picture(found, PICTURE)
    settings = {**vars(SHAPE), "seq_len": SEQ_LEN, "rows": ROWS, "steps": arguments.steps, "lr": arguments.lr}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    settings |= {"warmup_steps": WARMUP_STEPS, "z_loss_weight": Z_LOSS, "seeds": arguments.seeds}
    for arm, of_seeds in found.items():
        for name, (_, unit) in figures(of_seeds[0]).items():
            record("stability", f"{arm}: {name}", [figures(run)[name][0] for run in of_seeds], unit, kind, settings)


def draw_picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    titles = {name: name.replace("_", " ") for name in WATCHED} | {"z_loss": "z loss, before its weight"}
    panels: dict[str, dict[str, Sequence[Any]]] = {
        title: {arm: [run["curves"][name] for run in of_seeds] for arm, of_seeds in found.items()}
        for name, title in titles.items()
    }
    draw_curves(panels, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--arms", nargs="*", choices=[*ARMS], help="only these")
    parser.add_argument("--no_record", action="store_true", help="print the figures, write no line and no picture")
    main(parser.parse_args())
