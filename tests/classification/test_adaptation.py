"""A denoiser that knows what a picture shows makes a classifier surer of it, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.classification.adaptation import AdaptationConfig, AdaptedClassifier, Conditions
from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.retrieval.encoder import ImagePart, load_encoder

CLASSES = ["a red apple", "green", "two"]
PICTURES = [pair.picture for pair in synthetic_pairs(3, 20)]
KEYS = ["0", "1", "2"]
MEANS = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
"""What the toy denoiser knows of the classes: pictures of class j are MEANS[j]."""


@pytest.fixture(params=["clip", "siglip"])
def classifier(
    request: pytest.FixtureRequest, tmp_path: Path, save_tiny_encoder: Callable[..., Path]
) -> ContrastiveClassifier:
    return ContrastiveClassifier(load_encoder(save_tiny_encoder(request.param, tmp_path / "encoder")), CLASSES)


def prepare(picture: Picture) -> Callable[[Conditions, Tensor, Tensor], Tensor]:
    """The exact denoiser of a class that has one picture, on one that shows class number (place in PICTURES)."""
    x = MEANS[PICTURES.index(picture)]

    def denoise(conditions: Conditions, times: Tensor, noises: Tensor) -> Tensor:
        alpha, sigma = (1 - times)[:, None], times[:, None].clamp_min(0.05)
        z = alpha * x + sigma * noises
        return (noises - (z - alpha * conditions["mean"]) / sigma).square().mean(dim=1)

    return denoise


def weights(classifier: ContrastiveClassifier) -> list[Tensor]:
    return [one.detach().clone() for part in ("tower", "scale") for one in classifier.encoder.image_parameters(part)]


@pytest.mark.parametrize("part", ["tower", "norm"])
def test_adapting_raises_the_probability_of_what_the_denoiser_sees(
    classifier: ContrastiveClassifier, part: ImagePart
) -> None:
    config = AdaptationConfig(part=part, num_steps=8, lr=3e-3, num_draws=16)
    before = weights(classifier)
    found = AdaptedClassifier(classifier, prepare, {"mean": MEANS}, (4,), config).score(PICTURES, KEYS)
    np.testing.assert_allclose(found.before.scores, classifier.score(PICTURES).scores, atol=1e-5)
    own = np.arange(3)
    assert (found.after.probabilities[own, own] > found.before.probabilities[own, own]).all()
    assert found.losses.shape == (3, 8)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(classifier), strict=True))


def test_the_scale_alone_keeps_the_order_of_classes(classifier: ContrastiveClassifier) -> None:
    config = AdaptationConfig(part="scale", num_steps=4, lr=0.1, num_draws=8)
    found = AdaptedClassifier(classifier, prepare, {"mean": MEANS}, (4,), config).score(PICTURES, KEYS)
    np.testing.assert_array_equal(found.before.scores.argsort(axis=1), found.after.scores.argsort(axis=1))
    assert np.abs(found.before.probabilities - found.after.probabilities).max() > 1e-3


def test_a_picture_is_adapted_the_same_whichever_others_are_beside_it(classifier: ContrastiveClassifier) -> None:
    config = AdaptationConfig(num_steps=2, lr=1e-2, num_draws=4)
    adapted = AdaptedClassifier(classifier, prepare, {"mean": MEANS}, (4,), config)
    whole, alone = adapted.score(PICTURES, KEYS), adapted.score(PICTURES[2:], KEYS[2:])
    np.testing.assert_array_equal(whole.after.scores[2:], alone.after.scores)
    other = adapted.score(PICTURES[2:], KEYS[:1])
    assert np.abs(other.losses - alone.losses).max() > 1e-3


def test_weights_are_restored_after_an_error(classifier: ContrastiveClassifier) -> None:
    before = weights(classifier)
    calls: list[int] = []

    def broken(picture: Picture) -> Callable[[Conditions, Tensor, Tensor], Tensor]:
        def denoise(conditions: Conditions, times: Tensor, noises: Tensor) -> Tensor:
            calls.append(1)
            return conditions["mean"].sum(dim=1) * (float("nan") if len(calls) == 3 else 1.0)

        return denoise

    adapted = AdaptedClassifier(classifier, broken, {"mean": MEANS}, (4,), AdaptationConfig(lr=0.1))
    with pytest.raises(ValueError, match="the denoiser's error on b is nan at step 2"):
        adapted.score(PICTURES[:1], ["b"])
    assert all(torch.equal(one, other) for one, other in zip(before, weights(classifier), strict=True))


def test_what_can_not_be_mixed_is_refused(classifier: ContrastiveClassifier) -> None:
    with pytest.raises(ValueError, match=r"condition 'mean' has 2 rows of torch.float32 for 3 classes"):
        AdaptedClassifier(classifier, prepare, {"mean": MEANS[:2]}, (4,))
    with pytest.raises(ValueError, match=r"condition 'mask' has 3 rows of torch.int64"):
        AdaptedClassifier(classifier, prepare, {"mask": MEANS.long()}, (4,))
    with pytest.raises(ValueError, match="num_steps is 0"):
        AdaptationConfig(num_steps=0)
