"""A toy task for the trainer's tests: rows of numbers, a small network, a loader with a state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixmodal.objectives.loss import Sums
from mixmodal.training.metrics import Peak
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import MODEL, Opponent, Task

DIM = 8
CRITIC = OptimizerConfig(lr=3e-3, betas=(0.5, 0.9), warmup_steps=1, schedule="constant", weight_decay=0.0)


class Rows(NamedTuple):
    inputs: Tensor  # (B, D)
    targets: Tensor  # (B,)
    weights: Tensor  # (B,)
    keys: list[str]


class ToyLoss(NamedTuple):
    objective: Tensor
    metrics: dict[str, Sums | Peak]


class ToyLoader:
    """Row g is a pure function of g; step s takes rows s * R .. (s + 1) * R - 1, whatever the split."""

    def __init__(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> None:
        self.split = (micro_batch_size, grad_accum_steps, rank, world_size)
        self.count = 0

    def __iter__(self) -> ToyLoader:
        return self

    def __next__(self) -> Rows:
        size, accum, rank, world = self.split
        step, micro = divmod(self.count, accum)
        first = step * size * accum * world + (rank * accum + micro) * size
        self.count += 1
        inputs, targets, weights = zip(*(self.row(g) for g in range(first, first + size)), strict=True)
        keys = [f"row{g}" for g in range(first, first + size)]
        return Rows(torch.stack(inputs), torch.stack(targets), torch.stack(weights), keys)

    @staticmethod
    def row(number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(DIM, generator=generator)
        # weights differ, so that a mean of means would show
        return inputs, inputs.sin().sum(), torch.rand((), generator=generator) + 0.1 * (number % 4)

    def state_dict(self) -> dict[str, Any]:
        step, micro = divmod(self.count, self.split[1])
        return {"step": step, "micro_batch": micro}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["step"] * self.split[1] + state["micro_batch"]


class ToyTask(Task):
    """Weighted regression. `noise` draws from all three global generators, as dropout and augmentation do."""

    def __init__(self, noise: float = 0.0, bad_step: int = -1, bad: str = "loss") -> None:
        self.noise, self.bad_step, self.bad = noise, bad_step, bad
        self.models: list[nn.Module] = []

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(DIM, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))
        self.models.append(model)
        return model

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> ToyLoader:
        return ToyLoader(micro_batch_size, grad_accum_steps, rank, world_size)

    def batch_weight(self, batch: Rows) -> Tensor:
        return batch.weights.sum()

    def batch_keys(self, batch: Rows) -> list[str]:
        return batch.keys

    def batch_tokens(self, batch: Rows) -> int:
        return len(batch.keys)

    def batch_flops(self, batch: Rows) -> float:
        return float(sum(int(key.removeprefix("row")) for key in batch.keys))  # no two batches need the same

    def losses(self, model: nn.Module, batch: Rows, step: int) -> ToyLoss:
        noise = self.noise * (torch.randn(()) + float(np.random.randn()) + random.random())
        inputs = (batch.inputs + noise).to(next(model.parameters()).dtype)
        errors = (model(inputs).float().squeeze(-1) - batch.targets).square()
        total = (batch.weights * errors).sum()
        if step == self.bad_step and self.bad == "loss" and "row9" in batch.keys:
            total = total * float("nan")
        if step == self.bad_step and self.bad == "gradient":
            total = total + Infinite.apply(total)
        metrics = {"loss": Sums(total.detach(), batch.weights.sum()), "error_max": Peak(errors.detach().max())}
        return ToyLoss(total, metrics)

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        torch.randn(3)  # must not disturb training
        return {"norm": float(sum(p.square().sum() for p in model.parameters()))}

    def export(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: value.float() for name, value in model.state_dict().items()}, folder / "weights.pt")


class Infinite(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return torch.zeros_like(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("inf")


class Contest(ToyTask):
    """The model lowers what the critic thinks of its answers besides its errors; the critic raises it."""

    def __init__(self, start: int = 0, bad_step: int = -1, **optimizer: Any) -> None:
        super().__init__()
        self.start, self.bad_critic_step = start, bad_step
        self.optimizer = replace(CRITIC, **optimizer)
        self.critics: list[nn.Module] = []

    def build_opponents(self) -> dict[str, Opponent]:
        self.critics.append(nn.Sequential(nn.Linear(DIM + 1, 8), nn.GELU(), nn.Linear(8, 1)))
        return {"critic": Opponent(self.critics[-1], self.optimizer, self.start)}

    def rounds(self, networks: Mapping[str, nn.Module], batch: Rows, step: int) -> Iterator[tuple[str, ToyLoss]]:
        critic = networks["critic"]
        dtype = next(critic.parameters()).dtype
        answers = networks[MODEL](batch.inputs.to(dtype))
        total = (batch.weights * (answers.float().squeeze(-1) - batch.targets).square()).sum()
        weight = batch.weights.sum()
        active = step >= self.start
        if active:
            frozen = {name: p.detach() for name, p in self.critics[-1].named_parameters()}
            seen = torch.cat([batch.inputs.to(dtype), answers], dim=-1)
            opinion = torch.func.functional_call(self.critics[-1], frozen, (seen,))
            total = total + (batch.weights * opinion.float().squeeze(-1)).sum()
        yield MODEL, ToyLoss(total, {"loss": Sums(total.detach(), weight), "critic_loss": Sums(weight * 0, weight * 0)})
        if active:
            opinion = critic(torch.cat([batch.inputs.to(dtype), answers.detach()], dim=-1))
            value = (batch.weights * (opinion.float().squeeze(-1) - 1).square()).sum()
            if step == self.bad_critic_step:
                value = value * float("nan")
            yield "critic", ToyLoss(value, {"critic_loss": Sums(value.detach(), weight)})

    def export(self, model: nn.Module, folder: Path) -> None:
        super().export(model, folder)
        critic = {name: value.float() for name, value in self.critics[-1].state_dict().items()}
        torch.save(critic, folder / "critic.pt")
