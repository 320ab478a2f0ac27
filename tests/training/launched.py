"""What the launcher starts in tests: `launched.py RUN_DIR JSON_OPTIONS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from toy_task import Contest, ToyTask

from mixmodal.training.config import TrainerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.trainer import Trainer

if __name__ == "__main__":
    run_dir, options = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    settings = {"max_steps": 6, "micro_batch_size": 8, "log_every": 1, "tensorboard": False, **json.loads(options)}
    if settings.get("deepspeed"):
        settings["deepspeed"] = Path(settings["deepspeed"])
    task = Contest() if settings.pop("contest", False) else ToyTask()
    Trainer(TrainerConfig(run_dir=Path(run_dir), **settings), OptimizerConfig(lr=1e-2, warmup_steps=2)).fit(task)
