"""A small denoiser on shards of captioned shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmodal.data.denoising import DenoisingDataConfig
from mixmodal.models.denoiser import DenoiserConfig, TextEncoderConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.diffusion import DiffusionTrainingConfig
from mixmodal.training.optimizer import OptimizerConfig

TEXT = TextEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=64, max_text_tokens=24)
SMALL: dict[str, Any] = {
    "image_size": 16,
    "block_channels": (16, 32),
    "attention_levels": (1,),
    "head_dim": 16,
    "norm_groups": 4,
}


def build_config(folder: Path, told: str, model: Any = None, **options: Any) -> DiffusionTrainingConfig:
    """16 pixels, 8 pictures a step and 4 steps unless told otherwise; `told` is `class` or `text`."""
    defaults = {"run_dir": folder / "run", "max_steps": 4, "micro_batch_size": 8, "log_every": 1, "tensorboard": False}
    given = {"classes": folder / "classes.txt"} if told == "class" else {"text_tokenizer": folder / "text.model"}
    shape = {**SMALL, **({"text": TEXT} if told == "text" else {}), **(model or {})}
    return DiffusionTrainingConfig(
        data=DenoisingDataConfig(train=(folder / "train",), held_out=(folder / "held_out",), **given),
        model=DenoiserConfig(**shape),
        trainer=TrainerConfig(**{**defaults, **options}),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.0, warmup_steps=2, eps=1e-8),
    )
