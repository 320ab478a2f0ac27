"""Quantizers: the coding has an inverse, does not depend on the batch, and passes gradients straight through."""

import pytest
import torch

from mixmodal.tokenization.quantizer import (
    FiniteScalarQuantizer,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
    nearest_codes,
)

VQ = {"codebook_size": 64, "codebook_dim": 4}
CONFIGS = {
    "fsq": QuantizerConfig(kind="fsq", levels=(8, 6, 5, 4)),
    "vq_ema": QuantizerConfig(kind="vq", **VQ),
    "vq_gradient": QuantizerConfig(kind="vq", update="gradient", **VQ),
    "vq_cosine_ema": QuantizerConfig(kind="vq_cosine", **VQ),
    "vq_cosine_gradient": QuantizerConfig(kind="vq_cosine", update="gradient", **VQ),
}


def draw_latents(seed: int = 0, batch: int = 8) -> torch.Tensor:
    return 2 * torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(CONFIGS[request.param])


def test_codes_to_latents_is_the_inverse_of_the_coding(quantizer: Quantizer) -> None:
    quantizer.eval()
    latents, codes, loss = quantizer(draw_latents())
    assert codes.dtype == torch.int64
    assert codes.shape == (8, 3, 3)
    assert loss.shape == ()
    assert latents.dtype == torch.float32
    assert torch.equal(quantizer.codes_to_latents(codes), latents)  # measured difference: 0
    assert torch.equal(quantizer.latents_to_codes(draw_latents()), codes)


def test_every_code_decodes_to_its_own_latent(quantizer: Quantizer) -> None:
    quantizer.eval()
    codes = torch.arange(quantizer.codebook_size).view(-1, 1, 1)
    latents = quantizer.codes_to_latents(codes)
    assert latents.shape == (quantizer.codebook_size, quantizer.codebook_dim, 1, 1)
    assert len(torch.unique(latents.flatten(1), dim=0)) == quantizer.codebook_size
    if not isinstance(quantizer, FiniteScalarQuantizer):  # tanh bounds the values of fsq: they are not its inputs
        assert torch.equal(quantizer.latents_to_codes(latents), codes)


def test_training_codes_equal_the_codes_of_encoding(quantizer: Quantizer) -> None:
    expected = quantizer.latents_to_codes(draw_latents())
    assert torch.equal(quantizer.train()(draw_latents()).codes, expected)


def test_codes_of_a_latent_do_not_depend_on_its_batch(quantizer: Quantizer) -> None:
    latents = draw_latents(batch=64)
    together = quantizer.latents_to_codes(latents)
    alone = torch.cat([quantizer.latents_to_codes(latent[None]) for latent in latents])
    assert torch.equal(together, alone)


def test_codes_under_bf16_autocast_are_the_codes_of_float32(quantizer: Quantizer) -> None:
    quantizer.eval()
    latents = draw_latents(batch=64)
    expected = quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(latents)
        encoded = quantizer.latents_to_codes(latents)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(encoded, expected.codes)
    assert found.loss.dtype == torch.float32


def test_gradients_pass_straight_through(quantizer: Quantizer) -> None:
    latents = draw_latents().requires_grad_()
    direction = draw_latents(seed=1)
    (quantizer.train()(latents).latents * direction).sum().backward()
    probe = draw_latents().requires_grad_()
    if isinstance(quantizer, FiniteScalarQuantizer):
        levels = quantizer.fsq._levels.view(1, -1, 1, 1)
        half = (levels - 1) * 1.001 / 2
        shift = torch.atanh(torch.where(levels % 2 == 0, 0.5, 0.0) / half)
        through = torch.tanh(probe + shift) * half / (levels // 2)  # arXiv 2309.15505, appendix A.1, without rounding
    else:
        through = torch.nn.functional.normalize(probe, dim=1) if quantizer.cosine else probe
    (through * direction).sum().backward()
    torch.testing.assert_close(latents.grad, probe.grad, rtol=0, atol=2e-5)  # measured worst difference: 5e-7


def test_encoding_in_training_mode_learns_nothing(quantizer: Quantizer) -> None:
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.train().latents_to_codes(draw_latents())
    quantizer.eval()(draw_latents())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", ["vq", "vq_cosine"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_codebook_moves_to_the_latents(kind: str, update: str) -> None:
    torch.manual_seed(0)
    restart = {"restart_below": 0.5, "decay": 0.8} if update == "ema" else {}
    config = QuantizerConfig(kind=kind, codebook_size=8, codebook_dim=4, update=update, **restart)  # type: ignore[arg-type]
    quantizer = build_quantizer(config)
    centres = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05) if update == "gradient" else None
    first = last = 0.0
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        chosen = centres[torch.randint(8, (32, 3, 3), generator=generator)].movedim(-1, 1)
        loss = quantizer.train()(chosen + 0.01 * torch.randn(chosen.shape, generator=generator)).loss
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last = float(loss.detach())
        first = first or last
    assert last < 0.5 * first


def test_dead_codes_restart_and_the_restarts_repeat() -> None:
    def used_after(restart_below: float, noise: int) -> tuple[int, torch.Tensor]:
        torch.manual_seed(1)
        config = QuantizerConfig(
            kind="vq_cosine", codebook_size=64, codebook_dim=4, decay=0.5, restart_below=restart_below
        )
        quantizer = build_quantizer(config).train()
        torch.manual_seed(noise)
        for step in range(20):
            latents = draw_latents(seed=step, batch=32).abs()  # one orthant: codes elsewhere are dead
            codes = quantizer(latents).codes
        return len(codes.unique()), quantizer.state_dict()["vq._codebook.embed"]

    dead, _ = used_after(0.0, noise=0)
    alive, codebook = used_after(0.2, noise=0)
    assert dead < 20 < 55 < alive  # measured: 13 and 64
    assert torch.equal(used_after(0.2, noise=1)[1], codebook)


def test_nearest_codes_are_those_of_all_distances_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = (
        draw_latents(batch=16).movedim(1, -1).reshape(-1, 4),
        draw_latents(seed=3)[:, :, 0, :].reshape(-1, 4),
    )
    expected = torch.cdist(vectors, codebook).argmin(-1)
    monkeypatch.setattr("mixmodal.tokenization.quantizer.MAX_DISTANCES", 100)
    assert torch.equal(nearest_codes(vectors, codebook, cosine=False), expected)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"kind": "lfq"}, "quantizer.kind"),
        ({"kind": "fsq"}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (8, 2)}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (4096, 4097)}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (8, 8), "codebook_size": 64}, "quantizer.codebook_size"),
        ({"kind": "vq", "codebook_dim": 4}, "quantizer.codebook_size"),
        ({"kind": "vq", "codebook_size": 4}, "quantizer.codebook_dim"),
        ({"kind": "vq", "levels": (8, 8), **VQ}, "quantizer.levels"),
        ({"kind": "vq", "decay": 1.0, **VQ}, "quantizer.decay"),
        ({"kind": "vq", "restart_below": -1.0, **VQ}, "quantizer.restart_below"),
        ({"kind": "vq_cosine", "update": "gradient", "restart_below": 1.0, **VQ}, "quantizer.restart_below"),
        ({"kind": "vq_cosine", "update": "both", **VQ}, "quantizer.update"),
    ],
)
def test_config_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        build_quantizer(QuantizerConfig(**fields))
