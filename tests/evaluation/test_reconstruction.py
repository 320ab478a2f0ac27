"""Reconstruction scores against closed forms and torchmetrics."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from mixmodal.data.pictures import to_images
from mixmodal.evaluation.reconstruction import (
    MAX_PSNR,
    ImageTokenizerEvaluationConfig,
    codebook_usage,
    evaluate_image_tokenizer,
    expected_usage,
    perplexity,
    psnr,
    score_reconstructions,
    ssim,
)
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer import QuantizerConfig

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


def build_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(
        channels=16, channel_multipliers=(1, 1), patch_size=2, resample="pixel_shuffle", mid_blocks=(), norm_groups=4
    )
    quantizer = QuantizerConfig(kind="fsq", levels=(8, 5, 5))
    return ImageTokenizer(ImageTokenizerConfig(image_size=16, autoencoder=autoencoder, quantizer=quantizer)).eval()


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    images = torch.zeros(2, 3, 16, 16)
    errors = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 on pixels in [0, 1]
    torch.testing.assert_close(psnr(images + errors, images), torch.tensor([20.0, 40.0]))
    assert psnr(images, images).tolist() == [MAX_PSNR, MAX_PSNR]


def test_psnr_and_ssim_of_each_picture_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 24, 24, generator=generator) * 2 - 1
    noisy = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    for index in range(4):
        pair = [(half[index : index + 1] + 1) / 2 for half in (noisy, images)]
        expected_psnr = PeakSignalNoiseRatio(data_range=1.0)(*pair)
        expected_ssim = StructuralSimilarityIndexMeasure(data_range=1.0)(*pair)
        # measured worst difference: 2e-6 dB, 6e-8
        torch.testing.assert_close(psnr(noisy, images)[index], expected_psnr, rtol=0, atol=1e-4)
        torch.testing.assert_close(ssim(noisy, images)[index], expected_ssim, rtol=0, atol=1e-6)


def test_usage_and_perplexity_have_their_closed_forms() -> None:
    assert codebook_usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert perplexity(torch.full((7,), 5)) == pytest.approx(7)
    assert perplexity(torch.tensor([9, 0, 0])) == 1
    # shares 1/2, 1/4, 1/4: entropy 3/2 ln 2
    assert perplexity(torch.tensor([2, 1, 0, 1])) == pytest.approx(math.exp(1.5 * math.log(2)))


def test_expected_usage_is_that_of_random_codes() -> None:
    assert expected_usage(1, 4) == pytest.approx(0.25)
    assert expected_usage(2, 4) == pytest.approx(1 - 9 / 16)
    drawn = torch.randint(512, (700,), generator=torch.Generator().manual_seed(0)).unique().numel() / 512
    assert expected_usage(700, 512) == pytest.approx(drawn, abs=0.03)


def test_scores_do_not_depend_on_the_batches(draw_shapes: Draw) -> None:
    tokenizer, images = build_tokenizer(), to_images(draw_shapes(10, size=16))
    whole = score_reconstructions(tokenizer, [images])
    parts = score_reconstructions(tokenizer, images.split(3))
    assert (parts.num_pictures, parts.num_codes) == (10, 160)
    assert parts.codebook_usage == whole.codebook_usage
    assert parts.perplexity == whole.perplexity
    assert parts.psnr == pytest.approx(whole.psnr, abs=1e-5)  # measured difference: 5e-8
    assert parts.ssim == pytest.approx(whole.ssim, abs=1e-5)
    reconstructions = tokenizer.decode(tokenizer.encode(images))
    assert whole.psnr == pytest.approx(float(psnr(reconstructions, images).mean()), abs=1e-4)


def test_scores_of_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        score_reconstructions(build_tokenizer(), [])


def test_the_command_scores_a_folder_of_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_shape_shards: WriteShards
) -> None:
    build_tokenizer().save(tmp_path / "tokenizer")
    write_shape_shards(tmp_path / "shards", 6, size=16)
    config = ImageTokenizerEvaluationConfig(
        image_tokenizer=tmp_path / "tokenizer",
        data=(tmp_path / "shards",),
        max_pictures=5,
        out=tmp_path / "out" / "s.json",
    )
    scores = evaluate_image_tokenizer(config)
    record = json.loads((tmp_path / "out" / "s.json").read_text())
    assert scores.num_pictures == record["num_pictures"] == 5
    assert record["psnr"] == scores.psnr
    assert record["image_tokenizer_sha256"] == ImageTokenizer.sha256(tmp_path / "tokenizer")
    assert "psnr" in capsys.readouterr().out
