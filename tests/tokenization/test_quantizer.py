"""Every quantizer: the coding has an inverse, depends on the latent alone, and resumes to the bit."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixmodal.tokenization.image import config_from_dict
from mixmodal.tokenization.quantizer import build_quantizer, remedy
from mixmodal.tokenization.quantizer_base import Quantizer, QuantizerConfig
from mixmodal.tokenization.vector_quantizers import MovingAverageQuantizer

Draw = Callable[..., torch.Tensor]
VQ: dict[str, Any] = {"codebook_size": 64, "codebook_dim": 4}


def test_codes_to_latents_is_the_inverse_of_the_coding(quantizer: Quantizer, draw_latents: Draw) -> None:
    quantizer.eval()
    latents, codes, loss, parts = quantizer(draw_latents())
    assert codes.dtype == torch.int64
    assert codes.shape == (8, 3, 3 * quantizer.codes_per_place)
    assert 0 <= codes.min() <= codes.max() < quantizer.codebook_size
    assert latents.dtype == loss.dtype == torch.float32
    assert {*parts} == {*quantizer.part_weights}
    assert torch.equal(quantizer.codes_to_latents(codes), latents)  # measured difference: 0
    assert torch.equal(quantizer.latents_to_codes(draw_latents()), codes)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_weighted_sum_of_its_parts(quantizer: Quantizer, draw_latents: Draw, training: bool) -> None:
    quantizer.train(training)
    _, _, loss, parts = quantizer(draw_latents())
    assert all(part.shape == loss.shape == () for part in parts.values())
    expected = sum(float(part.detach()) * quantizer.part_weights[name] for name, part in parts.items())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_weights_of_the_parts_are_those_of_the_config() -> None:
    lfq = QuantizerConfig(kind="lfq", codebook_dim=4, commitment_weight=0.5, entropy_weight=0.2, diversity_weight=3.0)
    expected = {"commitment": 0.5, "entropy": 0.2, "codebook_entropy": pytest.approx(-0.6)}
    assert build_quantizer(lfq).part_weights == expected
    vq = QuantizerConfig(kind="vq", update="gradient", commitment_weight=0.5, **VQ)
    assert build_quantizer(vq).part_weights == {"codebook": 1.0, "commitment": 0.5}
    assert build_quantizer(replace(vq, update="ema")).part_weights == {"commitment": 0.5}


def test_the_training_codes_are_the_codes_of_encoding(quantizer: Quantizer, draw_latents: Draw) -> None:
    for seed in range(4):  # the codebook moves between them
        expected = quantizer.eval().latents_to_codes(draw_latents(seed))
        assert torch.equal(quantizer.train().latents_to_codes(draw_latents(seed)), expected)
        assert torch.equal(quantizer.train()(draw_latents(seed)).codes, expected)


@pytest.mark.parametrize("training", [True, False])
def test_codes_of_a_latent_do_not_depend_on_its_batch(quantizer: Quantizer, draw_latents: Draw, training: bool) -> None:
    latents = draw_latents(batch=64)
    together = copy.deepcopy(quantizer).train(training)(latents).codes
    quantizer.train(training)
    alone = [copy.deepcopy(quantizer)(latent[None]).codes for latent in latents]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(quantizer.latents_to_codes(latents), together)


@pytest.mark.parametrize("training", [True, False])
def test_codes_under_bf16_autocast_are_the_codes_of_float32(
    quantizer: Quantizer, draw_latents: Draw, training: bool
) -> None:
    quantizer.train(training)
    latents = draw_latents(batch=64)
    other = copy.deepcopy(quantizer)
    encoded = quantizer.latents_to_codes(latents)
    expected = quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(other.latents_to_codes(latents), encoded)
        found = other(latents)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.loss, expected.loss)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())


def test_codes_with_bf16_weights_are_those_of_the_same_weights_in_float32(
    config: QuantizerConfig, quantizer: Quantizer, draw_latents: Draw
) -> None:
    rounded = quantizer.bfloat16().eval()
    exact = build_quantizer(config).eval()
    exact.load_state_dict(rounded.state_dict())  # copies the rounded values into float32
    if isinstance(rounded, MovingAverageQuantizer) and rounded.cosine:  # rounding moves a code off the sphere
        exact.load_state_dict({**exact.state_dict(), "vq._codebook.embed": rounded.codebook()[None]})
    latents = draw_latents(batch=64).bfloat16()
    expected = exact(latents.float())
    found = rounded(latents)
    assert torch.equal(rounded.latents_to_codes(latents), expected.codes)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.latents, expected.latents)
    assert found.latents.dtype == found.loss.dtype == torch.float32


def test_encoding_and_evaluation_learn_nothing(quantizer: Quantizer, draw_latents: Draw) -> None:
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.train().latents_to_codes(draw_latents())
    quantizer.eval()(draw_latents())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_a_resumed_quantizer_goes_on_to_the_bit(config: QuantizerConfig, draw_latents: Draw) -> None:
    if config.update == "ema" and config.kind not in ("fsq", "lfq", "simvq"):
        config = replace(config, decay=0.5, restart_below=0.6)  # restarts in every update

    def step(quantizer: Quantizer, optimizer: torch.optim.Optimizer | None, seed: int) -> tuple[torch.Tensor, ...]:
        latents = draw_latents(seed).requires_grad_()
        found = quantizer.train()(latents)
        (found.latents.square().mean() + found.loss).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        assert latents.grad is not None
        return found.latents.detach(), found.codes, found.loss.detach(), latents.grad

    def optimize(quantizer: Quantizer) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(quantizer.parameters(), lr=0.1) if [*quantizer.parameters()] else None

    torch.manual_seed(0)
    first = build_quantizer(config)
    adam = optimize(first)
    for seed in range(2):
        step(first, adam, seed)
    torch.manual_seed(1)
    second = build_quantizer(config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = optimize(second)
    if adam and other:
        other.load_state_dict(copy.deepcopy(adam.state_dict()))
    torch.manual_seed(2)
    expected = step(first, adam, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for one, same in zip(step(second, other, 2), expected, strict=True):
        assert torch.equal(one, same)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert torch.equal(torch.get_rng_state(), state)


def test_configs_saved_before_a_field_was_added_are_read() -> None:
    saved = json.loads(
        '{"kind": "vq_cosine", "levels": [], "codebook_size": 64, "codebook_dim": 4, "update": "gradient"}'
    )
    found = config_from_dict(QuantizerConfig, saved)
    assert found == QuantizerConfig(kind="vq_cosine", update="gradient", **VQ)
    assert [*build_quantizer(found).state_dict()] == ["embedding.weight"]
    names = {*build_quantizer(replace(found, update="ema")).state_dict()}
    averages = {f"vq._codebook.{name}" for name in ("initted", "cluster_size", "embed_avg", "embed")}
    assert names == {*averages, "num_updates"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vae"}, "quantizer.kind is 'vae'"),
        ({"kind": "fsq"}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (8, 2)}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (4096, 4097)}, "quantizer.levels"),
        ({"kind": "fsq", "levels": (8, 8), "codebook_size": 64}, "quantizer.codebook_size .*levels make it"),
        ({"kind": "fsq", "levels": (8, 8), "gradient": "rotation"}, "quantizer.gradient has no effect with kind fsq"),
        ({"kind": "lfq"}, "quantizer.codebook_dim is 0"),
        ({"kind": "lfq", "codebook_dim": 19}, r"quantizer.codebook_dim is 19.*2\*\*18"),
        ({"kind": "lfq", "codebook_dim": 6, "codebook_size": 64}, r"quantizer.codebook_size .*2\*\*codebook_dim"),
        ({"kind": "lfq", "codebook_dim": 6, "gradient": "rotation"}, "quantizer.gradient has no effect with kind lfq"),
        ({"kind": "lfq", "codebook_dim": 6, "update": "gradient"}, "quantizer.update has no effect with kind lfq"),
        ({"kind": "lfq", "codebook_dim": 6, "entropy_weight": -1.0}, "quantizer.entropy_weight"),
        ({"kind": "lfq", "codebook_dim": 6, "entropy_weight": float("nan")}, "quantizer.entropy_weight"),
        ({"kind": "lfq", "codebook_dim": 6, "entropy_temperature": 0.0}, "quantizer.entropy_temperature"),
        (
            {"kind": "lfq", "codebook_dim": 6, "entropy_weight": 0.0, "diversity_weight": 2.0},
            "quantizer.diversity_weight has no effect with kind lfq with entropy_weight: 0",
        ),
        ({"kind": "vq", "codebook_dim": 4}, "quantizer.codebook_size"),
        ({"kind": "vq", "codebook_size": 1, "codebook_dim": 4}, "quantizer.codebook_size is 1"),
        ({"kind": "vq", "codebook_size": 4}, "quantizer.codebook_dim"),
        ({"kind": "vq", "levels": (8, 8), **VQ}, "quantizer.levels"),
        ({"kind": "vq", "num_levels": 2, **VQ}, "quantizer.num_levels has no effect"),
        ({"kind": "vq", "entropy_weight": 0.2, **VQ}, "quantizer.entropy_weight has no effect"),
        ({"kind": "vq", "decay": 1.0, **VQ}, "quantizer.decay"),
        ({"kind": "vq", "restart_below": -1.0, **VQ}, "quantizer.restart_below"),
        ({"kind": "vq", "gradient": "turned", **VQ}, "quantizer.gradient is 'turned'"),
        ({"kind": "vq", "gradient": "rotation", "codebook_size": 8, "codebook_dim": 1}, "quantizer.codebook_dim is 1"),
        ({"kind": "vq_cosine", "codebook_size": 8, "codebook_dim": 1}, "quantizer.codebook_dim is 1"),
        (
            {"kind": "vq_cosine", "update": "gradient", "restart_below": 1.0, **VQ},
            "quantizer.restart_below has no effect with kind vq_cosine with update: gradient",
        ),
        ({"kind": "vq_cosine", "update": "both", **VQ}, "quantizer.update"),
        ({"kind": "simvq", "update": "gradient", **VQ}, "quantizer.update has no effect with kind simvq"),
        ({"kind": "simvq", "kmeans_init": True, **VQ}, "quantizer.kmeans_init has no effect with kind simvq"),
        ({"kind": "residual_vq", **VQ}, "quantizer.num_levels is 0"),
        ({"kind": "residual_vq", "num_levels": 1, **VQ}, "quantizer.num_levels is 1.*at least 2"),
        ({"kind": "residual_vq", "num_levels": 2, "levels": (8, 8), **VQ}, "quantizer.levels has no effect"),
    ],
)
def test_config_errors_name_the_key(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(QuantizerConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"kind": "fsq", "levels": (8, 5)}, "smaller KEY.levels"),
        ({"kind": "lfq", "codebook_dim": 4}, "raise KEY.entropy_weight"),
        ({"kind": "lfq", "codebook_dim": 4, "entropy_weight": 0.0}, "set KEY.entropy_weight above 0"),
        ({"kind": "simvq", **VQ}, "lower KEY.codebook_dim"),
        ({"kind": "vq", **VQ}, "choose KEY.kind vq_cosine"),
        ({"kind": "vq_cosine", **VQ}, "raise KEY.restart_below"),
        ({"kind": "vq_cosine", "restart_below": 0.0, **VQ}, "set KEY.restart_below above 0"),
        ({"kind": "vq_cosine", "update": "gradient", **VQ}, "choose KEY.update ema"),
        ({"kind": "residual_vq", "num_levels": 2, **VQ}, "raise KEY.restart_below, lower num_levels"),
    ],
)
def test_the_remedy_is_one_that_the_kind_can_take(fields: dict, advice: str) -> None:
    config = QuantizerConfig(**fields)
    build_quantizer(config)
    assert advice.replace("KEY", "quantizer") in remedy(config)
    assert advice.replace("KEY", "tokenizer.quantizer") in remedy(config, "tokenizer.quantizer")
