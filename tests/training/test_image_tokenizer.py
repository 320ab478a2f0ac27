"""Training an image tokenizer: sums that add up, a run that learns, resumes exactly and exports what it trained."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.data.augment import AugmentConfig
from mixmodal.data.pictures import PictureBatch, PictureDataConfig, to_images
from mixmodal.data.skipping import SampleLimits
from mixmodal.evaluation.reconstruction import psnr, score_reconstructions
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.training.image_tokenizer import (
    ImageTokenizerTask,
    ImageTokenizerTrainingConfig,
    ReconstructionLossConfig,
    train_image_tokenizer,
)
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.trainer import TrainerConfig

FSQ = QuantizerConfig(kind="fsq", levels=(8, 5, 5))
VQ_GRADIENT = QuantizerConfig(kind="vq_cosine", update="gradient", codebook_size=64, codebook_dim=4)
VQ_EMA = QuantizerConfig(kind="vq_cosine", codebook_size=64, codebook_dim=4)

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


def build_config(folder: Path, quantizer: QuantizerConfig = FSQ, **options) -> ImageTokenizerTrainingConfig:
    autoencoder = AutoencoderConfig(
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        num_decoder_res_blocks=1,
        patch_size=2,
        resample="pixel_shuffle",
        mid_blocks=(),
        norm_groups=4,
    )
    return ImageTokenizerTrainingConfig(
        data=PictureDataConfig(train=(folder / "train",), held_out=(folder / "held_out",)),
        tokenizer=ImageTokenizerConfig(image_size=16, autoencoder=autoencoder, quantizer=quantizer),
        trainer=TrainerConfig(
            run_dir=folder / "run", tensorboard=False, **{"max_steps": 4, "micro_batch_size": 8, **options}
        ),
        optimizer=OptimizerConfig(lr=4e-3, weight_decay=0.0, warmup_steps=5, eps=1e-8),
        augment=AugmentConfig(flip_share=0.5),
    )


@pytest.fixture(scope="module")
def shards(write_splits: Callable[[int, int], Path]) -> Path:
    return write_splits(200, 40)


def build_batch(pixels: torch.Tensor) -> PictureBatch:
    draws = torch.rand(len(pixels), 7, generator=torch.Generator().manual_seed(0))
    return PictureBatch(pixels, draws, [str(index) for index in range(len(pixels))])


def mean_picture_psnr(images: torch.Tensor) -> float:
    """What the one best constant answer scores."""
    return float(psnr(images.mean(dim=0, keepdim=True).expand_as(images), images).mean())


@pytest.mark.parametrize("quantizer", [FSQ, VQ_GRADIENT], ids=["fsq", "vq"])
def test_a_batch_of_eight_has_the_loss_and_gradient_of_two_of_four(
    tmp_path: Path, quantizer: QuantizerConfig, draw_shapes: Draw
) -> None:
    task = ImageTokenizerTask(build_config(tmp_path, quantizer))
    torch.manual_seed(0)
    model = task.build_model().train()

    def accumulate(batches: list[PictureBatch]) -> tuple[dict[str, float], torch.Tensor, float]:
        model.zero_grad()
        losses = [task.losses(model, batch, step=0) for batch in batches]
        for loss in losses:
            loss.objective.backward()
        sums = {name: sum(float(loss.metrics[name].total) for loss in losses) for name in losses[0].metrics}
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return sums, gradient, sum(task.batch_weight(batch) for batch in batches)

    eight = build_batch(draw_shapes(8, 16))
    halves = [PictureBatch(eight.pixels[part], eight.draws[part], []) for part in (slice(0, 4), slice(4, 8))]
    whole, gradient, weight = accumulate([eight])
    sums, summed, summed_weight = accumulate(halves)
    assert weight == summed_weight == 8
    assert set(whole) == {"loss", "l1", "l2"} | ({"commitment", "codebook"} if quantizer is VQ_GRADIENT else set())
    assert sums == pytest.approx(whole, rel=1e-5)  # measured worst difference: 2e-7
    torch.testing.assert_close(summed, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))  # measured: 2e-6


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path, draw_shapes: Draw) -> None:
    config = replace(
        build_config(tmp_path, VQ_EMA),
        losses=ReconstructionLossConfig(l1_weight=0.3, l2_weight=2.0),
        augment=AugmentConfig(),
    )
    task = ImageTokenizerTask(config)
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), build_batch(draw_shapes(6, 16))
    losses = task.losses(model, batch, step=0)
    images = to_images(batch.pixels)
    reconstructions, quantized = model(images)
    errors = (reconstructions - images).reshape(6, -1)
    parts = {name: float(total) for name, (total, _) in losses.metrics.items()}
    assert parts["l1"] == pytest.approx(float(errors.abs().mean(1).sum().detach()), rel=1e-5)
    assert parts["l2"] == pytest.approx(float(errors.square().mean(1).sum().detach()), rel=1e-5)
    assert parts["commitment"] == pytest.approx(6 * float(quantized.parts["commitment"].detach()), rel=1e-5)
    assert parts["commitment"] > 0
    expected = 0.3 * parts["l1"] + 2.0 * parts["l2"] + 0.25 * parts["commitment"]
    assert float(losses.objective.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(losses.weight) == 6


def test_augmentation_ends_where_it_should(tmp_path: Path, draw_shapes: Draw) -> None:
    config = replace(build_config(tmp_path), augment=AugmentConfig(flip_share=1.0), augment_until=0.5)
    task = ImageTokenizerTask(config)
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), build_batch(draw_shapes(4, 16))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task.losses(model, batch, step=1)
    task.losses(model, batch, step=2)
    assert torch.equal(seen[0], to_images(batch.pixels).flip(-1))
    assert torch.equal(seen[1], to_images(batch.pixels))


def test_a_tokenizer_learns_a_few_pictures_by_heart(tmp_path: Path, draw_shapes: Draw) -> None:
    task = ImageTokenizerTask(replace(build_config(tmp_path), augment=AugmentConfig()))
    torch.manual_seed(0)
    model, batch = task.build_model().train(), build_batch(draw_shapes(8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(60):
        losses = task.losses(model, batch, step)
        optimizer.zero_grad()
        (losses.objective / losses.weight).backward()
        optimizer.step()
    images = to_images(batch.pixels)
    found = float(psnr(model.eval().decode(model.encode(images)), images).mean())
    assert found > mean_picture_psnr(images) + 2  # measured: 18.2 dB against 15.1


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [FSQ, VQ_EMA, VQ_GRADIENT], ids=["fsq", "vq_ema", "vq_gradient"])
def test_training_ends_far_above_the_mean_picture(folder: Path, quantizer: QuantizerConfig, draw_shapes: Draw) -> None:
    config = build_config(folder, quantizer, max_steps=400, micro_batch_size=16)
    result = train_image_tokenizer(config)
    images = to_images(draw_shapes(40, 16, seed=1))
    assert result.metrics["psnr"] > mean_picture_psnr(images) + 6  # measured: 23.6, 22.7 and 22.9 dB against 14.8


def test_a_run_leaves_a_folder_that_loads_and_scores_alike(folder: Path, draw_shapes: Draw) -> None:
    result = train_image_tokenizer(build_config(folder, eval_every=2, log_every=1))
    export = folder / "run" / "export"
    assert sorted(path.name for path in export.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "reconstructions.png",
    ]
    scores = score_reconstructions(ImageTokenizer.load(export), [to_images(draw_shapes(40, 16, seed=1))])
    assert scores.psnr == pytest.approx(result.metrics["psnr"], abs=1e-4)
    assert f"| psnr | {scores.psnr:,.4g} |" in (export / "README.md").read_text()
    with Image.open(export / "reconstructions.png") as sheet:
        sheet = np.array(sheet)
    first = (
        draw_shapes(1, 16, seed=1)[0].numpy().transpose(1, 2, 0)
    )  # the first held-out picture, enlarged, stands on it
    enlarged = first.repeat(6, axis=0).repeat(6, axis=1)
    assert any(
        np.array_equal(sheet[top : top + 96, left : left + 96], enlarged) for top in range(12) for left in range(90)
    )
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "l1", "l2"} <= set(lines[0])
    assert any({"eval_psnr", "eval_ssim", "eval_codebook_usage", "eval_perplexity"} <= set(line) for line in lines)


def test_a_resumed_run_ends_like_one_without_a_break(folder: Path) -> None:
    config = build_config(folder, VQ_EMA, max_steps=6, save_every=3, ema_decay=0.9)
    train_image_tokenizer(config)
    whole = (folder / "run" / "export" / "model.safetensors").read_bytes()
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    (folder / "run" / "export" / "model.safetensors").unlink()
    train_image_tokenizer(config)
    assert (folder / "run" / "export" / "model.safetensors").read_bytes() == whole


def test_training_without_held_out_pictures_evaluates_nothing(folder: Path) -> None:
    config = build_config(folder, max_steps=1)
    result = train_image_tokenizer(replace(config, data=PictureDataConfig(train=(folder / "train",))))
    assert result.metrics == {}
    assert not (folder / "run" / "export" / "reconstructions.png").exists()


@pytest.mark.parametrize(
    ("quantizer", "advice"),
    [
        (FSQ, "quantizer.levels"),
        (VQ_GRADIENT, "update ema"),
        (replace(VQ_EMA, restart_below=0.0), "restart_below above 0"),
        (replace(VQ_EMA, kind="vq"), "vq_cosine"),
        (VQ_EMA, "raise tokenizer.quantizer.restart_below"),
    ],
)
def test_a_collapsed_codebook_raises_an_alarm_with_a_remedy(
    folder: Path, quantizer: QuantizerConfig, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = ImageTokenizerTask(replace(build_config(folder, quantizer), min_codebook_usage=0.5))
    model = task.build_model().eval()
    with torch.no_grad():
        model.encoder.conv_out.weight.zero_()  # every latent alike: one code
        model.encoder.conv_out.bias.fill_(0.5)
    with caplog.at_level(logging.WARNING):
        assert task.evaluate(model)["codebook_usage"] == 1 / model.codebook_size
    assert "the codebook collapses: 40 held-out pictures" in caplog.text
    assert advice in caplog.text


def test_a_healthy_codebook_raises_no_alarm(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = ImageTokenizerTask(replace(build_config(folder), min_codebook_usage=0.0))
    task.evaluate(task.build_model().eval())
    assert "collapses" not in caplog.text


def test_config_errors_name_the_key(tmp_path: Path) -> None:
    config = build_config(tmp_path, VQ_EMA)
    with pytest.raises(ValueError, match=r"trainer\.precision bfloat16 would round the codebook"):
        replace(config, trainer=replace(config.trainer, precision="bfloat16"))
    with pytest.raises(ValueError, match="min_codebook_usage is 2"):
        replace(config, min_codebook_usage=2.0)
    with pytest.raises(ValueError, match="losses: l1_weight"):
        ReconstructionLossConfig(l1_weight=0.0, l2_weight=0.0)
    with pytest.raises(ValueError, match=r"quantizer\.levels"):
        ImageTokenizerTask(build_config(tmp_path, QuantizerConfig(kind="fsq"))).build_model()
    assert SampleLimits() == config.data.limits
