"""How a contrastive classifier is adapted to each picture, as the classify command is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixmodal.classification.adaptation import AdaptationConfig
from mixmodal.retrieval.encoder import ImagePart


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Diffusion-TTA (arXiv 2311.16102): the classifier is changed until a denoiser told its guess does better.

    Args:
        denoiser: folder or hub id of a diffusion model that reads texts; null adapts nothing. It is told the classes in
            the first template.
        part: what is changed: the image tower, its last norm, or the scale of the logits.
        num_steps: of Adam, for each picture.
        lr: of Adam; a norm or a scale alone takes far larger ones than a tower.
        num_draws: times and noises of a step; the paper takes 180.
    """

    denoiser: str | None = None
    part: ImagePart = "tower"
    num_steps: int = 5
    lr: float = 1e-5
    num_draws: int = 32

    def __post_init__(self) -> None:
        self.build_config(0)
        if self.denoiser is None:
            for name, value in vars(self).items():
                if value != getattr(type(self), name):
                    raise ValueError(f"adapt.{name} can not act without adapt.denoiser; give both or neither")

    def build_config(self, seed: int) -> AdaptationConfig:
        """The settings of the adaptation.

        Raises:
            ValueError: for one out of range.
        """
        options = {name: value for name, value in vars(self).items() if name != "denoiser"}
        return AdaptationConfig(**options, seed=seed)

    def describe(self, denoiser_sha256: str) -> dict[str, Any]:
        """What scores depend on, as plain data."""
        options = {name: value for name, value in vars(self).items() if name != "denoiser"}
        return {"denoiser_sha256": denoiser_sha256, **options}
