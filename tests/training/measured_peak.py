"""Trains a config of a few hundred megabytes for two steps; prints how memory grew, and what the plan says.

    python measured_peak.py FOLDER NAME

Growth is the peak of the resident set over what stood before, in a process that has trained a tiny config first.
NAME is one of `MEASURED` in test_plan.py.
"""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import write_shapes

from mixmodal.data.pictures import PictureDataConfig
from mixmodal.data.pipeline import DataConfig
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.models.transformer import TransformerConfig
from mixmodal.objectives.adversarial import AdversarialConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.image_tokenizer import (
    ImageTokenizerTrainingConfig,
    ReconstructionLossConfig,
    train_image_tokenizer,
)
from mixmodal.training.plan import PlanConfig, build_plan
from mixmodal.training.pretrain import PretrainConfig, pretrain

SIDE = 64
SEQ_LEN = 128


def build_image(folder: Path, channels: int, size: int, adversarial: bool, **trainer: Any) -> Any:
    """An image tokenizer with convolutions at full size, as VQGAN's, and with a perceptual network."""
    autoencoder = AutoencoderConfig(
        channels=channels,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_decoder_res_blocks=1,
        mid_blocks=("res", "attention", "res"),
        latent_channels=32,
    )
    quantizer = QuantizerConfig(kind="vq_cosine", update="gradient", codebook_size=256, codebook_dim=8)
    return ImageTokenizerTrainingConfig(
        data=PictureDataConfig(train=(folder / "pictures",)),
        tokenizer=ImageTokenizerConfig(image_size=SIDE, autoencoder=autoencoder, quantizer=quantizer),
        losses=ReconstructionLossConfig(perceptual_weight=1.0),
        adversarial=AdversarialConfig(adaptive=False) if adversarial else None,
        trainer=build_trainer(folder, size, ema_decay=0.99, **trainer),
    )


def build_text(folder: Path, dim: int, size: int, **trainer: Any) -> Any:
    """A transformer."""
    model = TransformerConfig(dim=dim, num_layers=4, num_heads=4, ffn_dim=3 * dim, max_seq_len=SEQ_LEN)
    data = DataConfig(tokens=folder / "tokens", seq_len=SEQ_LEN)
    objective = CausalMaskedConfig(max_masks=4)
    return PretrainConfig(model=model, data=data, objective=objective, trainer=build_trainer(folder, size, **trainer))


def build_trainer(folder: Path, size: int, **options: Any) -> TrainerConfig:
    return TrainerConfig(run_dir=folder / "run", max_steps=2, micro_batch_size=size, tensorboard=False, **options)


def build_config(name: str, folder: Path, large: bool) -> Any:
    if name.startswith("image"):
        precision = "autocast_bfloat16" if name == "image_autocast" else "float32"
        width, size = (96, 8) if large else (32, 1)
        return build_image(folder, width, size, name != "image_alone", precision=precision)
    precision = next((part for part in name.split("_") if part in ("bfloat16", "float16")), "float32")
    accumulation = 2 if name == "text_accumulated" else 1
    width, size = (768, 4) if large else (64, 1)
    stage = int(name[-1]) if "zero" in name else None
    zero = write_zero_file(folder, stage) if stage else None
    options = {"grad_accum_steps": accumulation, "activation_checkpointing": name == "text_recomputed"}
    return build_text(folder, width, size, precision=precision, deepspeed=zero, **options)


def write_zero_file(folder: Path, stage: int) -> Path:
    """ZeRO with small buckets: memory that is reserved and never touched is not in the resident set."""
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 2_000_000}}))
    return path


def write_pictures(folder: Path) -> None:
    def samples() -> Iterator[Sample]:
        for pair in synthetic_pairs(20, SIDE, 0):
            data = io.BytesIO()
            pair.picture.save(data, "png")
            yield Sample(pair.key, (pair.caption, PictureFile(data.getvalue(), "png", f"{pair.key}.png")))

    write_shards(samples(), folder, 100)


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(folder: Path, name: str) -> None:
    write_shapes(folder / "tokens", 40)
    write_pictures(folder / "pictures")
    config = build_config(name, folder, large=True)
    predicted = build_plan(config, PlanConfig(training=folder, device="cpu"))
    train = train_image_tokenizer if name.startswith("image") else pretrain
    small = build_config(name, folder, large=False)
    train(replace(small, trainer=replace(small.trainer, run_dir=folder / "first")))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    train(config)
    growth = resident("VmHWM") - before
    print(json.dumps({"growth": growth, "predicted": predicted.total_bytes, "rows": predicted.rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
