"""AdamW with decay where it belongs, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine", "polynomial", "exponential"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are Chameleon's (arXiv 2405.09818, section 2.3) but for the short
    warm-up and the cosine.

    Args:
        lr: peak learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norms, biases, embeddings and matrices of which only some rows are
            trained are not decayed.
        warmup_steps: optimizer steps of linear warm-up from 0; its last step has the peak rate.
        schedule: how the rate falls from the end of the warm-up to `min_lr_ratio * lr` at `trainer.max_steps`;
            `constant` does not fall.
        min_lr_ratio: the last rate over the peak.
        polynomial_power: of `polynomial`: the part above the last rate is `(1 - progress)^power` of what it was (the
            schedule of arXiv 2301.03728, which CM3Leon follows; 1 is `linear`).
        exponential_rate: of `exponential`: the rate falls as `exp(-exponential_rate * progress)`, lowered and
            stretched so that it ends at `min_lr_ratio * lr` exactly, which may be 0 (Chameleon). At 0 it is the plain
            exponential from the peak to the last rate, which needs a `min_lr_ratio` above 0.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 100
    schedule: Schedule = "cosine"
    min_lr_ratio: float = 0.1
    polynomial_power: float = 1.0
    exponential_rate: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.lr <= 0:
            problems.append(f"optimizer.lr is {self.lr}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"optimizer.betas is {self.betas}; both must lie in [0, 1)")
        for name in ("eps", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"optimizer.min_lr_ratio is {self.min_lr_ratio}; it must lie in [0, 1]")
        if self.polynomial_power <= 0:
            problems.append(f"optimizer.polynomial_power is {self.polynomial_power}; it must be above 0")
        if self.exponential_rate < 0:
            problems.append(f"optimizer.exponential_rate is {self.exponential_rate}; it must not be negative")
        if self.schedule == "exponential" and self.min_lr_ratio == 0 and self.exponential_rate == 0:
            problems.append(
                "optimizer.schedule exponential never reaches 0 by itself; set optimizer.min_lr_ratio, say to 0.01, "
                "or optimizer.exponential_rate, say to 4.6"
            )
        idle = {"polynomial_power": self.schedule != "polynomial", "exponential_rate": self.schedule != "exponential"}
        idle["min_lr_ratio"] = self.schedule == "constant"
        for name, is_idle in idle.items():
            if is_idle and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                problems.append(
                    f"optimizer.{name} can not act where optimizer.schedule is {self.schedule}; leave it out"
                )
        if problems:
            raise ValueError("; ".join(problems))


def lr_at(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    floor = config.min_lr_ratio
    left = {  # of the way from the peak to the floor: 1 at first, 0 at the end
        "constant": lambda: 1.0,
        "linear": lambda: 1.0 - progress,
        "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "polynomial": lambda: (1.0 - progress) ** config.polynomial_power,
        "exponential": lambda: _exponential_left(progress, config.exponential_rate or -math.log(floor)),
    }[config.schedule]()
    return config.lr * (floor + (1.0 - floor) * left)


def _exponential_left(progress: float, rate: float) -> float:
    """`exp(-rate * progress)`, lowered and stretched so that it falls from 1 to 0; a straight line for a rate of 0."""
    return 1.0 - progress if rate == 0 else 1.0 - math.expm1(-rate * progress) / math.expm1(-rate)


UNDECAYED = "undecayed"
"""Attribute of a parameter that decay would move where it must not."""


def leave_undecayed(parameter: nn.Parameter) -> None:
    """Puts a parameter into the group without decay."""
    setattr(parameter, UNDECAYED, True)


def is_decayed(name: str, parameter: nn.Parameter, module: nn.Module) -> bool:
    """Whether weight decay acts on a parameter: matrices and kernels, but not embeddings and norms.

    The scale of a per-head norm has two dimensions, so the number of dimensions does not tell a norm.
    """
    is_norm = "norm" in type(module).__name__.lower() or any("norm" in part for part in name.lower().split("."))
    is_kept = isinstance(module, nn.Embedding) or getattr(parameter, UNDECAYED, False)
    return parameter.ndim >= 2 and not is_norm and not is_kept


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, with and without decay; a shared parameter counts where it is first met."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups[is_decayed(f"{path}.{name}", parameter, module)].append(parameter)
    if not seen:
        raise ValueError("the model has no trainable parameters")
    decays = {True: weight_decay, False: 0.0}
    return [{"params": params, "weight_decay": decays[key]} for key, params in groups.items() if params]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW: one kernel for all parameters, on CPU and GPU."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
