"""One quantizer of every kind, for the tests of what they share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixmodal.tokenization.quantizer import build_quantizer
from mixmodal.tokenization.quantizer_base import Quantizer, QuantizerConfig

VQ: dict[str, Any] = {"codebook_size": 64, "codebook_dim": 4}
CONFIGS = {
    "fsq": QuantizerConfig(kind="fsq", levels=(8, 6, 5, 4)),
    "lfq": QuantizerConfig(kind="lfq", codebook_dim=4, entropy_temperature=1.0),
    "vq_ema": QuantizerConfig(kind="vq", **VQ),
    "vq_kmeans": QuantizerConfig(kind="vq", kmeans_init=True, **VQ),
    "vq_gradient": QuantizerConfig(kind="vq", update="gradient", **VQ),
    "vq_cosine_ema": QuantizerConfig(kind="vq_cosine", **VQ),
    "vq_cosine_gradient": QuantizerConfig(kind="vq_cosine", update="gradient", **VQ),
    "simvq": QuantizerConfig(kind="simvq", **VQ),
    "simvq_rotation": QuantizerConfig(kind="simvq", gradient="rotation", **VQ),
    "residual_vq_ema": QuantizerConfig(kind="residual_vq", num_levels=3, **VQ),
    "residual_vq_gradient": QuantizerConfig(kind="residual_vq", num_levels=3, update="gradient", **VQ),
}


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> QuantizerConfig:
    return CONFIGS[request.param]


@pytest.fixture
def quantizer(config: QuantizerConfig, draw_latents: Callable[..., torch.Tensor]) -> Quantizer:
    """With a codebook: k-means has had its first batch."""
    torch.manual_seed(0)
    built = build_quantizer(config)
    if config.kmeans_init:
        built.train()(draw_latents(seed=9))
    return built


@pytest.fixture
def draw_latents() -> Callable[..., torch.Tensor]:
    def draw(seed: int = 0, batch: int = 8) -> torch.Tensor:
        return 2 * torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed))

    return draw
