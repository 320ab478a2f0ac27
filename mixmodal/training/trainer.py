"""The training loop. It knows steps, not modalities: what is trained is a `Task`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmodal.config import save_config
from mixmodal.objectives.loss import Sums
from mixmodal.training import checkpoint
from mixmodal.training.alarms import Alarms
from mixmodal.training.checks import Check
from mixmodal.training.config import TrainerConfig
from mixmodal.training.deepspeed_config import deepspeed_config
from mixmodal.training.engine import Place, init_distributed
from mixmodal.training.interrupt import StopSignal
from mixmodal.training.metrics import METRICS_FILE, MetricsLog, MetricSums, Record
from mixmodal.training.optimizer import OptimizerConfig, lr_at, set_lr
from mixmodal.training.precision import autocast
from mixmodal.training.randomness import random_state, set_random_state
from mixmodal.training.ranks import RankWatch, launched
from mixmodal.training.resources import write_resources
from mixmodal.training.restoring import restore, save
from mixmodal.training.run import Run
from mixmodal.training.task import MODEL, Batch, Task, to_device

EXPORT = "export"
"""Folder of a run for what tasks export."""


class FitResult(NamedTuple):
    """How training ended.

    Args:
        steps: optimizer steps done, those of earlier runs included.
        finished: False where a signal stopped it; the same call then goes on.
        metrics: of the last evaluation.
    """

    steps: int
    finished: bool
    metrics: dict[str, float | None]


class Trainer:
    """Trains a task: `Trainer(config, optimizer).fit(task)`.

    Args:
        config: how long, how much, where.
        optimizer: AdamW and its schedule.
        resolved: the whole config of the command, written to config.yaml; the two above where it is None.
    """

    def __init__(self, config: TrainerConfig, optimizer: OptimizerConfig, resolved: Any = None) -> None:
        self.config = config
        self.optimizer_config = optimizer
        self.resolved = {"trainer": config, "optimizer": optimizer} if resolved is None else resolved

    def fit(self, task: Task) -> FitResult:
        """Trains to `max_steps` or to where the data end, evaluates, saves and exports; or, on SIGTERM or SIGINT, saves
        and returns.

        Raises:
            NonFiniteError: before the step that would have spoilt the weights.
            CheckpointError: where a checkpoint can not be written or read.
            RankError: where another process has died or failed.
            ValueError: where the run folder or the DeepSpeed file does not fit the config.
        """
        config = self.config.shared(launched())
        settings = deepspeed_config(
            micro_batch_size=config.micro_batch_size,
            grad_accum_steps=config.grad_accum_steps,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
            zero_file=config.deepspeed,
        )
        if settings["zero_optimization"].get("stage") == 3:
            self._check_whole_weights(task)
        self._check_folder()
        place = init_distributed()
        with RankWatch(place.rank, place.world_size), StopSignal() as stop:
            run = Loop(config, self.optimizer_config, task, settings, place)
            try:
                restore(run)
                if place.rank == 0:
                    save_config(self.resolved, config.run_dir / "config.yaml")
                return run.train(stop)
            finally:
                run.close()

    def _check_whole_weights(self, task: Task) -> None:
        """Refuses what ZeRO stage 3, which keeps parts of weights, can not do."""
        acting = {
            "trainer.ema_decay": (self.config.ema_decay, "0"),
            "sample_every": (task.draws_pictures, "0"),
            "trainer.compile": (self.config.compile, "false"),
        }
        for name, (acts, idle) in acting.items():
            if acts:
                raise ValueError(f"{name} needs whole weights, which ZeRO stage 3 does not keep: set it to {idle}")

    def _check_folder(self) -> None:
        if self.config.run_dir.is_file():
            raise ValueError(f"trainer.run_dir {self.config.run_dir} is a file; give a folder, which need not exist")
        there = checkpoint.whole_checkpoints(self.config.run_dir / "checkpoints")
        if there and not self.config.resume:
            raise ValueError(
                f"trainer.run_dir {self.config.run_dir} holds {there[-1].name}; "
                "set trainer.resume or choose another folder"
            )


class Loop(Run):
    """One call of `fit`: a run on its way from where it stands to its end."""

    def __init__(
        self,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        task: Task,
        settings: Mapping[str, Any],
        place: Place,
    ) -> None:
        super().__init__(config, optimizer, task, settings, place)
        self.last_eval: dict[str, float | None] = {}
        self.end_of_data = ""
        self.sums = MetricSums()
        self.alarms = Alarms(config.alarm_growth, optimizer.warmup_steps)

    # from start to end

    def train(self, stop: StopSignal) -> FitResult:
        config = self.config
        config.run_dir.mkdir(parents=True, exist_ok=True)
        batches = self._next_batches()  # none where the run is finished, which only the data may know
        log = MetricsLog(
            config.run_dir,
            first_step=self.step,
            max_steps=config.max_steps,
            tensorboard=config.tensorboard,
            active=self.place.rank == 0,
            finished=not batches,
        )
        with log:
            if self.place.rank == 0:
                self.alarms.replay(config.run_dir / METRICS_FILE)
            if self.step:
                how = "going on from" if batches else "finished:"
                log.say(f"{how} step {self.step} of {config.max_steps}")
            total, trained = self.parameters
            if batches and trained < total:
                log.say(f"trained: {trained:,} of {total:,} parameters")
            finished = self._steps(batches, log, stop)
            if batches and self.place.rank == 0:
                write_resources(config.run_dir, self.parameters, self.place.device)
            if finished:
                self._evaluate(log, last=True)
                self._export()
                if (config.run_dir / EXPORT).is_dir():
                    log.say(f"exported to {config.run_dir / EXPORT}")
            return FitResult(self.step, finished, self.last_eval)

    def _steps(self, batches: list[Batch], log: MetricsLog, stop: StopSignal) -> bool:
        config = self.config
        clock, tokens, flops = time.perf_counter(), 0, 0.0
        while batches:
            rates = {name: self._rate(name) for name in self.engines}
            for name, engine in self.engines.items():
                set_lr(engine.optimizer, rates[name])
            tokens += sum(self.task.batch_tokens(batch) for batch in batches)
            flops += sum(self.task.batch_flops(batch) for batch in batches)
            norms, stopping, batches = self._optimize(batches, stop)
            log.advance(self.step)
            due = stopping or not batches
            if due or self.step % config.log_every == 0:
                self._log(log, norms, rates, tokens, flops, time.perf_counter() - clock)
                clock, tokens, flops = time.perf_counter(), 0, 0.0
            pause = time.perf_counter()
            if self._is_due(config.eval_every) and not due:
                self._evaluate(log)
            if due or self._is_due(config.save_every):
                save(self, wait=due)
            clock += time.perf_counter() - pause
            if stopping and batches:
                name = stop.name or "a signal to another rank"
                log.say(f"stopped by {name} at step {self.step}; the same command goes on from here")
                return False
        if self.end_of_data:
            log.say(f"step {self.step} of {config.max_steps} is the last: {self.end_of_data}")
        return True

    def _rate(self, name: str) -> float:
        """Learning rate of a network, whose schedule begins where it does."""
        first = self.first_steps[name]
        return lr_at(max(0, self.step - first), self.optimizers[name], self.config.max_steps - first)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # one step

    def _next_batches(self) -> list[Batch]:
        """Micro-batches of the next step, none after the last or where the data end; the state saved is that before.

        Raises:
            ValueError: where there are no data for the first step.
        """
        self.rank_state = {"loader": self.loader.state_dict(), "random": random_state()}
        goes_on = self.step < self.config.max_steps
        try:
            return [next(self.loader) for _ in range(self.config.grad_accum_steps if goes_on else 0)]
        except StopIteration as end:
            self.end_of_data = str(end)
        if not self.step:
            raise ValueError(f"there are no data for the first step: {self.end_of_data}")
        return []

    def _optimize(self, batches: list[Batch], stop: StopSignal) -> tuple[dict[str, float], bool, list[Batch]]:
        """One optimizer step: gradient norms, whether to stop, and the batches of the next step.

        The gradient is that of the sum of losses over the weight of all micro-batches of all ranks. The next batches
        are made while the device works; its one wait is where losses and norms are checked, before any weights change.
        (ZeRO stages 1 to 3 find a norm while they step: there a network may have stepped when the next one stops it.)
        """
        weight = self._global_weight(batches, stop)
        networks = {name: engine.model for name, engine in self.engines.items()}
        for network in networks.values():
            network.train()
        objectives: dict[str, list[Tensor]] = {}
        for number, batch in enumerate(batches, 1):
            for name, losses in self.task.rounds(networks, to_device(batch, self.place.device), self.step):
                self.sums.add(losses.metrics)
                objectives.setdefault(name, []).append(losses.objective.detach())
                self.engines[name].backward(losses.objective / weight[0])
                if number < len(batches):
                    self.engines[name].end_micro_batch()
        norms = {name: self.engines[name].clip_gradients(self.config.max_grad_norm) for name in objectives}
        self.step += 1
        following = self._next_batches()
        totals, found, total_weight, stopping = self._read(objectives, norms, weight)
        owners = {name: "" if name == MODEL else f" of the {name}" for name in objectives}
        for name, values in objectives.items():
            check, of = Check(self, batches, values), owners[name]
            check(total_weight > 0, "weight of the loss is 0: no token of the step counts")
            check(np.isfinite(totals[name]), f"loss{of} is {totals[name]}")
            check(np.isfinite(found[name]), f"gradient norm{of} is {found[name]}")
        for name, values in objectives.items():
            self.engines[name].end_micro_batch()
            if norms[name] is None:
                found[name] = self.engines[name].step_norm()
                check, of = Check(self, batches, values), owners[name]
                fine = np.isfinite(found[name]) or self.engines[name].skipped
                check(fine, f"gradient norm{of} is {found[name]}")
        if self.ema:
            self.ema.update(self.engine.module, self.step)
        return found, bool(stopping), following

    def _global_weight(self, batches: list[Batch], stop: StopSignal) -> Tensor:
        """`[weight of the step, whether any rank was told to stop]`, float64 on the device."""
        local = [float(sum(self.task.batch_weight(batch) for batch in batches)), float(stop.name is not None)]
        sums = torch.tensor(local, dtype=torch.float64).to(self.place.device, non_blocking=True)
        if self.place.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def _read(
        self, objectives: dict[str, list[Tensor]], norms: dict[str, Tensor | None], weight: Tensor
    ) -> tuple[dict[str, float], dict[str, float], float, float]:
        """Loss and gradient norm (0 where not known yet) of each network, weight, stop sign: one wait."""
        sums = torch.stack([torch.stack(values).sum().double() for values in objectives.values()])
        if self.place.world_size > 1:
            dist.all_reduce(sums)
        zero = torch.zeros_like(weight[0])
        known = torch.stack([zero if norm is None else norm.double() for norm in norms.values()])
        table = torch.cat([sums / weight[0], known, weight]).tolist()
        size = len(objectives)
        return dict(zip(objectives, table)), dict(zip(objectives, table[size:])), table[-2], table[-1]

    # metrics

    def _log(
        self,
        log: MetricsLog,
        norms: dict[str, float],
        rates: dict[str, float],
        tokens: int,
        flops: float,
        seconds: float,
    ) -> None:
        """One line; tokens, operations and seconds are those of this rank since the last one."""
        self.seconds += seconds
        work = torch.tensor([tokens, flops, seconds], dtype=torch.float64).to(self.place.device)
        self.sums.add({"tokens": Sums(work[0], work[2]), "flops": Sums(work[1], work[2])})
        means = self.sums.means()
        token_rate, flops_rate = means.pop("tokens"), means.pop("flops")  # in a second of a rank
        record: Record = {"step": self.step, "wall_time_s": round(self.seconds, 3), **means}
        record["tokens_per_second"] = token_rate * self.place.world_size if token_rate else None
        peak = self.config.peak_flops
        record["mfu"] = flops_rate / peak if flops_rate and peak else None
        record |= self.task.counters(self.rank_state["loader"])
        for name, engine in self.engines.items():
            suffix = "" if name == MODEL else f"_{name}"
            norm = None if engine.skipped else norms.get(name)
            record |= {f"grad_norm{suffix}": norm, f"lr{suffix}": rates[name]}
            if engine.loss_scale is not None:
                record |= {f"loss_scale{suffix}": engine.loss_scale, f"skipped_steps{suffix}": engine.skipped_steps}
        warnings = self.alarms.watch(record)
        log.write({**record, "alarm": ", ".join(warnings)} if warnings else record)
        for warning in warnings.values():
            log.say(warning)

    def _evaluate(self, log: MetricsLog, last: bool = False) -> None:
        with self._evaluated_weights() as model:
            self.last_eval = self.task.evaluate(model)
            pictures = self.task.draw(model, self.step, last) if self.place.rank == 0 else {}
        for name, picture in pictures.items():
            log.write_picture(name, picture, self.step)
        if self.last_eval:
            log.write({"step": self.step, **{f"eval_{name}": value for name, value in self.last_eval.items()}})

    def _export(self) -> None:
        with self._evaluated_weights() as model, self.engine.whole_weights():
            if self.place.rank == 0:
                self.task.export(model, self.config.run_dir / EXPORT)
        if self.place.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def _evaluated_weights(self) -> Iterator[nn.Module]:
        """The plain model in evaluation mode, with averaged weights where they are kept."""
        model = self.engine.module
        averaged = self.ema.applied(model) if self.ema else contextlib.nullcontext()
        before = random_state()
        model.eval()
        with torch.no_grad(), autocast(self.config.precision, self.place.device.type), averaged:
            yield model
        model.train()
        set_random_state(before)  # so that training does not depend on when it is evaluated
