"""The scorer against a plain loop over the pipeline's own parts, for any mixture; caches, templates and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.classification import diffusion
from mixmodal.classification.adapters import build_adapter
from mixmodal.classification.denoising import build_weighting
from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer, PromptCache
from mixmodal.classification.units import Unit, draw_noise

Build = Callable[[str], Any]
CLASSES = ["cat", "dog", "red apple"]
TEMPLATES = ["a photo of a {}.", "a {}"]
UNITS = [
    Unit(0, 0.5005, 0, 1, 0, 1.0),
    Unit(1, 0.2505, 1, 1, 1, 1.0),
    Unit(2, 0.2505, 1, -1, 1, 1.0),
    Unit(3, 0.9005, 7, 1, 0, 3.0),
]


def images(num: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand((num, 3, size, size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build_scorer(pipe: Any, num_pictures: int = 2, **config: Any) -> DiffusionScorer:
    adapter = build_adapter(pipe)
    scorer = DiffusionScorer(adapter, CLASSES, TEMPLATES, DiffusionConfig(**config), free_text_encoders=False)
    scorer.set_pictures(images(num_pictures, adapter.image_size))
    return scorer


def all_triples(num_pictures: int = 2) -> tuple[list[int], list[int], list[Unit]]:
    triples = [(p, k, u) for u in UNITS for k in range(len(CLASSES)) for p in range(num_pictures)]
    return [one[0] for one in triples], [one[1] for one in triples], [one[2] for one in triples]


@torch.no_grad()
def naive_cost(pipe: Any, image: torch.Tensor, name: str, unit: Unit, seed: int) -> float:
    """One picture, one class, one unit, with the pipeline's scheduler and U-Net, in the words of their own API."""
    x = pipe.vae.encode(image[None]).latent_dist.mean * pipe.vae.config.scaling_factor
    eps = draw_noise(seed, unit, x.shape[1:])[None]
    step = torch.tensor([int(unit.time * 1000)])
    text = pipe.encode_prompt(TEMPLATES[unit.template].replace("{}", name), "cpu", 1, False)[0]
    out = pipe.unet(pipe.scheduler.add_noise(x, eps, step), step, text).sample
    if pipe.scheduler.config.prediction_type == "v_prediction":
        signal = pipe.scheduler.alphas_cumprod[step] ** 0.5
        noise = (1 - pipe.scheduler.alphas_cumprod[step]) ** 0.5
        out = signal * out + noise * pipe.scheduler.add_noise(x, eps, step)
    return float((out - eps).square().mean())


@pytest.mark.parametrize("family", ["sd_epsilon", "sd_velocity"])
def test_costs_are_those_of_a_plain_loop_for_any_batch_size(family: str, build_pipeline: Build) -> None:
    pipe = build_pipeline(family)
    pictures, classes, units = all_triples()
    shown = images(2)
    expected = [naive_cost(pipe, shown[p], CLASSES[k], u, seed=3) for p, k, u in zip(pictures, classes, units)]
    assert np.ptp(expected) > 1e-2
    for batch_size in (24, 5, 1):
        scorer = build_scorer(pipe, seed=3, batch_size=batch_size)
        found = scorer.cost(pictures, classes, units)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # worst 2.4e-7
    assert scorer.num_evaluations == 24
    order = np.random.default_rng(0).permutation(24)[:7]
    mixed = scorer.cost(*([some[one] for one in order] for some in (pictures, classes, units)))
    np.testing.assert_allclose(mixed, np.array(expected)[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sdxl_euler", "sd3", "flux_dev", "pixart"])
def test_every_family_scores_alike_in_a_mixture_and_one_by_one(family: str, build_pipeline: Build) -> None:
    scorer = build_scorer(build_pipeline(family))
    triples = all_triples()
    together = scorer.cost(*triples)
    alone = [scorer.cost([p], [k], [u])[0] for p, k, u in zip(*triples)]
    np.testing.assert_allclose(together, alone, rtol=2e-6)  # worst 2.2e-7
    by_class = together.reshape(4, 3, 2)
    assert (np.ptp(by_class, axis=1) > 1e-6).all(), "classes must matter"
    assert (np.ptp(by_class, axis=2) > 1e-6).all(), "pictures must matter"


def test_a_weighting_multiplies_the_error_of_its_space(build_pipeline: Build) -> None:
    pipe = build_pipeline("sd_velocity")
    pictures, classes, units = all_triples()
    plain = build_scorer(pipe).cost(pictures, classes, units)
    squares = pipe.scheduler.alphas_cumprod.double().numpy()[[int(one.time * 1000) for one in units]]
    times = np.array([one.time for one in units])
    found = build_scorer(pipe, weighting=build_weighting("exp")).cost(pictures, classes, units)
    np.testing.assert_allclose(found, plain * (1 - squares) / squares * np.exp(-7 * times), rtol=1e-6)  # worst 1.5e-7
    scorer = build_scorer(pipe, weighting=build_weighting("elbo"))
    slopes = scorer.adapter.schedule.slope(times)
    np.testing.assert_allclose(scorer.cost(pictures, classes, units), plain * slopes, rtol=1e-12)
    assert scorer.scale == 4 * 16 * 16 / 2


def test_models_of_labels_take_numbers_of_classes(build_pipeline: Build) -> None:
    adapter = build_adapter(build_pipeline("dit"))
    scorer = DiffusionScorer(adapter, ["cat", 1, 7])
    scorer.set_pictures(images(1))
    units = [one._replace(template=0) for one in UNITS]
    found = scorer.cost([0] * 12, [0, 1, 2] * 4, [one for one in units for _ in range(3)])
    assert (np.ptp(found.reshape(4, 3), axis=1) > 1e-6).all()
    with pytest.raises(ValueError, match="templates can not act"):
        DiffusionScorer(adapter, ["cat", 1], ["a {}"])
    with pytest.raises(ValueError, match="classes 'cat' and 0 are the same to this model"):
        DiffusionScorer(adapter, ["cat", 0])


def test_cached_prompts_are_those_that_were_encoded(
    fresh_pipeline: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(folder=tmp_path / "prompts", model="tiny", revision="1")
    first = build_adapter(fresh_pipeline("pixart"))
    scorer = DiffusionScorer(first, CLASSES, TEMPLATES, cache=cache)
    assert first.pipe.text_encoder is None
    assert len(list((tmp_path / "prompts").glob("*.safetensors"))) == 1
    again = build_adapter(fresh_pipeline("pixart"))
    fresh = again.encode_text([template.replace("{}", one) for template in TEMPLATES for one in CLASSES])
    monkeypatch.setattr(again, "_encode", None)
    cached = DiffusionScorer(again, CLASSES, TEMPLATES, cache=cache).conditions
    for name, one in fresh.items():
        assert torch.equal(cached[name], one)
        assert torch.equal(scorer.conditions[name], one)
        assert cached[name].dtype == one.dtype


def test_another_model_revision_precision_or_prompt_has_a_cache_of_its_own(build_pipeline: Build) -> None:
    adapter = build_adapter(build_pipeline("sd_epsilon"))
    base: dict[str, Any] = {"folder": Path(), "model": "a", "revision": "1"}
    paths = [PromptCache(**{**base, **other}).path(adapter, ["x"]) for other in ({}, {"model": "b"}, {"revision": "2"})]
    paths += [PromptCache(**base).path(adapter, prompts) for prompts in (["x", "y"], ["xy"], ["y", "x"])]
    assert len(set(paths)) == 6


def test_a_broken_cache_is_named(fresh_pipeline: Build, tmp_path: Path) -> None:
    adapter = build_adapter(fresh_pipeline("sd_epsilon"))
    cache = PromptCache(folder=tmp_path, model="tiny", revision="1")
    path = cache.path(adapter, CLASSES)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=rf"{path.name} are broken; delete the file"):
        DiffusionScorer(adapter, CLASSES, cache=cache)


def test_classes_that_tokenize_the_same_are_named(build_pipeline: Build) -> None:
    adapter = build_adapter(build_pipeline("sd_epsilon"))
    with pytest.raises(
        ValueError, match=r"classes 'Cat' and 'cat' are the same to this model in the template 'a \{\}'"
    ):
        DiffusionScorer(adapter, ["Cat", "dog", "cat"], ["a {}"])
    long = "cat " * 30
    with pytest.raises(ValueError, match="cut long prompts"):
        DiffusionScorer(adapter, [f"{long} red", f"{long} blue"])
    with pytest.raises(ValueError, match="at least two classes, not 1"):
        DiffusionScorer(adapter, ["cat"])
    with pytest.raises(ValueError, match=r"has no \{\} for the class"):
        DiffusionScorer(adapter, CLASSES, ["a cat"])


def test_pictures_are_encoded_once_and_noises_drawn_once(
    build_pipeline: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = build_scorer(build_pipeline("sd_epsilon"))
    drawn: list[int] = []
    draw = diffusion.draw_noise
    monkeypatch.setattr(
        diffusion, "draw_noise", lambda seed, unit, shape: drawn.append(unit.noise) or draw(seed, unit, shape)
    )
    monkeypatch.setattr(scorer.adapter.vae, "encode", None)
    triples = all_triples()
    np.testing.assert_array_equal(scorer.cost(*triples), scorer.cost(*triples))
    assert drawn == [0, 1, 7]


def test_pictures_of_any_size_are_resized_and_cropped(build_pipeline: Build) -> None:
    scorer = build_scorer(build_pipeline("sd_epsilon"))
    pixels = ((images(1)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    exact = Image.fromarray(pixels)
    wide = Image.new("RGB", (80, 32))
    wide.paste(exact, (24, 0))
    scorer.set_pictures([exact, wide])
    assert torch.equal(scorer.latents[0], scorer.latents[1])
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\) given; this model takes 32 x 32"):
        scorer.set_pictures(images(1, 8))
    with pytest.raises(ValueError, match="latents of shape"):
        scorer.set_latents(torch.zeros(1, 4, 8, 8))


def test_a_cost_that_is_no_number_is_left_to_the_engine_to_name(build_pipeline: Build) -> None:
    scorer = build_scorer(build_pipeline("sd_epsilon"))
    latents = scorer.latents.clone()
    latents[1, 0, 0, 0] = torch.nan
    scorer.set_latents(latents)
    found = scorer.cost([0, 1], [0, 0], [UNITS[0]] * 2)
    assert np.isnan(found).tolist() == [False, True]


def test_half_precision_is_near_and_its_errors_are_float32(fresh_pipeline: Build) -> None:
    triples = all_triples()
    exact = build_scorer(fresh_pipeline("sd_epsilon")).cost(*triples)
    pipe = fresh_pipeline("sd_epsilon")
    pipe.unet.to(torch.bfloat16)
    found = build_scorer(pipe).cost(*triples)
    np.testing.assert_allclose(found, exact, rtol=2e-3)  # worst 5e-4
    assert (found != exact).all()
    assert len(set(found.tolist())) == len(found), "bfloat16 sums would coincide"


def test_batches_for_a_compiled_network_are_of_one_size(build_pipeline: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compilation changes beside it; the network itself is compiled on CUDA alone."""
    triples = all_triples()
    expected = build_scorer(build_pipeline("sd_epsilon")).cost(*triples)
    scorer = build_scorer(build_pipeline("sd_epsilon"), batch_size=10)
    scorer.config = replace(scorer.config, compile=True)
    sizes: list[int] = []
    predict = scorer.adapter.predict
    monkeypatch.setattr(scorer, "_predict", lambda z, *rest: sizes.append(len(z)) or predict(z, *rest))
    np.testing.assert_allclose(scorer.cost(*triples), expected, rtol=1e-6)  # worst 2.1e-7
    assert sizes == [10, 10, 10]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd_epsilon", "sdxl_euler", "sd3", "flux_dev", "pixart"])
def test_an_adapter_is_traced_once_and_whole(family: str, build_pipeline: Build) -> None:
    """One graph for all batches of a size, whatever they mix; a break or a second trace would count as more."""
    from torch._dynamo.testing import CompileCounter

    scorer = build_scorer(build_pipeline(family), batch_size=8)
    triples = all_triples()
    expected = scorer.cost(*triples)
    scorer.config = replace(scorer.config, compile=True)
    counter = CompileCounter()
    scorer._predict = torch.compile(scorer.adapter.predict, dynamic=False, backend=counter)  # pyright: ignore[reportPrivateUsage]
    for shown in (triples, tuple(some[:21][::-1] for some in triples), tuple(some[:3] for some in triples)):
        found = scorer.cost(*shown)
    np.testing.assert_allclose(found, expected[:3], rtol=1e-6)  # worst 0
    assert counter.frame_count == 1


def test_a_table_of_errors_has_those_of_every_picture_class_and_unit(build_pipeline: Build) -> None:
    scorer = build_scorer(build_pipeline("sd_epsilon"), num_pictures=3, weighting=build_weighting("exp"))
    units = [Unit(j, (j + 0.5) / 20, j, 1, 0, 1.0) for j in range(20)]
    expected = [[scorer.errors([p] * 20, [k] * 20, units) for k in range(len(CLASSES))] for p in range(3)]
    np.testing.assert_allclose(scorer.error_table(units), expected, rtol=1e-6)  # worst 0


def test_what_can_not_be_is_refused(build_pipeline: Build) -> None:
    with pytest.raises(ValueError, match="compile acts on CUDA alone, and the model is on cpu"):
        build_scorer(build_pipeline("sd_epsilon"), compile=True)
    with pytest.raises(ValueError, match="loss 'l3' is unknown"):
        DiffusionConfig(loss="l3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch_size is 0"):
        DiffusionConfig(batch_size=0)
    scorer = build_scorer(build_pipeline("sd_epsilon"))
    with pytest.raises(ValueError, match="as many pictures, classes and units: 1, 1, 2"):
        scorer.cost([0], [0], UNITS[:2])
    with pytest.raises(ValueError, match="units name template 2; there are 2"):
        scorer.cost([0], [0], [UNITS[0]._replace(template=2)])
