"""Several documents of a class or a picture: means of log p, and the whole against enumeration in double precision."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.classification.autoregressive import AutoregressiveClassifier, score_images, score_texts
from mixmodal.classification.likelihoods import ScoredSequence, SequenceScorer
from mixmodal.document import Document, Image, SequenceFormat, Text, build_format
from mixmodal.models.attention import KVCache
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CODES, GRID = 3, (2, 2)


class Exact(Transformer):
    """Its logits keep the precision of its weights."""

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        weight = self.embedding.weight if self.output is None else self.output.weight
        return F.linear(hidden, weight[slice(None) if ids is None else ids])

    def build_cache(self, *args: Any, **options: Any) -> KVCache:
        return super().build_cache(*args, **{**options, "dtype": torch.float64})


@pytest.fixture(params=["cm3leon", "chameleon"])
def form(request: pytest.FixtureRequest, letters: Callable[[int], Any]) -> SequenceFormat:
    sizes = VocabularyConfig(codebook_sizes={"image": CODES}, num_text_pieces=3, num_sentinels=2)
    return build_format(request.param, Vocabulary(sizes), {"image": GRID}, letters(3))


@pytest.fixture
def scorer(form: SequenceFormat) -> SequenceScorer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=form.vocabulary.size, dim=16, num_layers=2, num_heads=2, ffn_dim=32, init_std=0.5
    )
    return SequenceScorer(Exact(config).double().eval(), form, batch_size=50)


@pytest.fixture
def classes() -> list[Document]:
    return [Document([Text(text)]) for text in ("ab", "c", "bca")]


@pytest.fixture
def pictures() -> list[Document]:
    """Every picture there is."""
    return [Document([Image(np.array(codes).reshape(GRID))]) for codes in product(range(CODES), repeat=4)]


def enumerate_pictures(scorer: SequenceScorer, text: Document) -> np.ndarray:
    """p(image | text) of every picture, code by code, by whole forwards of every beginning of a picture."""
    form, codes = scorer.format, scorer.vocabulary.ids("image")
    pictures = list(product(range(CODES), repeat=4))
    spelled = [form.spell_continuation(text, Document([Image(np.array(one).reshape(GRID))])) for one in pictures]
    ids = torch.from_numpy(np.stack([one for one, _ in spelled]))
    places = np.flatnonzero(spelled[0][1])
    found = torch.ones(len(ids), dtype=torch.float64)
    for place in places:
        with torch.no_grad():
            hidden = scorer.model.hidden(ids[:, :place])[:, -1]
            logits = scorer.model.logits(hidden)[:, codes.start : codes.stop]
        found *= logits.softmax(1).gather(1, ids[:, place, None] - codes.start)[:, 0]
    return found.numpy()


def test_probabilities_and_posterior_are_those_of_enumeration(
    scorer: SequenceScorer, classes: list[Document], pictures: list[Document]
) -> None:
    found = AutoregressiveClassifier(scorer, classes, "image_given_text").score(pictures)
    joint = np.stack([enumerate_pictures(scorer, text) for text in classes], axis=1)
    np.testing.assert_allclose(joint.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(np.exp(found.log_likelihoods.totals), joint, atol=1e-12)
    np.testing.assert_allclose(found.probabilities, joint / joint.sum(axis=1, keepdims=True), atol=1e-12)


def test_a_cached_prefix_gives_what_a_whole_forward_gives(
    scorer: SequenceScorer, classes: list[Document], pictures: list[Document]
) -> None:
    cached = AutoregressiveClassifier(scorer, classes, "text_given_image").score(pictures[:20])
    form = scorer.format
    rows = [ScoredSequence(*form.spell_continuation(image, text)) for image in pictures[:20] for text in classes]
    np.testing.assert_allclose(cached.scores.reshape(-1), scorer.score(rows).totals, atol=1e-12)


def test_probabilities_of_all_pictures_alone_sum_to_one(scorer: SequenceScorer, pictures: list[Document]) -> None:
    assert np.exp(score_images(scorer, pictures).totals).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [("image_given_text", {}), ("text_given_image", {"debias": 0.5, "length_normalise": True})],
)
def test_templates_and_variants_are_means_of_the_scores_of_each(
    scorer: SequenceScorer, pictures: list[Document], method: str, options: dict
) -> None:
    texts = [["ab", "abc"], ["c", "cc"], ["bca", "a"]]
    classes = [[Document([Text(one)]) for one in row] for row in texts]
    images = [pictures[start : start + 3] for start in range(0, 12, 3)]
    whole = AutoregressiveClassifier(scorer, classes, method, **options).score(images)
    parts = [
        AutoregressiveClassifier(scorer, [row[template] for row in classes], method, **options).score(
            [row[variant] for row in images]
        )
        for template in range(2)
        for variant in range(3)
    ]
    np.testing.assert_allclose(whole.scores, np.mean([part.scores for part in parts], axis=0), atol=1e-12)
    counts = np.sum([part.log_likelihoods.counts for part in parts], axis=0)
    np.testing.assert_array_equal(whole.log_likelihoods.counts, counts)


def test_what_is_read_before_a_picture_stands_before_all_its_variants(
    scorer: SequenceScorer, form: SequenceFormat, classes: list[Document], pictures: list[Document]
) -> None:
    before = [form.prefix([form.spell(Document([classes[row].parts[0], pictures[row].parts[0]]))]) for row in range(2)]
    classifier = AutoregressiveClassifier(scorer, classes, "image_given_text")
    whole = classifier.score([pictures[:2], pictures[2:4]], before)
    alone = classifier.score(pictures[:4], [before[0], before[0], before[1], before[1]])
    np.testing.assert_allclose(whole.scores, alone.scores.reshape(2, 2, 3).mean(axis=1), atol=1e-12)


def test_unequal_numbers_of_documents_are_refused(
    scorer: SequenceScorer, classes: list[Document], pictures: list[Document]
) -> None:
    with pytest.raises(ValueError, match=r"every class needs as many documents, .* some with \[1, 2\]"):
        AutoregressiveClassifier(scorer, [classes[0], classes[:2]], "image_given_text")
    classifier = AutoregressiveClassifier(scorer, classes, "image_given_text")
    with pytest.raises(ValueError, match=r"every picture needs as many documents, at least one; .* \[0\]"):
        classifier.score([[]])


def test_the_text_alone_is_what_debiasing_takes_off(scorer: SequenceScorer, classes: list[Document]) -> None:
    classifier = AutoregressiveClassifier(scorer, classes, "text_given_image", debias=1.0)
    np.testing.assert_allclose(classifier.priors[:, 0], score_texts(scorer, classes).totals, atol=1e-12)
