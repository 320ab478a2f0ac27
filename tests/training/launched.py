"""What the launcher starts in tests: `launched.py RUN_DIR JSON_OPTIONS`, or one after the other with a list of options.

Each option of a list has a `name`, the folder of its run in RUN_DIR.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from toy_task import Contest, Rows, ToyTask

from mixmodal.training.config import TrainerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.trainer import Trainer


class Mortal(ToyTask):
    """Rank `rank` gets a signal in step `step`, or fails."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        super().__init__()
        self.rank, self.calls, self.number = rank, step, number

    def batch_weight(self, batch: Rows) -> Tensor:
        self.calls -= 1
        if self.calls < 0 and int(os.environ["RANK"]) == self.rank:
            if not self.number:
                raise ValueError("shard a.tar is damaged")
            os.kill(os.getpid(), self.number)
        return super().batch_weight(batch)


def train(run_dir: Path, options: Mapping[str, Any]) -> None:
    settings = {"max_steps": 6, "micro_batch_size": 8, "log_every": 1, "tensorboard": False, **options}
    if settings.get("deepspeed"):
        settings["deepspeed"] = Path(settings["deepspeed"])
    task = Contest() if settings.pop("contest", False) else ToyTask()
    if "killed" in settings:
        task = Mortal(*settings.pop("killed"))
    Trainer(TrainerConfig(run_dir=run_dir, **settings), OptimizerConfig(lr=1e-2, warmup_steps=2)).fit(task)


if __name__ == "__main__":
    folder, given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    options = json.loads(given)
    for entry in options if isinstance(options, list) else [options]:
        train(Path(folder) / entry.pop("name", ""), entry)
