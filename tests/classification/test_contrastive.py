"""Scores are transformers' logits, and templates are averaged as vectors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.classification.templates import fill_templates
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.retrieval.encoder import DocumentEncoder, load_encoder, normalise

CLASSES = ["a red apple", "a", "green pears", "two"]
PICTURES = [pair.picture for pair in synthetic_pairs(5, 20)]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save_tiny_encoder: Callable[..., Path]
) -> Path:
    from transformers import AutoModel

    found = save_tiny_encoder(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModel.from_pretrained(found)
    if request.param == "siglip":  # 0 in a new one, where a wrong sign would not be seen
        model.logit_bias.data.fill_(-3.25)
        model.logit_scale.data.fill_(1.5)
        model.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def encoder(folder: Path) -> DocumentEncoder:
    return load_encoder(folder)


def test_scores_are_the_logits_of_transformers(folder: Path, encoder: DocumentEncoder) -> None:
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    siglip = model.config.model_type == "siglip"
    padding = {"padding": "max_length" if siglip else True, "max_length": 12}
    inputs = processor(text=CLASSES, images=PICTURES, return_tensors="pt", truncation=True, **padding)
    if siglip:
        del inputs["attention_mask"]
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image
    found = ContrastiveClassifier(encoder, CLASSES).score(PICTURES)
    np.testing.assert_allclose(found.scores, wanted.numpy(), atol=1e-5, rtol=0)  # worst seen 1.5e-6
    assert wanted.std() > 1e-3
    np.testing.assert_allclose(found.probabilities, wanted.softmax(1).numpy(), atol=1e-5)
    logarithms = torch.nn.functional.logsigmoid(wanted) if siglip else wanted.log_softmax(1)
    np.testing.assert_allclose(found.log_likelihoods.totals, logarithms.numpy(), atol=1e-5, rtol=0)
    assert found.log_likelihoods.counts.shape == found.scores.shape == (5, 4)


def test_templates_are_the_mean_of_vectors_of_length_one(encoder: DocumentEncoder) -> None:
    templates = ["{}", "the picture of {}", "{} or so"]
    found = ContrastiveClassifier(encoder, CLASSES, templates).score(PICTURES)
    vectors = [encoder.embed_texts([one.replace("{}", name) for name in CLASSES]) for one in templates]
    mean = normalise(np.mean([vector.astype(np.float64) for vector in vectors], axis=0))
    wanted = encoder.logit_scale * encoder.embed_images(PICTURES) @ mean.T + encoder.logit_bias
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5, rtol=0)
    plain = ContrastiveClassifier(encoder, CLASSES).score(PICTURES)
    assert np.abs(found.scores - plain.scores).max() > 1e-3


def test_equal_classes_are_tied_whatever_stands_beside_them(encoder: DocumentEncoder) -> None:
    encoder = DocumentEncoder(encoder._model, encoder._processor, encoder.identity, batch_size=2)
    found = ContrastiveClassifier(encoder, ["a pear", "green and much longer", "a pear"]).score(PICTURES)
    np.testing.assert_array_equal(found.scores[:, 0], found.scores[:, 2])
    best = found.scores[:, 0] > found.scores[:, 1]
    np.testing.assert_array_equal(found.tied.sum(axis=1), np.where(best, 2, 1))


def test_what_can_not_be_classified_is_refused(encoder: DocumentEncoder) -> None:
    with pytest.raises(ValueError, match="needs at least two classes, not 1"):
        ContrastiveClassifier(encoder, ["a pear"])
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{\}"):
        fill_templates(["{}", "a photo"], CLASSES)
    with pytest.raises(ValueError, match="templates: there is none"):
        fill_templates([], CLASSES)
