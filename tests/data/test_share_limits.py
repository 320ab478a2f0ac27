"""Shares of sources within factors of those that they have by their size."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.config import load_config
from mixmodal.data.mixture import ShareLimits, StageConfig, counters
from mixmodal.data.pipeline import DataConfig, PackedDocuments
from mixmodal.data.source import SourceConfig
from mixmodal.document import Run, build_format
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

ROOT = Path(__file__).parents[2]
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=2))
FORMAT = build_format("cm3leon", VOCABULARY, {"image": (2, 3)})
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, max_masks=0), VOCABULARY)
SIZES = {"large": 1000, "middle": 100, "small": 10}
EXPECTED = {"large": 780 / 1110, "middle": 300 / 1110, "small": 30 / 1110}
"""Of equal weights: the two smaller ones get three times their own, the other what is left."""


class Listed:
    """Documents of ten tokens in memory."""

    def __init__(self, count: int) -> None:
        self.keys = [f"doc{index}" for index in range(count)]
        self.lengths = np.full(count, 10)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> np.ndarray:
        return FORMAT.join([Run("text", VOCABULARY.to_ids("text", np.full(8, index % 30)))])


def stream(**options: Any) -> PackedDocuments:
    sources = {name: SourceConfig(tokens=Path(name), weight=2.0) for name in SIZES}
    config = DataConfig(sources=sources, seq_len=40, share_limits=ShareLimits(), **options)
    return PackedDocuments(
        {name: Listed(count) for name, count in SIZES.items()}, FORMAT, PLAIN, config, micro_batch_size=10
    )


def test_equal_weights_of_unequal_sources_stop_at_the_limits() -> None:
    shares = ShareLimits().apply(dict.fromkeys(SIZES, 2.0), SIZES)
    assert shares == pytest.approx(EXPECTED)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert "get {:.1%}, {:.1%} and {:.1%}".format(*shares.values()).replace("%", " %") in page


def test_weights_within_the_limits_are_kept() -> None:
    shares = ShareLimits().apply({"large": 6, "middle": 1, "small": 0}, SIZES)
    assert shares == pytest.approx({"large": 6 / 7, "middle": 1 / 7, "small": 0})


sized = st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 10**9)), min_size=1, max_size=6)


@given(sized=sized, up=st.floats(1, 10), down=st.floats(0, 1))
def test_shares_are_in_proportion_but_for_those_at_a_limit(
    sized: list[tuple[float, int]], up: float, down: float
) -> None:
    weights = {f"s{number}": weight for number, (weight, _) in enumerate(sized)}
    sizes = {f"s{number}": size for number, (_, size) in enumerate(sized)}
    shares = ShareLimits(up=up, down=down).apply(weights, sizes)
    assert sum(shares.values()) == pytest.approx(1)
    total = sum(sizes.values())
    factors = {name: share * total / sizes[name] for name, share in shares.items()}
    assert all(down * (1 - 1e-9) <= factor <= up * (1 + 1e-9) for factor in factors.values())
    scales = {name: share / weights[name] for name, share in shares.items()}
    for one in shares:
        for other in shares:
            if scales[one] > scales[other] * (1 + 1e-6):  # only where one can not fall, or the other can not rise
                is_bound = factors[one] <= down * (1 + 1e-6), factors[other] >= up * (1 - 1e-6)
                assert any(is_bound)


def test_a_stream_trains_within_the_limits() -> None:
    rows = stream()
    list(islice(rows, 60))
    found = counters(rows.state_dict())
    total = sum(found[f"tokens/{name}"] for name in SIZES)
    for name, share in EXPECTED.items():
        assert abs(found[f"tokens/{name}"] - share * total) < 40  # worst seen: 12


def test_limits_hold_in_stages_and_after_a_resumption() -> None:
    options: dict[str, Any] = {"stages": (StageConfig(from_step=4, weights={"large": 0.0}),)}
    whole = stream(**options)
    list(islice(whole, 7))
    state = whole.state_dict()
    assert state["weights"] == pytest.approx({"large": 0, "middle": 8 / 11, "small": 3 / 11})
    resumed = stream(**options)
    resumed.load_state_dict(state)
    for one, other in islice(zip(whole, resumed), 5):
        assert torch.equal(one.tokens, other.tokens)
        assert one.keys == other.keys


@pytest.mark.parametrize("limits", [{"up": 0.9}, {"down": 1.1}, {"down": -0.1}, {"up": float("inf")}])
def test_limits_that_leave_no_room_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^data\.share_limits: down is .*up is"):
        ShareLimits(**limits)


def test_limits_without_several_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="share_limits acts on several sources or modality_balance alone"):
        DataConfig(tokens=Path("a"), seq_len=40, share_limits=ShareLimits())


def test_the_sources_of_the_page_are_a_config(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```data\n(.*?)```", page, re.DOTALL)
    config = yaml.safe_load((ROOT / "configs" / "train" / "tiny.yaml").read_text()) | yaml.safe_load(block)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_config(PretrainConfig, tmp_path / "config.yaml").data.share_limits == ShareLimits()
