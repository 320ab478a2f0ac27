"""Models from folders: pipelines and bare denoisers, from safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.classification.adapters import Labelled, build_adapter
from mixmodal.classification.datasets import NamedClass
from mixmodal.classification.denoiser import save_denoiser
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.loading import load_model, revision_of
from mixmodal.classification.units import Unit, draw_noise
from mixmodal.models.denoiser import Denoiser, DenoiserConfig, TextEncoderConfig, build_scheduler
from mixmodal.tokenization.conditions import TextTokens
from mixmodal.tokenization.text import TextTokenizer

Build = Callable[[str], Any]
UNIT = Unit(0, 0.5005, 0, 1, 0, 1.0)


@pytest.fixture(scope="module")
def folder(build_pipeline: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk."""
    path = tmp_path_factory.mktemp("pipeline")
    build_pipeline("sd_epsilon").save_pretrained(path)
    return path


def build_bare(folder: Path, *, text: bool = False, **settings: Any) -> Any:
    """The U-Net of a bare denoiser, saved in the layout of training."""
    from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    if text:
        blocks = {"down_block_types": down, "up_block_types": up}
        unet: Any = UNet2DConditionModel(
            **shape, **blocks, in_channels=3, out_channels=3, cross_attention_dim=8, attention_head_dim=8
        )
    else:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(**shape, **blocks, **{"num_class_embeds": 4, **settings})
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")  # pyright: ignore
    return unet.eval()


def test_a_folder_gives_the_same_model(folder: Path, build_pipeline: Build) -> None:
    found = load_model(folder)
    scorers = [DiffusionScorer(one, ["cat", "dog"]) for one in (found.adapter, _copy(build_pipeline("sd_epsilon")))]
    for scorer in scorers:
        scorer.set_pictures(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    costs = [scorer.cost([0, 0], [0, 1], [UNIT] * 2).tolist() for scorer in scorers]
    assert costs[0] == costs[1]
    assert (found.name, len(found.revision)) == (str(folder), 64)
    assert not any(weight.requires_grad for weight in found.adapter.network.parameters())


def _copy(pipe: Any) -> Any:
    return build_adapter(type(pipe)(**pipe.components, requires_safety_checker=False))


def test_the_autoencoder_stays_in_float32(folder: Path) -> None:
    adapter = load_model(folder, dtype=torch.bfloat16).adapter
    assert (adapter.dtype, adapter.vae.dtype) == (torch.bfloat16, torch.float32)
    assert adapter.pipe.text_encoder.dtype == torch.bfloat16
    assert adapter.encode_text(["a cat"])["embeddings"].dtype == torch.bfloat16
    exact = load_model(folder).adapter
    for name, weight in adapter.vae.state_dict().items():
        assert torch.equal(weight, exact.vae.state_dict()[name]), "rounded once, then read as float32"


def test_a_folder_of_pickles_alone_is_refused(build_pipeline: Build, tmp_path: Path) -> None:
    build_pipeline("sd_epsilon").save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin"))
    for path in tmp_path.rglob("*.safetensors"):  # transformers writes no pickles any more
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"diffusion model {tmp_path}: .*safetensors"):
        load_model(tmp_path)


def test_an_unknown_family_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline", "unet": ["evil", "Code"]}))
    with pytest.raises(ValueError, match=rf"{tmp_path}: there is no adapter for .* SanaPipeline; known are Stable"):
        load_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not JSON"):
        load_model(tmp_path)


def test_a_pipeline_of_the_hub_is_known_by_its_index_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def give_index(*arguments: Any, revision: str | None) -> str:
        asked.append((*arguments, revision))
        return str(tmp_path / "model_index.json")

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give_index)
    with pytest.raises(ValueError, match="there is no adapter for pipelines of the class SanaPipeline"):
        load_model("owner/name@v2")
    assert asked == [("owner/name", "model_index.json", "v2")]


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model_index\.json, nor denoiser\.json, nor unet/config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*absent"):
        load_model(tmp_path / "absent")
    build_bare(tmp_path)
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "Transformer2DModel"}))
    with pytest.raises(ValueError, match="class Transformer2DModel; known are UNet2DModel and UNet2DConditionModel"):
        load_model(tmp_path)


def test_a_bare_denoiser_is_told_numbers_or_names_of_classes(tmp_path: Path) -> None:
    unet = build_bare(tmp_path)
    adapter = load_model(tmp_path, names={"cat": 0, "dog": 2}).adapter
    assert isinstance(adapter, Labelled)
    assert (adapter.latent_shape, adapter.kind) == ((3, 8, 8), "v_prediction")
    scorer = DiffusionScorer(adapter, ["cat", "dog", 3])
    shown = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    scorer.set_pictures(shown)
    assert torch.equal(scorer.latents, shown), "pixels are the latents"
    conditions = scorer.conditions["class_labels"]
    assert conditions.tolist() == [0, 2, 3]
    with torch.no_grad():
        expected = unet(shown.repeat(3, 1, 1, 1), 5, class_labels=conditions).sample
        found = adapter.predict(shown.repeat(3, 1, 1, 1), torch.tensor([5] * 3), scorer.conditions)
    assert torch.equal(found, expected)
    costs = scorer.cost([0] * 3, [0, 1, 2], [UNIT] * 3)
    assert len(set(costs.tolist())) == 3


def test_a_bare_denoiser_that_is_told_nothing_is_refused(tmp_path: Path) -> None:
    build_bare(tmp_path, num_class_embeds=None)
    with pytest.raises(ValueError, match="told neither classes nor texts"):
        load_model(tmp_path)


def test_a_bare_denoiser_of_texts_takes_an_encoder(tmp_path: Path) -> None:
    build_bare(tmp_path, text=True)

    def encode(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        mask = torch.arange(4)[None] < lengths[:, None] - 2
        return {
            "encoder_hidden_states": lengths[:, None, None].expand(-1, 4, 8) / 9,
            "encoder_attention_mask": mask,
        }

    adapter = load_model(tmp_path, encode=encode).adapter
    scorer = DiffusionScorer(adapter, ["cat", "melons"], ["{}", "a {}"])
    scorer.set_pictures(torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8))
    costs = scorer.cost([0] * 4, [0, 1, 0, 1], [UNIT, UNIT, UNIT._replace(template=1), UNIT._replace(template=1)])
    assert len(set(costs.tolist())) == 4
    assert np.isfinite(costs).all()
    with pytest.raises(ValueError, match="classes 'cat' and 'dog' are the same"):
        DiffusionScorer(adapter, ["cat", "dog"])


@pytest.mark.parametrize("told", ["class", "text"])
def test_an_exported_denoiser_scores_as_it_denoises(told: str, tokenizers: Path, tmp_path: Path) -> None:
    config = DenoiserConfig(
        image_size=8,
        block_channels=(8, 16),
        attention_levels=(1,),
        head_dim=8,
        norm_groups=4,
        text=TextEncoderConfig(dim=8, num_layers=1, num_heads=2, ffn_dim=16, max_text_tokens=8),
    )
    tokenizer = TextTokenizer.load(tokenizers / "text.model")
    given = {"num_classes": 2} if told == "class" else {"num_pieces": tokenizer.num_pieces}
    torch.manual_seed(0)
    model = Denoiser(config, **given).eval()
    classes = [NamedClass("apple", "a red apple"), NamedClass("pear", "a blue pear")]
    named = {"classes": classes} if told == "class" else {"tokenizer": tokenizer}
    save_denoiser(model, tmp_path, scheduler=build_scheduler(config), card="", **named)
    prompts = [one.caption for one in classes]
    scorer = DiffusionScorer(load_model(tmp_path).adapter, prompts)
    image = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    scorer.set_pictures(image)
    found = scorer.cost([0, 0], [0, 1], [UNIT] * 2)
    eps = draw_noise(0, UNIT, (3, 8, 8))[None]
    step = torch.tensor([500])
    conditions = torch.arange(2) if told == "class" else TextTokens(tokenizer, 8).encode(prompts)
    with torch.no_grad():
        noisy = build_scheduler(config).add_noise(image, eps, step)
        outs = [model(noisy, step, conditions[row : row + 1]) for row in range(2)]
    np.testing.assert_allclose(found, [float((out - eps).square().mean()) for out in outs], rtol=1e-6)  # worst 9.3e-8
    assert found[0] != found[1]
    half = DiffusionScorer(load_model(tmp_path, dtype=torch.bfloat16).adapter, prompts)
    half.set_pictures(image)
    np.testing.assert_allclose(half.cost([0, 0], [0, 1], [UNIT] * 2), found, rtol=2e-3)  # worst 5.5e-4


def test_a_changed_file_is_another_revision(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    first = revision_of(tmp_path)
    assert revision_of(tmp_path) == first
    (tmp_path / "a").write_text("three")
    assert revision_of(tmp_path) != first
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert revision_of(snapshot) == "0123abc"
