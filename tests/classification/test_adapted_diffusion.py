"""A diffusion model adapts CLIP to each picture: by its own errors, in pieces, however pictures are shared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.classification import adaptation
from mixmodal.classification.adaptation import AdaptationConfig, AdaptedClassifier
from mixmodal.classification.adapted_diffusion import DiffusionFeedback
from mixmodal.classification.adapters import build_adapter
from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.classification.denoiser import save_denoiser
from mixmodal.classification.denoising import Flow
from mixmodal.classification.diffusion import DiffusionScorer
from mixmodal.classification.keyed import digest_of, keyed_generator
from mixmodal.classification.loading import load_model
from mixmodal.classification.units import Unit, draw_noise
from mixmodal.config import UsageError, parse
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.models.denoiser import Denoiser, DenoiserConfig, TextEncoderConfig, build_scheduler
from mixmodal.pipeline.adapt_options import AdaptOptions
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.tokenization.text import TextTokenizer

CLASSES = ["a red apple", "green", "two"]
PICTURES = [pair.picture for pair in synthetic_pairs(3, 20)]
OPTIONS = {"num_steps": 2, "num_draws": 3, "lr": 1e-2}


@pytest.fixture(scope="module")
def own(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random text denoiser in the layout of `train-diffusion`."""
    pytest.importorskip("diffusers")
    text = TextEncoderConfig(dim=8, num_layers=1, num_heads=2, ffn_dim=16, max_text_tokens=8)
    shape = {"block_channels": (8, 16), "attention_levels": (1,), "head_dim": 8, "norm_groups": 4}
    config = DenoiserConfig(image_size=8, text=text, **shape)
    tokenizer, path = TextTokenizer.load(tokenizers / "text.model"), tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    model = Denoiser(config, num_pieces=tokenizer.num_pieces).eval()
    save_denoiser(model, path, scheduler=build_scheduler(config), card="", tokenizer=tokenizer)
    return path


@pytest.fixture
def config(tmp_path: Path, encoder: Path, pipeline: Path) -> ClassifyConfig:
    for number, pair in enumerate(synthetic_pairs(3, 20)):
        folder = tmp_path / "data" / CLASSES[number]
        folder.mkdir(parents=True, exist_ok=True)
        pair.picture.save(folder / f"{number}.png")
    adapt = AdaptOptions(denoiser=str(pipeline), **OPTIONS)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    paths = {"data": tmp_path / "data", "classes": tmp_path / "classes.txt", "out": tmp_path / "out"}
    return ClassifyConfig(model=str(encoder), method="contrastive", adapt=adapt, **paths)


def run(config: ClassifyConfig, **changes: Any) -> dict[str, dict[str, Any]]:
    """Records by key."""
    options = {**vars(config), **changes}
    classify(ClassifyConfig(**options))
    lines = [json.loads(line) for path in options["out"].glob("records*") for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def test_errors_under_one_class_are_those_of_the_scorer(pipeline: Path) -> None:
    adapter = load_model(pipeline).adapter
    scorer = DiffusionScorer(adapter, CLASSES, ["{}"], free_text_encoders=False)
    scorer.set_pictures(PICTURES[:1])
    units = [Unit(number, time, number, 1, 0, 1.0) for number, time in enumerate((0.1, 0.5, 0.9))]
    wanted = scorer.cost([0] * 3, [1] * 3, units)
    feedback = DiffusionFeedback(adapter, CLASSES)
    told = {name: one[1:2].expand(3, *one.shape[1:]) for name, one in feedback.embeddings.items()}
    noises = torch.stack([draw_noise(0, unit, feedback.noise_shape) for unit in units])
    times = torch.tensor([unit.time for unit in units], dtype=torch.float64)
    found = feedback.prepare(PICTURES[0])(told, times, noises)
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.float32))


def test_draws_in_pieces_have_the_same_errors_and_gradients(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load_model(pipeline).adapter
    feedback = DiffusionFeedback(adapter, CLASSES)
    sizes: list[int] = []
    predict = adapter.predict
    monkeypatch.setattr(adapter, "predict", lambda z, *rest: (sizes.append(len(z)), predict(z, *rest))[1])
    mixed = feedback.embeddings["embeddings"].mean(dim=0).requires_grad_(True)
    times = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    noises = torch.randn(5, *feedback.noise_shape, generator=keyed_generator(0, "a"))
    found = []
    for feedback.batch_size in (5, 2):
        errors = feedback.prepare(PICTURES[0])({"embeddings": mixed.expand(5, *mixed.shape)}, times, noises)
        (gradient,) = torch.autograd.grad(errors.mean(), [mixed])
        found.append((errors.detach(), gradient))
    assert sizes[:4] == [5, 2, 2, 1]
    assert sorted(sizes[4:]) == [1, 2, 2]  # once more for the gradient
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)  # worst 1.1e-7
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=3e-9)  # worst 2.8e-10 of 3e-4


@pytest.mark.parametrize("part", ["tower", "scale"])
def test_the_loss_falls_and_the_weights_come_back(
    part: Any, encoder: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = lambda seed, key, number: keyed_generator(seed, key)  # noqa: E731  # the draws of all steps
    monkeypatch.setattr(adaptation, "keyed_generator", same)
    classifier = ContrastiveClassifier(load_encoder(encoder), CLASSES)
    feedback = DiffusionFeedback(load_model(own).adapter, CLASSES, batch_size=4)
    weights = [one.detach().clone() for one in classifier.encoder.image_parameters("tower")]
    options = AdaptationConfig(part=part, num_steps=3, num_draws=5, lr=1e-3 if part == "tower" else 0.1)
    adapted = AdaptedClassifier(classifier, feedback.prepare, feedback.embeddings, feedback.noise_shape, options)
    losses = adapted.score(PICTURES[:2], ["0", "1"]).losses
    assert (losses[:, -1] < losses[:, 0]).all()
    after = classifier.encoder.image_parameters("tower")
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))


def test_a_draw_that_rounds_to_one_stays_below(monkeypatch: pytest.MonkeyPatch, encoder: Path) -> None:
    seen: list[torch.Tensor] = []

    def denoise(conditions: Any, times: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        Flow().mix(times.numpy())
        seen.append(times)
        return conditions["mean"].sum(dim=1)

    largest = lambda *shape, dtype=None, **_: torch.full(shape, 1 - torch.finfo(dtype).eps / 2, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(torch, "rand", largest)
    classifier = ContrastiveClassifier(load_encoder(encoder), CLASSES)
    options = AdaptationConfig(num_steps=1, num_draws=5)
    AdaptedClassifier(classifier, lambda _: denoise, {"mean": torch.eye(3)}, (4,), options).score(PICTURES[:1], ["a"])
    assert 0.99 < seen[0].max() < 1


@pytest.mark.parametrize("family", ["own", "pixart"])
def test_masks_are_joined(family: str, own: Path, load: Callable[[str], Any]) -> None:
    adapter = load_model(own).adapter if family == "own" else build_adapter(load("tiny_diffusion").build("pixart"))
    classes = ["a red apple", "green", "a red"]
    found = adapter.encode_text(classes)
    name, each = next((name, one) for name, one in found.items() if not one.is_floating_point())
    assert len({tuple(row) for row in each.tolist()}) > 1
    seen: list[torch.Tensor] = []
    predict = adapter.predict
    adapter.predict = lambda z, times, told: (seen.append(told[name]), predict(z, times, told))[1]
    feedback = DiffusionFeedback(adapter, classes)
    told = {key: one[:2] for key, one in feedback.embeddings.items()}
    noises = torch.ones(2, *feedback.noise_shape)
    assert feedback.prepare(PICTURES[0])(told, torch.full((2,), 0.5, dtype=torch.float64), noises).shape == (2,)
    assert (seen[0].dtype, seen[0].tolist()) == (each.dtype, [each.amax(dim=0).tolist()] * 2)


def test_shards_and_order_change_nothing(config: ClassifyConfig, tmp_path: Path) -> None:
    whole = run(config)
    for index in (1, 0):
        shared = run(config, out=tmp_path / "shared", shard=f"{index}/2")
    assert shared == whole


def test_records_have_what_was_before_and_the_summary_both_accuracies(config: ClassifyConfig, tmp_path: Path) -> None:
    plain = run(config, out=tmp_path / "plain", adapt=AdaptOptions())
    for key, line in run(config).items():
        np.testing.assert_allclose(line["before"], plain[key]["scores"], atol=1e-5)  # worst 9.5e-7
        assert np.abs(np.subtract(line["scores"], line["before"])).max() > 1e-3
        assert len(line["losses"]) == 2
        assert line["evaluations"] == [2 * 3 + 2 + 2] * 3
    summaries = [json.loads((path / "summary.json").read_text()) for path in (config.out, tmp_path / "plain")]
    assert summaries[0]["data"]["accuracy_before"] == summaries[1]["data"]["accuracy"]
    assert "accuracy_before" not in summaries[1]["data"]
    first, second = (one["settings"] for one in summaries)
    assert (first["adapt"]["lr"], len(first["adapt"]["denoiser_sha256"])) == (1e-2, 64)
    assert first == {**second, "adapt": first["adapt"]}  # records without a denoiser stay valid


def test_another_seed_has_other_draws(config: ClassifyConfig, tmp_path: Path) -> None:
    first, second = (run(config, out=tmp_path / str(seed), seed=seed) for seed in range(2))
    assert all(second[key]["losses"] != line["losses"] for key, line in first.items())
    with pytest.raises(ValueError, match=r"settings\.json: adapt\.lr was 0\.01 when this was written and is 0\.1 now"):
        run(config, out=tmp_path / "0", adapt=AdaptOptions(denoiser=config.adapt.denoiser, **{**OPTIONS, "lr": 0.1}))


def test_a_denoiser_of_numbers_is_named(config: ClassifyConfig, tmp_path: Path, load: Callable[[str], Any]) -> None:
    load("tiny_diffusion").build("dit").save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"^adapt\.denoiser .*dit: this denoiser is told numbers of classes"):
        run(config, adapt=AdaptOptions(denoiser=str(tmp_path / "dit")))
    assert not list(config.out.glob("*"))


def test_equal_pictures_have_equal_keys() -> None:
    assert digest_of(PICTURES[0]) == digest_of(PICTURES[0].copy()) != digest_of(PICTURES[0].rotate(90))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "diffusion", "--adapt.denoiser", "d"], "adapt can not act on the method diffusion"),
        (["--method", "contrastive", "--adapt.lr", "0.1"], r"adapt\.lr can not act without adapt\.denoiser"),
        (["--method", "contrastive", "--seed", "1"], "seed can not act on the method contrastive"),
        (["--method", "contrastive", "--adapt.denoiser", "d", "--adapt.num_steps", "0"], "num_steps is 0"),
    ],
)
def test_options_that_can_not_act_are_refused(argv: list[str], message: str) -> None:
    required = ["--model", "m", "--data", "d", "--out", "o"]
    with pytest.raises(UsageError, match=message):
        parse(ClassifyConfig, [*required, *argv])
    given = ["--method", "contrastive", "--adapt.denoiser", "d", "--seed", "1", "--dtype", "bfloat16"]
    assert parse(ClassifyConfig, [*required, *given]).is_adapted
