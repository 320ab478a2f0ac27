"""Perceptual and adversarial training of an image tokenizer: who learns from what, and that it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_image_tokenizer import FSQ, VQ_EMA, build_batch, build_config
from torch import nn

from mixmodal.data.pictures import to_images
from mixmodal.models.discriminator import DiscriminatorConfig
from mixmodal.objectives.adversarial import AdversarialConfig, adaptive_weight, discriminator_loss, generator_loss
from mixmodal.objectives.perceptual import PerceptualConfig, PerceptualLoss
from mixmodal.training.image_tokenizer import (
    DISCRIMINATOR,
    DivergedError,
    ImageTokenizerTask,
    ImageTokenizerTrainingConfig,
    ReconstructionLossConfig,
    train_image_tokenizer,
)
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import MODEL

SMALL = DiscriminatorConfig(channels=8, num_layers=2, norm_groups=4)
ADVERSARIAL = AdversarialConfig(weight=0.4, discriminator=SMALL)
DISCRIMINATOR_OPTIMIZER = OptimizerConfig(lr=1e-3, betas=(0.5, 0.9), weight_decay=0.0, warmup_steps=1)
Draw = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def folder(write_splits: Callable[[int, int], Path]) -> Path:
    return write_splits(40, 10)


def contest(folder: Path, adversarial: AdversarialConfig = ADVERSARIAL, **options: Any) -> ImageTokenizerTrainingConfig:
    config = build_config(folder, options.pop("quantizer", FSQ), **options)
    return replace(config, adversarial=adversarial, discriminator_optimizer=DISCRIMINATOR_OPTIMIZER)


def networks(task: ImageTokenizerTask) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = task.build_model().train()
    return {MODEL: model, DISCRIMINATOR: task.build_opponents()[DISCRIMINATOR].model.train()}


def has_gradient(network: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


@pytest.mark.parametrize("adaptive", [True, False])
def test_each_network_learns_from_its_own_round(folder: Path, draw_shapes: Draw, adaptive: bool) -> None:
    task = ImageTokenizerTask(contest(folder, replace(ADVERSARIAL, adaptive=adaptive)))
    both, batch = networks(task), build_batch(draw_shapes(6, 16))
    rounds = task.rounds(both, batch, step=0)
    name, losses = next(rounds)
    losses.objective.backward()
    assert name == MODEL
    assert has_gradient(both[MODEL])
    assert not has_gradient(both[DISCRIMINATOR])
    both[MODEL].zero_grad()
    name, losses = next(rounds)
    losses.objective.backward()
    assert name == DISCRIMINATOR
    assert has_gradient(both[DISCRIMINATOR])
    assert not has_gradient(both[MODEL])


def write_out(
    both: dict[str, nn.Module], reconstructions: torch.Tensor, images: torch.Tensor, adaptive: bool
) -> tuple[torch.Tensor, float]:
    """The tokenizer's loss on six pictures without the quantizer's, and what scales the discriminator's opinion."""
    errors = (reconstructions - images).flatten(1)
    pictures = 0.1 * errors.abs().mean(1).sum() + errors.square().mean(1).sum()
    pictures = pictures + 0.7 * PerceptualLoss(PerceptualConfig())(reconstructions, images).sum()
    fooled = generator_loss(both[DISCRIMINATOR](reconstructions))
    last = both[MODEL].decoder.conv_out.weight
    scale = float(adaptive_weight(pictures / 6, fooled / 6, last)) if adaptive else 1.0
    return pictures + 0.4 * scale * fooled, scale


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_losses_are_the_weighted_sums_of_their_parts(folder: Path, draw_shapes: Draw, adaptive: bool) -> None:
    config = contest(folder, replace(ADVERSARIAL, adaptive=adaptive))
    config = replace(config, augment=type(config.augment)(), losses=ReconstructionLossConfig(perceptual_weight=0.7))
    task = ImageTokenizerTask(config)
    both, batch = networks(task), build_batch(draw_shapes(6, 16))
    (_, mine), (_, theirs) = task.rounds(both, batch, step=0)
    images = to_images(batch.pixels)
    reconstructions, _ = both[MODEL](images)
    expected, scale = write_out(both, reconstructions, images, adaptive)
    assert float(mine.objective.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(mine.metrics["adaptive_weight"].total) == pytest.approx(6 * scale, rel=1e-4)
    assert float(mine.metrics["perceptual"].total) > 0
    real, fake = both[DISCRIMINATOR](images), both[DISCRIMINATOR](reconstructions.detach())
    expected = discriminator_loss(real, fake)
    assert float(theirs.objective.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert theirs.metrics["logits_real"].total / 6 == pytest.approx(float(real.mean().detach()), abs=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_gradient_is_that_of_the_written_out_loss(folder: Path, draw_shapes: Draw, adaptive: bool) -> None:
    config = contest(folder, replace(ADVERSARIAL, adaptive=adaptive), quantizer=VQ_EMA)
    config = replace(config, augment=type(config.augment)(), losses=ReconstructionLossConfig(perceptual_weight=0.7))
    task = ImageTokenizerTask(config)
    both, batch = networks(task), build_batch(draw_shapes(6, 16))
    both[MODEL].eval()  # so that the codebook stays as it is
    _, mine = next(task.rounds(both, batch, step=0))
    mine.objective.backward()
    found = {name: p.grad.clone() for name, p in both[MODEL].named_parameters() if p.grad is not None}
    both[MODEL].zero_grad()
    images = to_images(batch.pixels)
    reconstructions, quantized = both[MODEL](images)
    expected, _ = write_out(both, reconstructions, images, adaptive)
    (expected + 6 * quantized.loss).backward()
    for name, p in both[MODEL].named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-4 * float(p.grad.abs().max() + 1e-3))


@pytest.mark.parametrize(
    "options",
    [
        {"grad_accum_steps": 2, "micro_batch_size": 4, "ema_decay": 0.9, "quantizer": VQ_EMA},
        {"precision": "bfloat16"},
        {"precision": "autocast_bfloat16", "grad_accum_steps": 2, "quantizer": VQ_EMA},
    ],
    ids=["float32", "bfloat16", "autocast"],
)
def test_a_resumed_contest_ends_like_one_without_a_break(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    start_late = replace(ADVERSARIAL, start_step=2)  # before the break: both optimizers have moments to keep
    for name in ("train", "held_out"):
        (tmp_path / name).symlink_to(folder / name)
    config = contest(tmp_path, start_late, max_steps=6, save_every=4, log_every=1, **options)
    train_image_tokenizer(config)
    run = tmp_path / "run"
    whole = (run / "export" / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    (run / "export" / "model.safetensors").unlink()
    train_image_tokenizer(config)
    assert (run / "export" / "model.safetensors").read_bytes() == whole
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "discriminator", "logits_real", "logits_fake", "grad_norm_discriminator", "eval_psnr")
    assert [[line.get(name) for name in names] for line in again] == [
        [line.get(name) for name in names] for line in lines
    ]
    steps = [line for line in lines if "loss" in line]
    assert [line["discriminator"] is not None for line in steps] == [False, False, True, True, True, True]
    assert steps[-1]["adaptive_weight"] > 0


def test_training_that_diverges_stops_and_says_what_to_lower(folder: Path) -> None:
    task = ImageTokenizerTask(replace(contest(folder), max_psnr_drop=3.0))
    model = task.build_model().eval()
    before = task.evaluate(model)["psnr"]
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(-50.0)  # all black
    with pytest.raises(
        DivergedError, match=rf"fell from {before:.1f} to .* max_psnr_drop 3; lower optimizer.lr or adv"
    ):
        task.evaluate(model)
    ImageTokenizerTask(replace(contest(folder), max_psnr_drop=0.0)).evaluate(model)


def test_options_that_can_not_act_are_refused(folder: Path) -> None:
    config = build_config(folder)
    with pytest.raises(ValueError, match="discriminator_optimizer has no effect without adversarial"):
        replace(config, discriminator_optimizer=DISCRIMINATOR_OPTIMIZER)
    with pytest.raises(ValueError, match=r"start_step is 4, but training ends at trainer.max_steps 4"):
        contest(folder, replace(ADVERSARIAL, start_step=4))
    with pytest.raises(ValueError, match="lower num_layers"):
        replace(config, adversarial=AdversarialConfig())
    with pytest.raises(ValueError, match=r"losses.perceptual has no effect with perceptual_weight 0"):
        ReconstructionLossConfig(perceptual=PerceptualConfig(image_size=64))
    with pytest.raises(ValueError, match=r"losses.perceptual_weight is -1"):
        ReconstructionLossConfig(perceptual_weight=-1.0)
    with pytest.raises(ValueError, match="max_psnr_drop is -1"):
        replace(config, max_psnr_drop=-1.0)
