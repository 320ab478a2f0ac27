"""The benchmark of modality balance: what it trains on and what it asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mixmodal.data.balance import modalities_of
from mixmodal.data.token_shards import TokenShards

Load = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(load: Load) -> ModuleType:
    return load("modality_balance")


def test_two_answers_of_a_hundred_are_pictures(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_tokens(tmp_path / "tokens", 300, seed=0)
    found = modalities_of(TokenShards(tmp_path / "tokens"))
    assert np.bincount(found).tolist() == [0, 294, 6]


@pytest.mark.slow
def test_requests_are_judged_by_how_their_answers_begin(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_tokens(tmp_path / "tokens", 200, seed=0)
    export = benchmark.train(tmp_path, "on", 60, 0)
    shares = [benchmark.share_right(export, kind, 40, 0) for kind in benchmark.VERBS]
    assert all(0 <= share <= 100 for share in shares)
    assert max(shares) > 90  # it answers in one modality at least; seen: 100
