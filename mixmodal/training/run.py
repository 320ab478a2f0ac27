"""A run: the networks and the data of one training, and how far they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixmodal.training.config import TrainerConfig
from mixmodal.training.ema import AveragedWeights
from mixmodal.training.engine import Engine, Place
from mixmodal.training.fragments import check_savable
from mixmodal.training.optimizer import OptimizerConfig, build_optimizer
from mixmodal.training.randomness import set_seeds
from mixmodal.training.read_ahead import ReadAhead
from mixmodal.training.recomputing import recompute
from mixmodal.training.resources import count_parameters
from mixmodal.training.saving import Saver
from mixmodal.training.task import MODEL, Task


class Run:
    """What a training consists of: all that is saved, and what saves it.

    Args:
        config: how long, how much, where.
        optimizer: of the model.
        task: what is trained.
        settings: the whole DeepSpeed dictionary.
        place: of this process.

    Raises:
        ValueError: where task and settings do not fit together.
    """

    def __init__(
        self,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        task: Task,
        settings: Mapping[str, Any],
        place: Place,
    ) -> None:
        self.config, self.optimizer_config = config, optimizer
        self.task = task
        self.place = place
        set_seeds(self.config.seed)
        model = task.build_model()
        self.parameters = count_parameters(model)
        if self.config.activation_checkpointing:
            recompute(task.recomputed(model))
        if self.config.compile:
            task.compile_model(model)
        self.ema = AveragedWeights(model, self.config.ema_decay) if self.config.ema_decay else None
        opponents = task.build_opponents()
        if opponents and settings["zero_optimization"].get("stage") == 3:
            names = ", ".join(opponents)
            raise ValueError(f"trainer.deepspeed: stage 3 can not train a second network ({names}); choose 0, 1 or 2")
        self.optimizers, self.first_steps = {MODEL: self.optimizer_config}, {MODEL: 0}
        self.engines = {MODEL: Engine(model, build_optimizer(model, self.optimizer_config), settings, place)}
        self.engine = self.engines[MODEL]
        for name, (opponent, own_optimizer, first_step) in opponents.items():
            self.optimizers[name], self.first_steps[name] = own_optimizer, first_step
            self.engines[name] = Engine(opponent, build_optimizer(opponent, own_optimizer), settings, place)
        if self.ema:
            self.ema.to(place.device)
        set_seeds(self.config.seed, place.rank + 1)
        accum = self.config.grad_accum_steps
        loader = task.build_loader(self.config.micro_batch_size, accum, place.rank, place.world_size)
        self.loader = ReadAhead(loader, accum if self.config.read_ahead else 0)
        for engine in self.engines.values():
            check_savable(engine)
        self.saver = Saver(
            self.config.run_dir / "checkpoints",
            rank=place.rank,
            keep=self.config.keep_checkpoints,
            keep_every=self.config.keep_every,
            background=self.config.async_save,
        )
        self.rank_state: dict[str, Any] = {}
        self.step = 0
        self.saved_step = -1
        self.seconds = 0.0

    @property
    def rows_per_step(self) -> int:
        """Of all ranks."""
        return self.place.world_size * self.config.micro_batch_size * self.config.grad_accum_steps

    def close(self) -> None:
        self.loader.close()
        self.saver.close()
        for engine in self.engines.values():
            engine.close()
