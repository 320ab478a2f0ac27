"""Recall of retrieval: how often what belongs to a query stands among the first k candidates, and what chance gives.

Shape suffixes: Q queries, C candidates, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUERIES_AT_A_TIME = 1024


def recall_at(
    queries_QD: Tensor, candidates_CD: Tensor, query_ids_Q: Tensor, candidate_ids_C: Tensor, ks: Sequence[int]
) -> list[float]:
    """Share of the queries that find one of their own among the first k candidates, for each k.

    A candidate is a query's own where their ids are the same. Candidates that are as similar as the best of its own
    count as standing before it: features that are all alike find nothing.

    Args:
        queries_QD: features of length 1.
        candidates_CD: features of length 1.
        query_ids_Q: int64.
        candidate_ids_C: int64; every query's id is among them.
        ks: numbers of candidates.
    """
    found = torch.zeros(len(ks), dtype=torch.float64)
    for part, ids in zip(queries_QD.split(QUERIES_AT_A_TIME), query_ids_Q.split(QUERIES_AT_A_TIME), strict=True):
        similar = part.double() @ candidates_CD.double().T
        own = ids[:, None] == candidate_ids_C[None, :]
        best = similar.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        before = ((similar >= best) & ~own).sum(1)
        found += torch.stack([(before < k).sum() for k in ks]).cpu().double()
    return (found / len(queries_QD)).tolist()


def chance_at(query_ids: Sequence[int], candidate_ids: Sequence[int], ks: Sequence[int]) -> list[float]:
    """What `recall_at` comes to in the mean where candidates stand in a random order, for each k."""
    counts: dict[int, int] = {}
    for number in candidate_ids:
        counts[number] = counts.get(number, 0) + 1
    size = len(candidate_ids)
    sums = [0.0] * len(ks)
    for number in query_ids:
        for place, k in enumerate(ks):
            sums[place] += 1 - math.comb(size - counts[number], min(k, size)) / math.comb(size, min(k, size))
    return [total / len(query_ids) for total in sums]
