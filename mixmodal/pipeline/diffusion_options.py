"""How diffusion models classify, as the classify command is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mixmodal.classification.denoising import Loss, build_weighting
from mixmodal.classification.diffusion import DiffusionConfig, PromptCache
from mixmodal.classification.policies import Adaptive, Full, Policy, Staged, TTest
from mixmodal.config import check_least

POLICIES: dict[str, type[Policy]] = {"full": Full, "staged": Staged, "ttest": TTest, "adaptive": Adaptive}
SETTINGS = ("num_times", "samples", "keep", "p_value", "min_times", "max_times", "cap")


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """How a diffusion model scores, and which classes go on. What is null is as the policy has it.

    Args:
        policy: `adaptive` drops classes by paired tests and a cap, `staged` by the published schedule, `ttest` by plain
            tests (Clark and Jaini), `full` none.
        num_times: of `full`: times at which every class is measured.
        samples: of `staged`: times measured by the end of each stage.
        keep: of `staged`: classes that are left behind each stage.
        p_value: of `adaptive` and `ttest`: below which a class goes.
        min_times: of `adaptive` and `ttest`: times before the first test.
        max_times: of `adaptive` and `ttest`: times after which the race ends.
        cap: of `adaptive`: after j times at most cap * classes / j go on.
        weighting: what an error weighs over time: `uniform` on the noise, `elbo` (the likelihood), `exp` on the
            picture (exp(-7 t), Clark and Jaini), `learned` on the noise, from `fit`.
        fit: labelled pictures as the command's `data`, none of them in the data: for `learned`, and in place of pilot
            pictures for `importance`.
        fit_pictures: of each class of `fit`, chosen by the seed; null is 16.
        times: `uniform` over the schedule, or by `importance`: more where classes differ, with weights that leave the
            mean cost as it is.
        pilot_pictures: of `importance` without `fit`: the first pictures of the data, whose labels play no part, show
            where classes differ; null is 20.
        loss: of an error.
        image_size: side of the pictures in pixels; null is what the model was made for.
        cache: folder for encoded prompts, which later calls with the same model and classes read; null keeps none.
        compile: compile the network, on CUDA.
    """

    policy: Literal["adaptive", "staged", "ttest", "full"] = "adaptive"
    num_times: int | None = None
    samples: tuple[int, ...] | None = None
    keep: tuple[int, ...] | None = None
    p_value: float | None = None
    min_times: int | None = None
    max_times: int | None = None
    cap: float | None = None
    weighting: Literal["uniform", "elbo", "exp", "learned"] = "uniform"
    fit: Path | None = None
    fit_pictures: int | None = None
    times: Literal["uniform", "importance"] = "uniform"
    pilot_pictures: int | None = None
    loss: Loss = "l2"
    image_size: int | None = None
    cache: Path | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        policy = self.build_policy()
        if self.times == "importance" and isinstance(policy, Staged):
            raise ValueError("diffusion.times importance can not act on the policy staged, whose times are fixed")
        if self.weighting == "learned" and self.fit is None:
            raise ValueError("diffusion.weighting learned needs labelled pictures; give them as diffusion.fit")
        for name, acts, without in (
            ("fit", self.is_measured, "weighting learned or times importance"),
            ("fit_pictures", self.fit is not None, "fit"),
            ("pilot_pictures", self.times == "importance" and self.fit is None, "times importance, or with fit"),
        ):
            if getattr(self, name) is not None and not acts:
                raise ValueError(f"diffusion.{name} can not act without {without}; leave it out")
        check_least(self, 1, "fit_pictures", "pilot_pictures", section="diffusion.")

    @property
    def is_measured(self) -> bool:
        """Whether something is fitted on pictures before the run."""
        return self.weighting == "learned" or self.times == "importance"

    @property
    def num_fitted(self) -> int:
        """Pictures of each class of `fit`."""
        return 16 if self.fit_pictures is None else self.fit_pictures

    @property
    def num_pilot(self) -> int:
        """Pictures of the data to find where classes differ."""
        return 20 if self.pilot_pictures is None else self.pilot_pictures

    def build_policy(self) -> Policy:
        """The policy with the settings that are given.

        Raises:
            ValueError: for a setting of another policy, or one out of range.
        """
        kind = POLICIES[self.policy]
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        own = [one.name for one in fields(kind)]  # type: ignore[arg-type]
        for name in given:
            if name not in own:
                raise ValueError(f"diffusion.{name} can not act on the policy {self.policy}; leave it out")
        return kind(**given)

    def build_scorer_config(self, seed: int, batch_size: int) -> DiffusionConfig:
        """How costs are measured; before learned weights take the place of uniform ones."""
        return DiffusionConfig(
            weighting=build_weighting("uniform" if self.weighting == "learned" else self.weighting),
            loss=self.loss,
            seed=seed,
            batch_size=batch_size,
            compile=self.compile,
        )

    def build_cache(self, model: str, revision: str) -> PromptCache | None:
        """Where encoded prompts are kept."""
        return None if self.cache is None else PromptCache(folder=self.cache, model=model, revision=revision)

    def describe(self) -> dict[str, Any]:
        """What scores depend on, as plain data."""
        idle = {"cache", "compile", "fit", *(["times"] if self.times == "uniform" else [])}
        return {name: value for name, value in vars(self).items() if name not in idle and value is not None}
