"""Loss weights by modality."""

from __future__ import annotations

import pytest
import torch

from mixmodal.objectives.modality_weights import check_modality_weights, weigh_modalities
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=9, num_sentinels=2))
TOKENS = torch.tensor(
    [[VOCABULARY.bos, VOCABULARY.ids("text").start, VOCABULARY.break_, VOCABULARY.ids("image").stop - 1]]
)
WEIGHTS = torch.tensor([[0.0, 1.0, 0.5, 2.0]])


def test_each_token_has_the_factor_of_its_modality() -> None:
    found = weigh_modalities(WEIGHTS, TOKENS, {"text": 3.0, "control": 0.0}, VOCABULARY)
    assert found.tolist() == [[0.0, 3.0, 0.0, 2.0]]
    assert WEIGHTS.tolist() == [[0.0, 1.0, 0.5, 2.0]]  # untouched
    assert weigh_modalities(WEIGHTS, TOKENS, {"image": 0.25}, VOCABULARY).tolist() == [[0.0, 1.0, 0.5, 0.5]]


def test_no_factors_change_nothing() -> None:
    assert weigh_modalities(WEIGHTS, TOKENS, {}, VOCABULARY) is WEIGHTS


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        ({"audio": 1.0}, r"modality_weights\.audio: the vocabulary has no such modality; it has text, image, control"),
        ({"image": -0.5}, r"modality_weights\.image is -0\.5"),
        ({"text": float("nan")}, r"modality_weights\.text is nan"),
    ],
)
def test_factors_that_can_not_act_are_refused(factors: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_modality_weights(factors, VOCABULARY)
