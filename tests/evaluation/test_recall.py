"""Recall of retrieval and its level of chance."""

import math

import pytest
import torch
import torch.nn.functional as F

from mixmodal.evaluation.recall import chance_at, recall_at


def test_recall_counts_queries_whose_own_stands_among_the_first() -> None:
    candidates = torch.eye(4)
    queries = F.normalize(
        torch.tensor([[9.0, 1, 2, 3], [9.0, 8, 2, 3], [9.0, 8, 1, 7], [9.0, 8, 7, 1]]), dim=-1
    )  # own are first, second, fourth and fourth
    ids = torch.arange(4)
    assert recall_at(queries, candidates, ids, ids, (1, 2, 3, 4)) == [0.25, 0.5, 0.5, 1.0]


def test_any_candidate_with_the_id_of_the_query_is_its_own() -> None:
    candidates = torch.eye(3)
    query = F.normalize(torch.tensor([[1.0, 2, 3]]), dim=-1)
    assert recall_at(query, candidates, torch.tensor([7]), torch.tensor([7, 8, 7]), (1,)) == [1.0]
    assert recall_at(query, candidates, torch.tensor([7]), torch.tensor([7, 8, 9]), (1,)) == [0.0]


def test_features_that_are_all_alike_find_nothing() -> None:
    same = F.normalize(torch.ones(6, 4), dim=-1)
    ids = torch.arange(6)
    assert recall_at(same, same, ids, ids, (1, 5, 6)) == [0.0, 0.0, 1.0]


def test_chance_is_the_share_of_random_orders() -> None:
    assert chance_at(range(10), range(10), (1, 5)) == pytest.approx([0.1, 0.5])
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    trials = []
    for _ in range(500):
        queries, candidates = (F.normalize(torch.randn(8, 16, generator=generator), dim=-1) for _ in range(2))
        trials.append(torch.tensor(recall_at(queries, candidates, ids, ids, (1, 3))))
    seen = torch.stack(trials).mean(0).tolist()
    assert chance_at(ids.tolist(), ids.tolist(), (1, 3)) == pytest.approx(seen, abs=0.03)  # standard error 0.008
    assert chance_at([0], [0, 1], (5,)) == [1.0]
    assert math.isclose(chance_at([0], [0, 0, 1], (1,))[0], 2 / 3)
