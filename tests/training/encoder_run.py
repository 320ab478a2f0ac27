"""A small encoder on shards of captioned shapes, which launched processes train as well.

`encoder_run.py FOLDER JSON_OPTIONS`: trains on the shards in FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mixmodal.data.pairs import PairDataConfig
from mixmodal.models.two_tower import TowerConfig, TwoTowerConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.contrastive import EncoderTrainingConfig, train_encoder
from mixmodal.training.optimizer import OptimizerConfig

TOWER = TowerConfig(dim=48, num_layers=2, num_heads=4, ffn_dim=96)


def build_config(folder: Path, kind: Any = "clip", **options: Any) -> EncoderTrainingConfig:
    """16 pixels, 8 pairs a step and 4 steps unless told otherwise."""
    defaults = {"run_dir": folder / "run", "max_steps": 4, "micro_batch_size": 8, "log_every": 1, "tensorboard": False}
    return EncoderTrainingConfig(
        data=PairDataConfig(train=(folder / "train",), held_out=(folder / "held_out",)),
        model=TwoTowerConfig(
            kind=kind, image_size=16, patch_size=4, image=TOWER, text=TOWER, vocab_size=320, max_text_tokens=12
        ),
        trainer=TrainerConfig(**{**defaults, **options}),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.01, warmup_steps=2, eps=1e-8),
    )


if __name__ == "__main__":
    folder, given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    for options in json.loads(given):
        paths = {name: Path(options.pop(name)) for name in ("run_dir", "deepspeed") if name in options}
        train_encoder(build_config(Path(folder), **options, **paths))
