"""Adapters against the pipelines themselves: what they hand to `scheduler.step`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmodal.classification.adapters import FAMILIES, Flux, Labelled, build_adapter, pack, unpack

Build = Callable[[str], Any]
PIPELINES = ("sd_epsilon", "sd_velocity", "sdxl_euler", "sd3", "flux_dev", "flux_schnell", "pixart", "dit")
# numpy asks tensors for a copy in a way that torch does not know; within diffusers' Euler scheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("family", PIPELINES)
def test_an_adapter_gives_what_the_pipeline_hands_to_its_scheduler(
    family: str, build_pipeline: Build, tiny: ModuleType
) -> None:
    pipe = build_pipeline(family)
    adapter = build_adapter(pipe)
    conditions = tiny.conditions_of(adapter)
    own_step = pipe.scheduler.step
    steps = tiny.spy_on_steps(pipe)
    assert pipe.scheduler.step == own_step
    assert len(steps) == 3
    for step in steps:
        assert step.out.abs().max() > 1e-3
        assert tiny.replay(adapter, step, conditions) == 0
        assert tiny.replay(adapter, step, conditions, backwards=True) > 1e-6, "times must matter"
        swapped = {name: one.flip(0) for name, one in conditions.items()}
        assert tiny.replay(adapter, step, swapped) > 1e-6, "conditions must matter"


def test_a_wrong_mask_shows(build_pipeline: Build, tiny: ModuleType) -> None:
    pipe = build_pipeline("pixart")
    adapter = build_adapter(pipe)
    conditions = tiny.conditions_of(adapter)
    step = tiny.spy_on_steps(pipe)[0]
    assert conditions["mask"].sum(dim=1).tolist() == [7, 4]
    assert tiny.replay(adapter, step, {**conditions, "mask": conditions["mask"].flip(0)}) > 1e-6
    assert tiny.replay(adapter, step, {**conditions, "mask": torch.ones_like(conditions["mask"])}) > 1e-6


def test_what_a_family_is_told_beside_text_shows(build_pipeline: Build, tiny: ModuleType) -> None:
    xl = build_pipeline("sdxl_euler")
    step = tiny.spy_on_steps(xl)[0]
    adapter = build_adapter(xl)
    adapter.image_size = 64
    assert tiny.replay(adapter, step, tiny.conditions_of(adapter)) > 1e-6
    dev = build_pipeline("flux_dev")
    step = tiny.spy_on_steps(dev)[0]
    adapter = Flux(dev, guidance=3.5)
    assert tiny.replay(adapter, step, tiny.conditions_of(adapter)) > 1e-6
    with pytest.raises(ValueError, match=r"guidance 3\.5 can not act"):
        Flux(build_pipeline("flux_schnell"), guidance=3.5)
    assert "guidance-distilled" in adapter.caution
    assert "step-distilled" in Flux(build_pipeline("flux_schnell")).caution


@pytest.mark.parametrize("family", PIPELINES)
def test_mixed_conditions_and_times_in_a_batch_are_as_one_by_one(
    family: str, build_pipeline: Build, tiny: ModuleType
) -> None:
    adapter = build_adapter(build_pipeline(family))
    conditions = tiny.conditions_of(adapter)
    z = torch.randn((2, *adapter.latent_shape), generator=torch.Generator().manual_seed(0))
    times = adapter.schedule.mix(torch.tensor([0.2, 0.8]).numpy()).model_times
    with torch.no_grad():
        both = adapter.predict(z, times, conditions)
        for row in range(2):
            only = {name: one[row : row + 1] for name, one in conditions.items()}
            alone = adapter.predict(z[row : row + 1], times[row : row + 1], only)
            torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=5e-6)  # worst 1.3e-6


@pytest.mark.parametrize("family", PIPELINES)
def test_latents_are_what_the_pipeline_decodes(
    family: str, build_pipeline: Build, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's own decoder gets the posterior's mode back, unscaled and unshifted."""
    pipe = build_pipeline(family)
    adapter = build_adapter(pipe)
    images = torch.rand((2, 3, adapter.image_size, adapter.image_size), generator=torch.Generator().manual_seed(0))
    latents = adapter.encode_images(images * 2 - 1)
    assert latents.shape == (2, *adapter.latent_shape)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        mode = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    seen: list[Tensor] = []
    monkeypatch.setattr(pipe.vae, "decode", lambda z, *_, **__: seen.append(z) or _stop())
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: _Same(given))
    given = pack(latents) if isinstance(adapter, Flux) else latents
    options: dict[str, Any] = {"prompt": tiny.PROMPTS, "guidance_scale": 1.0, "num_inference_steps": 1}
    if not isinstance(adapter, Labelled):
        options["latents"] = given
    else:
        options = {"class_labels": [0, 1], "guidance_scale": 1.0, "num_inference_steps": 1}
    if family == "pixart":
        options["use_resolution_binning"] = False
    with torch.no_grad(), pytest.raises(StopIteration):
        pipe(**options)
    torch.testing.assert_close(seen[0], mode, rtol=0, atol=1e-6)  # worst 1.2e-7


class _Same(tuple):
    """A step that leaves latents as they are, however its result is read."""

    def __new__(cls, latents: Tensor) -> _Same:
        return super().__new__(cls, (latents, latents))

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def _stop() -> None:
    raise StopIteration


def test_packing_is_undone() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(unpack(pack(latents), 2, 3), latents)
    assert pack(latents)[0, 1].tolist() == latents[0, :, :2, 2:4].flatten().tolist()


def test_prompts_of_equal_tokens_are_equal(build_pipeline: Build) -> None:
    for family in ("sd_epsilon", "sd3", "pixart"):
        adapter = build_adapter(build_pipeline(family))
        upper, lower, other = adapter.tokenize(["a red Apple", "a red apple", "a red pear"])
        assert (upper == lower) == (family != "sd3"), "T5 alone knows capitals, which PixArt makes small"
        assert other not in (upper, lower)
    adapter = build_adapter(build_pipeline("dit"))
    assert adapter.tokenize(["cat", "0", "dog"]) == [("0",), ("0",), ("1",)]


def test_classes_of_a_model_of_labels_have_names_and_numbers(build_pipeline: Build) -> None:
    adapter = build_adapter(build_pipeline("dit"))
    assert isinstance(adapter, Labelled)
    assert adapter.encode_labels(["dog", "house cat", 7, "999"])["class_labels"].tolist() == [1, 0, 7, 999]
    for wrong in ("bird", 1000, -1):
        with pytest.raises(ValueError, match=rf"class {wrong!r} is none of the 1000 classes"):
            adapter.encode_labels([wrong])


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    class AuraFlowPipeline:
        pass

    with pytest.raises(ValueError, match=r"class AuraFlowPipeline; known are StableDiffusionPipeline, .*DiTPipeline"):
        build_adapter(AuraFlowPipeline())
    assert len(FAMILIES) == 9


def test_sizes_that_a_model_can_not_cut_are_refused(build_pipeline: Build) -> None:
    assert build_adapter(build_pipeline("flux_dev"), 64).latent_shape == (4, 32, 32)
    with pytest.raises(ValueError, match="image_size 30 is no multiple of 4"):
        build_adapter(build_pipeline("flux_dev"), 30)


def test_freed_text_encoders_encode_no_more(fresh_pipeline: Build, tiny: ModuleType) -> None:
    adapter = build_adapter(fresh_pipeline("sdxl_euler"))
    adapter.free_text_encoders()
    assert adapter.tokenize(tiny.PROMPTS)
    with pytest.raises(ValueError, match="have been freed"):
        adapter.encode_text(tiny.PROMPTS)
