"""Scores against the training loss, against enumeration, and against themselves in other batches."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.classification.autoregressive import AutoregressiveClassifier
from mixmodal.classification.likelihoods import LogLikelihoods, ScoredSequence, SequenceScorer
from mixmodal.classification.result import Classification
from mixmodal.document import Document, Image, SequenceFormat, Text, build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.objectives.loss import token_losses
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CAPTIONS = ["a", "bcd", "efghij", "b"]


@pytest.fixture
def images() -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document([Image(rng.integers(0, 16, (2, 3)))]) for _ in range(5)]


@pytest.fixture
def classes() -> list[Document]:
    return [Document([Text(caption)]) for caption in CAPTIONS]


def sequences(form: SequenceFormat, images: list[Document], classes: list[Document]) -> list[ScoredSequence]:
    found = [form.spell_continuation(text, image) for image in images for text in classes]
    found += [form.spell_continuation(image, text) for image in images for text in classes]
    return [ScoredSequence(*one) for one in found]


def test_scores_equal_the_training_loss_times_its_tokens(
    form: SequenceFormat, model: Transformer, images: list[Document], classes: list[Document]
) -> None:
    rows = sequences(form, images, classes)
    found = SequenceScorer(model, form, batch_size=7).score(rows, restrict=False)
    expected, counts = [], []
    for row in rows:
        tokens = torch.from_numpy(row.ids)[None]
        weights = torch.from_numpy(row.scored)[None].float()
        with torch.no_grad():
            losses = token_losses(model(tokens), tokens, torch.ones_like(tokens), weights, form.vocabulary)
        expected.append(-float(losses.objective))
        counts.append(int(losses.weight))
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.totals, expected, atol=5e-5, rtol=0)  # worst seen 4e-6


def test_a_restricted_token_competes_with_its_own_range(form: SequenceFormat, model: Transformer, image: Image) -> None:
    ids, scored = form.spell_continuation(Document([image]), Document([Text("cab")]))
    found = SequenceScorer(model, form).score([ScoredSequence(ids, scored)])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None])[0].double()
    legal = [*form.vocabulary.ids("text"), form.vocabulary.eos]
    chosen = torch.full_like(logits, -torch.inf)
    chosen[:, legal] = logits[:, legal]
    expected = sum(chosen[place - 1].log_softmax(0)[ids[place]].item() for place in np.flatnonzero(scored))
    assert found.totals[0] == pytest.approx(expected, abs=1e-5)  # worst seen 2e-7
    assert found.counts.tolist() == [4]


@pytest.mark.parametrize("name", ["cm3leon", "chameleon"])
def test_probabilities_of_all_images_and_of_all_texts_sum_to_one(name: str, letters: Callable[[int], Any]) -> None:
    sizes = VocabularyConfig(codebook_sizes={"image": 3}, num_text_pieces=3, num_sentinels=2)
    form = build_format(name, Vocabulary(sizes), {"image": (2, 2)}, letters(3))
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=form.vocabulary.size, dim=16, num_layers=1, num_heads=2, ffn_dim=32, init_std=0.5
    )
    scorer, text = SequenceScorer(Transformer(config).eval(), form), Document([Text("ab")])
    pictures = [Document([Image(np.array(codes).reshape(2, 2))]) for codes in product(range(3), repeat=4)]
    rows = [ScoredSequence(*form.spell_continuation(text, picture)) for picture in pictures]
    assert np.exp(scorer.score(rows).totals).sum() == pytest.approx(1, abs=2e-6)  # worst seen 9e-8
    # a text either ends within two pieces, or its first two pieces are followed by a third one: all cases sum to one
    texts = ["".join(pieces) for length in (1, 2) for pieces in product("abc", repeat=length)]
    for any_end in (False, True):
        rows = [ScoredSequence(*form.spell_continuation(pictures[0], Document([Text(one)]))) for one in texts]
        ended = np.exp(scorer.score(rows, any_end=any_end).totals).sum()
        for row in rows:
            row.scored[-1] = False
        going_on = np.exp(scorer.score(rows[3:], any_end=any_end).totals).sum()
        started = np.exp(scorer.score(rows[:3], any_end=any_end).totals).sum()
        two_ended = np.exp(scorer.score(_ended(form, pictures[0], texts[3:]), any_end=any_end).totals).sum()
        one_ended = ended - two_ended
        assert one_ended + going_on == pytest.approx(started, abs=2e-6)  # worst seen 9e-8


def _ended(form: SequenceFormat, picture: Document, texts: list[str]) -> list[ScoredSequence]:
    return [ScoredSequence(*form.spell_continuation(picture, Document([Text(text)]))) for text in texts]


@pytest.mark.parametrize("restrict", [True, False])
def test_scores_do_not_depend_on_the_batch(
    form: SequenceFormat, model: Transformer, images: list[Document], classes: list[Document], restrict: bool
) -> None:
    rows = sequences(form, images, classes)
    alone = SequenceScorer(model, form, batch_size=1, chunk_tokens=3).score(rows, restrict)
    together = SequenceScorer(model, form, batch_size=64).score(rows[::-1], restrict)
    np.testing.assert_allclose(alone.totals, together.totals[::-1], atol=5e-5, rtol=0)  # worst seen 4e-6
    np.testing.assert_array_equal(alone.counts, together.counts[::-1])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("options", [{}, {"position": "learned"}])
def test_a_shared_picture_scores_as_a_picture_for_each_class(
    form: SequenceFormat,
    build_model: Callable[..., Transformer],
    images: list[Document],
    classes: list[Document],
    batch_size: int,
    options: dict[str, str],
) -> None:
    model = build_model(**options)
    scorer = SequenceScorer(model, form, batch_size=batch_size)
    found = AutoregressiveClassifier(scorer, classes, "text_given_image").score(images)
    rows = [ScoredSequence(*form.spell_continuation(image, text)) for image in images for text in classes]
    expected = SequenceScorer(model, form).score(rows)
    np.testing.assert_allclose(
        found.log_likelihoods.totals.reshape(-1), expected.totals, atol=5e-5, rtol=0
    )  # worst seen 5e-6
    np.testing.assert_array_equal(found.log_likelihoods.counts.reshape(-1), expected.counts)


def test_probabilities_are_the_posterior_under_equal_priors(
    form: SequenceFormat, model: Transformer, images: list[Document], classes: list[Document]
) -> None:
    found = AutoregressiveClassifier(SequenceScorer(model, form), classes, "image_given_text").score(images)
    joint = np.exp(found.log_likelihoods.totals)
    np.testing.assert_allclose(found.probabilities, joint / joint.sum(axis=1, keepdims=True), rtol=1e-9)
    assert (found.log_likelihoods.counts == 6).all()


def test_debiasing_takes_alpha_times_the_text_alone_and_normalising_divides_by_tokens(
    form: SequenceFormat, model: Transformer, images: list[Document], classes: list[Document]
) -> None:
    scorer = SequenceScorer(model, form)
    plain = AutoregressiveClassifier(scorer, classes, "text_given_image").score(images)
    both = AutoregressiveClassifier(scorer, classes, "text_given_image", debias=0.5, length_normalise=True)
    texts = [ScoredSequence(*form.spell_continuation(Document([]), text)) for text in classes]
    np.testing.assert_allclose(both.priors[:, 0], scorer.score(texts, any_end=True).totals)
    counts = np.array([len(caption) + 1 for caption in CAPTIONS])
    np.testing.assert_allclose(both.score(images).scores, (plain.scores - 0.5 * both.priors[:, 0]) / counts)


def test_equal_classes_are_counted_as_tied(form: SequenceFormat, model: Transformer, images: list[Document]) -> None:
    classes = [Document([Text(text)]) for text in ("bad", "bad", "bad")]
    for method in ("image_given_text", "text_given_image"):
        assert AutoregressiveClassifier(SequenceScorer(model, form), classes, method).score(images).tied.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "'guess' is unknown; choose image_given_text"),
        ({"method": "image_given_text", "debias": 1.0}, "can not act on image_given_text"),
    ],
)
def test_what_can_not_act_is_refused(
    form: SequenceFormat, model: Transformer, classes: list[Document], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoregressiveClassifier(SequenceScorer(model, form), classes, **options)


def test_a_sequence_beyond_the_context_is_refused(
    form: SequenceFormat, build_model: Callable[..., Transformer], images: list[Document]
) -> None:
    classes = [Document([Text(text)]) for text in ("a", "abcdefghij")]
    for method in ("image_given_text", "text_given_image"):
        with pytest.raises(ValueError, match="does not fit into the model's context of 12"):
            AutoregressiveClassifier(SequenceScorer(build_model(max_seq_len=12), form), classes, method).score(images)


def test_the_text_alone_ends_with_any_token_that_can_end_it(form: SequenceFormat, model: Transformer) -> None:
    ids, scored = form.spell_continuation(Document([]), Document([Text("ab")]))
    found = SequenceScorer(model, form).score([ScoredSequence(ids, scored)], any_end=True)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None])[0].double()
    ends = [form.vocabulary.eos, form.vocabulary.break_]
    expected = 0.0
    for place in (1, 2, 3):
        legal = logits[place - 1, [*form.vocabulary.ids("text"), *ends]]
        wanted = logits[place - 1, [int(ids[place])] if place < 3 else ends]
        expected += (wanted.logsumexp(0) - legal.logsumexp(0)).item()
    assert found.totals[0] == pytest.approx(expected, abs=1e-5)  # worst seen 3e-7


def test_scores_within_rounding_are_tied() -> None:
    scores = np.array([[-5.0, -5.0000001, -5.01], [-1.0, -2.0, -3.0]])
    found = Classification(scores, scores, LogLikelihoods(scores, scores))
    assert found.tied.tolist() == [[True, True, False], [True, False, False]]
