"""Codebooks: nearest codes, the formulas that they learn by, and the gradients that pass them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.tokenization.quantizer import build_quantizer
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.vector_quantizers import (
    MovingAverageQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    nearest_codes,
)

Draw = Callable[..., Tensor]
VQ: dict[str, Any] = {"codebook_size": 64, "codebook_dim": 4}
ONE_CODEBOOK = {
    "vq_ema": {"kind": "vq"},
    "vq_gradient": {"kind": "vq", "update": "gradient"},
    "vq_cosine_ema": {"kind": "vq_cosine"},
    "vq_cosine_gradient": {"kind": "vq_cosine", "update": "gradient"},
    "simvq": {"kind": "simvq"},
}


def build(**fields: object) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(QuantizerConfig(**{**VQ, **fields}))
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer


@pytest.fixture(params=ONE_CODEBOOK, ids=list(ONE_CODEBOOK))
def fields(request: pytest.FixtureRequest) -> dict:
    return ONE_CODEBOOK[request.param]


def distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Euclidean distances `(N, V)` in float64."""
    return (vectors.double()[:, None] - codebook.double()[None]).norm(dim=-1)


def test_the_code_of_a_latent_is_its_nearest_and_its_own_code(fields: dict, draw_latents: Draw) -> None:
    quantizer = build(**fields).eval()
    for seed in range(5):
        latents = draw_latents(seed, batch=32)
        codes = quantizer.latents_to_codes(latents)
        found = quantizer.codes_to_latents(codes)
        vectors = latents.movedim(1, -1).flatten(0, -2)
        vectors = F.normalize(vectors, dim=-1) if quantizer.cosine else vectors
        apart = distances(vectors, quantizer.codebook().detach())
        worst = (apart.gather(1, codes.flatten()[:, None])[:, 0] - apart.amin(1)).max()
        assert worst <= 1e-6  # measured worst excess over the least distance: 0
        assert torch.equal(quantizer.latents_to_codes(found), codes)
    every = torch.arange(64).view(-1, 1, 1)
    assert torch.equal(quantizer.latents_to_codes(quantizer.codes_to_latents(every)), every)


def test_nearest_codes_are_those_of_all_distances_at_once(monkeypatch: pytest.MonkeyPatch, draw_latents: Draw) -> None:
    vectors = draw_latents(batch=16).movedim(1, -1).reshape(-1, 4)
    codebook = draw_latents(seed=3).movedim(1, -1).reshape(-1, 4)
    expected = distances(vectors, codebook).argmin(-1)
    monkeypatch.setattr("mixmodal.tokenization.vector_quantizers.MAX_DISTANCES", 100)
    assert torch.equal(nearest_codes(vectors, codebook, cosine=False), expected)
    far = torch.tensor(
        [1000.0, -1000.0, 500.0, 2000.0]
    )  # squares of 1e6 would leave float32 no digits for the difference
    assert torch.equal(
        nearest_codes(vectors + far, codebook + far, cosine=False), distances(vectors + far, codebook + far).argmin(-1)
    )


@pytest.mark.parametrize("kind", ["vq", "vq_cosine"])
def test_a_moving_average_follows_its_formula(kind: str) -> None:
    quantizer = build(kind=kind, codebook_size=3, codebook_dim=2, decay=0.75, restart_below=0.0).train()
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    quantizer.load_state_dict(
        {**quantizer.state_dict(), "vq._codebook.embed": start[None], "vq._codebook.embed_avg": start[None]}
    )
    latents = torch.tensor([[2.0, 0.1], [1.5, -0.3], [0.2, 3.0]]).T.reshape(1, 2, 1, 3)
    counts, sums = torch.ones(3).double(), start.double()
    for _ in range(2):
        found = quantizer(latents)
        assert found.codes.flatten().tolist() == [0, 0, 1]
        vectors = latents[0, :, 0].T.double()
        vectors = F.normalize(vectors, dim=-1) if kind == "vq_cosine" else vectors
        # arXiv 1711.00937, A.1: N = g N + (1 - g) n, m = g m + (1 - g) sum z, e = m / N
        counts = 0.75 * counts + 0.25 * torch.tensor([2.0, 1.0, 0.0])
        sums = 0.75 * sums + 0.25 * torch.stack([vectors[0] + vectors[1], vectors[2], torch.zeros(2)])
        expected = sums / counts[:, None]
        expected = F.normalize(expected, dim=-1) if kind == "vq_cosine" else expected
        # measured worst difference 8e-6: the library smooths the counts with 1e-5
        torch.testing.assert_close(quantizer.codebook().double(), expected, rtol=0, atol=5e-5)
    assert quantizer(latents).codes.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["vq", "vq_cosine"])
def test_a_dead_code_restarts_at_a_latent_of_the_batch(kind: str) -> None:
    quantizer = build(kind=kind, codebook_size=4, codebook_dim=2, decay=0.5, restart_below=0.4).train()
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # nothing will be near the last two
    quantizer.load_state_dict(
        {**quantizer.state_dict(), "vq._codebook.embed": start[None], "vq._codebook.embed_avg": start[None]}
    )
    angles = torch.linspace(0.0, 1.5, 32)
    latents = torch.stack([angles.cos(), angles.sin()]).reshape(1, 2, 4, 8)
    used = [len(quantizer(latents).codes.unique()) for _ in range(3)]
    assert int(quantizer.state_dict()["num_updates"]) == 3  # each update draws anew
    assert used[:2] == [2, 2]  # 0.5 after one update without use, 0.25 after two: then they restart
    assert used[2] == 4
    quantizer = build(kind=kind, codebook_size=4, codebook_dim=2, decay=0.5, restart_below=0.0).train()
    quantizer.load_state_dict(
        {**quantizer.state_dict(), "vq._codebook.embed": start[None], "vq._codebook.embed_avg": start[None]}
    )
    assert [len(quantizer(latents).codes.unique()) for _ in range(6)] == [2] * 6


def test_restarts_bring_a_collapsed_codebook_back_and_repeat(draw_latents: Draw) -> None:
    def used_after(restart_below: float, noise: int) -> tuple[int, Tensor]:
        quantizer = build(kind="vq_cosine", decay=0.5, restart_below=restart_below).train()
        torch.manual_seed(noise)
        codes = torch.zeros(0)
        for step in range(20):
            codes = quantizer(draw_latents(seed=step, batch=32).abs()).codes  # one orthant: codes elsewhere are dead
        return len(codes.unique()), quantizer.codebook()

    dead, _ = used_after(0.0, noise=0)
    alive, codebook = used_after(0.2, noise=0)
    assert dead < 20 < 55 < alive  # measured: 12 and 64
    assert torch.equal(used_after(0.2, noise=1)[1], codebook)


def test_the_number_of_updates_is_read_from_the_buffer_after_a_load_only(draw_latents: Draw) -> None:
    def update(quantizer: VectorQuantizer, seed: int) -> Tensor:
        quantizer.train()(draw_latents(seed))
        return quantizer.codebook().clone()

    whole, resumed = (build(kind="vq", decay=0.5, restart_below=0.6) for _ in range(2))
    for seed in range(2):
        update(whole, seed)
    resumed.load_state_dict(whole.state_dict())
    expected = [update(whole, seed) for seed in (2, 3)]
    assert torch.equal(update(resumed, 2), expected[0])
    resumed.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device="meta"))  # nothing to read
    assert torch.equal(update(resumed, 3), expected[1])


def test_kmeans_starts_among_the_latents() -> None:
    centres = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) + 10
    latents = centres.repeat(32, 1).reshape(16, 4, 4, 4).movedim(-1, 1)
    quantizer = build(kind="vq", codebook_size=8, kmeans_init=True).train()
    loss = quantizer(latents).loss
    assert loss < 0.25 * build(kind="vq", codebook_size=8).train()(latents).loss
    assert (distances(centres, quantizer.codebook()).amin(1) < 1e-3).sum() >= 4  # k-means finds most of 8 points


@pytest.mark.parametrize("kind", ["vq", "vq_cosine"])
def test_the_gradient_update_follows_its_formula(kind: str, draw_latents: Draw) -> None:
    """Values and gradients of VectorQuantizer in FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py."""
    quantizer = build(kind=kind, update="gradient", commitment_weight=0.25).train()
    latents = draw_latents().requires_grad_()
    found = quantizer(latents)
    direction = draw_latents(seed=1)
    ((found.latents * direction).sum() + found.loss).backward()
    weight = quantizer.state_dict()["embedding.weight"].double().requires_grad_()
    probe = draw_latents().double().requires_grad_()
    z, embedding = probe.movedim(1, -1), weight
    if kind == "vq_cosine":
        z, embedding = F.normalize(z, dim=-1), F.normalize(weight, dim=-1)
    d = z.flatten(0, -2).square().sum(1, keepdim=True) + embedding.square().sum(1) - 2 * z.flatten(0, -2) @ embedding.T
    z_q = embedding[d.argmin(1)].view(z.shape)
    loss = ((z_q - z.detach()) ** 2).mean() + 0.25 * ((z_q.detach() - z) ** 2).mean()
    out = (z + (z_q - z).detach()).movedim(-1, 1)
    ((out * direction).sum() + loss).backward()
    assert torch.equal(found.codes.flatten(), d.argmin(1))
    assert float(found.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    embedding_gradient = dict(quantizer.named_parameters())["embedding.weight"].grad
    for one, other in ((latents.grad, probe.grad), (embedding_gradient, weight.grad)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5)  # measured worst difference: 5e-7


def test_every_code_of_simvq_learns_from_a_batch_that_meets_few(draw_latents: Draw) -> None:
    quantizer = build(kind="simvq").train()
    before = quantizer.codebook().detach().clone()
    frozen = quantizer.state_dict()["simvq.frozen_codebook"].clone()
    latents = draw_latents(batch=1)
    assert len(quantizer.latents_to_codes(latents).unique()) <= 9
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    found = quantizer(latents)
    chosen, vectors = found.latents.double(), latents.double()
    expected = (1 + 0.25) * (chosen - vectors).square().mean()  # arXiv 2411.02038, equation 6, beta on the commitment
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    found.loss.backward()
    optimizer.step()
    assert ((quantizer.codebook() - before).norm(dim=-1) > 1e-4).all()
    assert torch.equal(quantizer.state_dict()["simvq.frozen_codebook"], frozen)
    assert [*dict(quantizer.named_parameters())] == ["simvq.code_transform.weight"]


def test_gradients_pass_straight_through(fields: dict, draw_latents: Draw) -> None:
    latents, direction = draw_latents().requires_grad_(), draw_latents(seed=1)
    quantizer = build(**fields)
    (quantizer.train()(latents).latents * direction).sum().backward()
    probe = draw_latents().requires_grad_()
    through = F.normalize(probe, dim=1) if quantizer.cosine else probe
    (through * direction).sum().backward()
    torch.testing.assert_close(latents.grad, probe.grad, rtol=0, atol=2e-5)  # measured worst difference: 5e-7


@pytest.mark.parametrize("kind", ["vq", "vq_cosine", "simvq", "residual_vq"])
def test_the_rotation_turns_and_scales_gradients_as_it_does_latents(kind: str, draw_latents: Draw) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"kind": kind, "gradient": "rotation", **VQ}
    fields |= {"num_levels": 2} if kind == "residual_vq" else {}
    quantizer = build_quantizer(QuantizerConfig(**fields)).train()
    latents, direction = draw_latents().requires_grad_(), draw_latents(seed=1)
    expected = quantizer.codes_to_latents(quantizer.latents_to_codes(latents))
    found = quantizer(latents)
    assert torch.equal(found.latents, expected)
    (found.latents * direction).sum().backward()
    probe = draw_latents().double().requires_grad_()
    vectors = F.normalize(probe, dim=1) if kind == "vq_cosine" else probe
    e = vectors.detach().movedim(1, -1).flatten(0, -2)
    q = found.latents.detach().double().movedim(1, -1).flatten(0, -2)
    unit_e, unit_q = F.normalize(e, dim=-1), F.normalize(q, dim=-1)
    r = F.normalize(unit_e + unit_q, dim=-1)
    # arXiv 2410.06424, section 4.2: q = lambda R e, R = I - 2 r r^T + 2 q^ e^T, both held fixed
    rotation = torch.eye(4).double() - 2 * r[:, :, None] * r[:, None] + 2 * unit_q[:, :, None] * unit_e[:, None]
    scaled = (q.norm(dim=-1) / e.norm(dim=-1))[:, None, None] * rotation
    torch.testing.assert_close((scaled @ e[:, :, None])[..., 0], q, rtol=0, atol=1e-6)
    given = direction.double().movedim(1, -1).reshape(-1, 4)
    passed = (scaled.mT @ given[:, :, None])[..., 0].view(8, 3, 3, 4).movedim(-1, 1)
    (vectors * passed).sum().backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad.double(), probe.grad, rtol=1e-4, atol=1e-4)


def test_residual_levels_code_what_is_left_and_add_up(draw_latents: Draw) -> None:
    torch.manual_seed(0)
    config = QuantizerConfig(kind="residual_vq", num_levels=3, update="gradient", **VQ)
    quantizer = build_quantizer(config).eval()
    assert isinstance(quantizer, ResidualQuantizer)
    latents = draw_latents().requires_grad_()
    found = quantizer(latents)
    assert found.codes.shape == (8, 3, 9)
    left, commitment = latents.detach(), 0.0
    for index, level in enumerate(quantizer.levels):
        assert isinstance(level, VectorQuantizer)
        codes = found.codes[:, :, index::3]  # the levels of one place stand side by side
        assert torch.equal(level.latents_to_codes(left), codes)
        left = left - level.codes_to_latents(codes)
        commitment += float(left.detach().square().mean())
    assert float(found.parts["commitment"].detach()) == pytest.approx(commitment, rel=1e-5)
    torch.testing.assert_close(latents.detach() - left.detach(), found.latents.detach(), rtol=0, atol=1e-6)
    direction = draw_latents(seed=1)
    (found.latents * direction).sum().backward()
    torch.testing.assert_close(latents.grad, direction, rtol=0, atol=0)  # once, not once a level


def test_more_levels_of_a_trained_codebook_leave_less_over(draw_latents: Draw) -> None:
    def left_over(num_levels: int) -> float:
        torch.manual_seed(0)
        config = QuantizerConfig(kind="residual_vq", num_levels=num_levels, kmeans_init=True, decay=0.8, **VQ)
        quantizer = build_quantizer(config).train()
        for step in range(20):
            quantizer(draw_latents(step, batch=32))
        latents = draw_latents(99, batch=32)
        return float((quantizer.eval()(latents).latents - latents).square().mean())

    assert left_over(3) < 0.5 * left_over(2)


@pytest.mark.parametrize("kind", ["vq", "vq_cosine"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_codebook_moves_to_the_latents(kind: str, update: str) -> None:
    restart = {"restart_below": 0.5, "decay": 0.8} if update == "ema" else {}
    quantizer = build(kind=kind, codebook_size=8, update=update, **restart)
    centres = F.normalize(torch.randn(8, 4), dim=-1)
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


@pytest.mark.parametrize("fields", [{"kind": "vq", "update": "gradient"}, {"kind": "simvq"}], ids=["vq", "simvq"])
@pytest.mark.parametrize("std", [0.1, 0.3, 1.0])
def test_a_fresh_codebook_is_met_by_latents_of_a_fresh_encoder(fields: dict, std: float) -> None:
    quantizer = build(codebook_size=1024, codebook_dim=8, **fields)
    latents = std * torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    used = len(quantizer.latents_to_codes(latents).unique())
    assert used > 100  # measured, vq: 118, 812, 564; simvq: 359, 847, 338


def test_the_moving_average_is_that_of_the_library(draw_latents: Draw) -> None:
    """Codes are looked up here, the rest is the library's: one whole training step of it gives the same codebook."""
    quantizer = build(kind="vq", decay=0.9, restart_below=0.0).train()
    assert isinstance(quantizer, MovingAverageQuantizer)
    other = build(kind="vq", decay=0.9, restart_below=0.0).train()
    assert isinstance(other, MovingAverageQuantizer)
    for seed in range(3):
        latents = draw_latents(seed)
        found = quantizer(latents)
        _, codes, _ = other.vq(latents.movedim(1, -1).flatten(1, 2))
        assert torch.equal(codes.view(8, 3, 3), found.codes)
    torch.testing.assert_close(quantizer.codebook(), other.codebook(), rtol=0, atol=0)
