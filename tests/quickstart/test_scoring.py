"""Scoring of samples: what counts as the right picture, the right caption, the right class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixmodal.evaluation.concepts import nearest_pictures, rate
from mixmodal.quickstart.scoring import (
    Label,
    confusion_by_category,
    draw_candidates,
    top_confusions,
)


def label(concept: str, style: str = "flat", category: str = "Food", heldout: bool = False) -> Label:
    return Label(f"{concept}-{style}", concept, style, category, f"{concept}, {style} style", heldout)


def test_a_demo_picture_is_nearest_to_itself_among_all() -> None:
    generator = torch.Generator().manual_seed(0)
    demo = torch.rand(20, 3, 8, 8, generator=generator) * 2 - 1
    noisy = (demo + 0.05 * torch.randn(demo.shape, generator=generator)).clamp(-1, 1)
    assert nearest_pictures(noisy, demo).indices.tolist() == list(range(20))


def test_distance_is_the_root_mean_square_of_rgb_values_between_0_and_1() -> None:
    white, black = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    assert nearest_pictures(white, black).distances.item() == pytest.approx(1)
    grey = nearest_pictures(white, torch.zeros(1, 3, 4, 4)).distances.item()
    assert grey == pytest.approx(0.5)


def test_values_beyond_the_range_count_as_the_picture_shows_them() -> None:
    assert nearest_pictures(3 * torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).distances.item() == 0


def test_unequal_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="can not be compared"):
        nearest_pictures(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))


def test_candidates_are_other_concepts_in_the_same_style() -> None:
    labels = [label(f"c{i}", style) for i in range(15) for style in ("flat", "outline")]
    drawn = draw_candidates(labels, 4, 9, np.random.default_rng(0))
    assert drawn[0] == 4
    assert len({labels[i].concept for i in drawn}) == 10
    assert {labels[i].style for i in drawn} == {"flat"}
    assert drawn == draw_candidates(labels, 4, 9, np.random.default_rng(0))
    assert drawn != draw_candidates(labels, 4, 9, np.random.default_rng(1))


def test_two_pictures_of_a_concept_are_one_candidate() -> None:
    labels = [label("a"), label("b"), label("b"), label("c")]
    assert sorted(labels[i].concept for i in draw_candidates(labels, 0, 2, np.random.default_rng(0))) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 other concepts"):
        draw_candidates(labels, 0, 3, np.random.default_rng(0))


def test_rates_keep_their_count() -> None:
    assert rate([True, False, True, True]) == (3, 4)
    assert rate([True, False]).share == 0.5
    assert math.isnan(rate([]).share)


def test_confusion_counts_true_rows_and_chosen_columns() -> None:
    apple, dog, cat = label("apple"), label("dog", category="Animals"), label("cat", category="Animals")
    confusion = confusion_by_category([apple, dog, dog], [dog, dog, cat])
    assert confusion.names == ["Animals", "Food"]
    assert confusion.counts.tolist() == [[2, 0], [1, 0]]
    assert top_confusions([apple, dog, dog, dog], [dog, dog, cat, cat], 1) == [("dog", "cat", 2)]
