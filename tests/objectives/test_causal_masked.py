"""CM3: what moves, what is weighed, and the way back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.document import Run, SequenceError, build_format
from mixmodal.objectives.causal_masked import TOKENS_PER_MASK, CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))
FORMATS = ("cm3leon", "chameleon")  # those whose pictures have one grid
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 3)}) for name in FORMATS}
T = VOCABULARY.ids("text").start
MASK = VOCABULARY.sentinel(0)
every_format = pytest.mark.parametrize("name", FORMATS)

text_runs = st.lists(st.integers(0, 29), min_size=1, max_size=12).map(
    lambda pieces: Run("text", VOCABULARY.to_ids("text", np.array(pieces)))
)
image_runs = st.lists(st.integers(0, 7), min_size=6, max_size=6).map(
    lambda codes: Run("image", VOCABULARY.to_ids("image", np.array(codes)))
)
mask_runs = st.integers(0, 4).map(lambda index: Run("text", np.array([VOCABULARY.sentinel(index)])))
seeds = st.integers(0, 2**32 - 1)


def masked(min_masks: int = 1, max_masks: int = 16, poisson_rate: float = 1.0) -> CausalMasked:
    config = CausalMaskedConfig(min_masks=min_masks, max_masks=max_masks, poisson_rate=poisson_rate)
    return CausalMasked(config, VOCABULARY)


def num_masks(ids: np.ndarray) -> int:
    return int(VOCABULARY.contains("sentinel", ids).sum()) // 2


def text_document(length: int) -> np.ndarray:
    return FORMAT["cm3leon"].join([Run("text", T + np.arange(length) % 30)])


def pair(name: str, length: int = 10) -> np.ndarray:
    return FORMAT[name].join([Run("text", T + np.arange(length)), Run("image", np.arange(4, 10))])


@every_format
@given(runs=st.lists(text_runs | image_runs | mask_runs, max_size=5), seed=seeds, rate=st.floats(0, 20))
def test_restoring_is_the_exact_inverse(name: str, runs: list[Run], seed: int, rate: float) -> None:
    ids = FORMAT[name].join(runs)
    objective = masked(min_masks=0, poisson_rate=rate)
    out, weights = objective.apply(ids, np.random.default_rng(seed))
    assert np.array_equal(objective.restore(out), ids)
    assert out.dtype == np.int64
    assert (weights.dtype, weights.shape) == (np.float32, out.shape)


@every_format
@given(runs=st.lists(text_runs | image_runs | mask_runs, max_size=5), seed=seeds, rate=st.floats(0, 20))
def test_each_token_is_learned_in_exactly_one_place(name: str, runs: list[Run], seed: int, rate: float) -> None:
    ids = FORMAT[name].join(runs)
    out, weights = masked(poisson_rate=rate).apply(ids, np.random.default_rng(seed))
    assert set(weights.tolist()) <= {0.0, 1.0}
    added = (len(out) - len(ids)) // TOKENS_PER_MASK
    expected = Counter(ids[1:][~VOCABULARY.contains("sentinel", ids[1:])].tolist())
    expected[VOCABULARY.end_of_span] += added
    assert Counter(out[weights == 1].tolist()) == +expected


@every_format
@given(runs=st.lists(text_runs | image_runs, min_size=1, max_size=5), seed=seeds)
def test_spans_are_content_of_one_stretch_in_order_and_apart(name: str, runs: list[Run], seed: int) -> None:
    ids = FORMAT[name].join(runs)
    spans = masked(min_masks=3).draw_spans(ids, np.random.default_rng(seed))
    assert len(spans) >= 3 or len(spans) == VOCABULARY.is_content(ids).sum()
    last = 0
    for start, stop in spans:
        assert last <= start < stop
        assert VOCABULARY.is_content(ids[start:stop]).all()
        assert len({VOCABULARY.contains("text", token) for token in ids[start:stop].tolist()}) == 1
        last = stop


def test_the_layout_is_the_paper_s() -> None:
    ids = text_document(6)
    t = [T + i for i in range(6)]
    m0, m1, end = VOCABULARY.sentinel(0), VOCABULARY.sentinel(1), VOCABULARY.end_of_span
    objective = masked()
    for spans, expected in (
        ([(3, 6)], [0, t[0], t[1], m0, t[5], m0, t[2], t[3], t[4], end, 2]),
        ([(1, 2), (2, 7)], [0, m0, m1, m0, t[0], end, m1, *t[1:], end, 2]),
    ):
        objective.draw_spans = lambda *_, spans=spans: spans  # type: ignore[method-assign]
        out, weights = objective.apply(ids, np.random.default_rng(0))
        assert out.tolist() == expected
        assert weights.tolist() == [0.0 if token in (0, m0, m1) else 1.0 for token in expected]


def test_number_of_masks_is_a_clamped_poisson() -> None:
    rng, draws = np.random.default_rng(0), 4000
    ids = text_document(60)
    for config, shares in (
        ({"min_masks": 1}, {0: 0.0, 1: 0.7358, 2: 0.1839}),  # e^-1 (1 + 1), e^-1 / 2
        ({"min_masks": 0}, {0: 0.3679, 1: 0.3679, 2: 0.1839}),
        ({"min_masks": 0, "max_masks": 2}, {0: 0.3679, 1: 0.3679, 2: 0.2642}),
        ({"min_masks": 2, "poisson_rate": 0.0}, {2: 1.0}),
    ):
        objective = masked(**config)  # type: ignore[arg-type]
        found = Counter(len(objective.draw_spans(ids, rng)) for _ in range(draws))
        for count, share in shares.items():
            assert found[count] / draws == pytest.approx(share, abs=0.03)  # 4 standard deviations; measured 0.008


def test_all_placements_in_a_stretch_are_equally_likely() -> None:
    rng, draws = np.random.default_rng(0), 6000
    objective = masked(min_masks=2, max_masks=2)
    found = Counter(tuple(objective.draw_spans(text_document(4), rng)) for _ in range(draws))
    everything = {
        ((a, b), (c, d)) for a in range(1, 5) for b in range(a + 1, 6) for c in range(b, 5) for d in range(c + 1, 6)
    }
    assert set(found) == everything
    assert len(everything) == 15
    for count in found.values():
        assert count / draws == pytest.approx(1 / 15, abs=0.013)  # 4 standard deviations; measured 0.008


def test_a_stretch_is_chosen_by_its_length() -> None:
    rng, draws = np.random.default_rng(0), 3000
    objective = masked(max_masks=1)
    in_text = sum(objective.draw_spans(pair("cm3leon", 12), rng)[0][0] < 13 for _ in range(draws))
    assert in_text / draws == pytest.approx(12 / 18, abs=0.035)  # 4 standard deviations; measured 0.008


def test_the_same_generator_state_gives_the_same_masks() -> None:
    ids, objective = text_document(50), masked()
    first, second = (objective.apply(ids, np.random.default_rng(7))[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert any(not np.array_equal(first, objective.apply(ids, np.random.default_rng(s))[0]) for s in range(5))


def test_without_masks_documents_stay_plain() -> None:
    ids = pair("cm3leon")
    out, weights = masked(min_masks=0, poisson_rate=0).apply(ids, np.random.default_rng(0))
    assert np.array_equal(out, ids)
    assert weights.tolist() == [0.0] + [1.0] * (len(ids) - 1)


def test_masks_are_left_out_where_they_do_not_fit() -> None:
    ids, rng = text_document(30), np.random.default_rng(0)
    objective = masked(min_masks=5, max_masks=5)
    for room, count in ((0, 0), (2, 0), (3, 1), (14, 4), (15, 5), (99, 5)):
        out, _ = objective.apply(ids, rng, max_len=len(ids) + room)
        assert num_masks(out) == count


def test_masks_that_stand_in_a_document_keep_their_meaning() -> None:
    infill = np.concatenate([[0], T + np.arange(8), [VOCABULARY.sentinel(3)], T + np.arange(8), [2]])
    out, weights = masked(min_masks=2).apply(infill, np.random.default_rng(0))
    assert (out == VOCABULARY.sentinel(3)).sum() == 1
    assert weights[out == VOCABULARY.sentinel(3)] == 0
    assert VOCABULARY.sentinel(4) in out
    assert VOCABULARY.sentinel(0) not in out


def test_a_document_that_uses_the_last_sentinel_gets_no_masks() -> None:
    ids = np.concatenate([[0], T + np.arange(8), [VOCABULARY.sentinel(19), 2]])
    assert np.array_equal(masked().apply(ids, np.random.default_rng(0))[0], ids)


# the defects of metaseq's code, one test each


@given(seed=seeds)
def test_metaseq_1_no_mask_drawn_is_a_plain_document(seed: int) -> None:
    objective = masked(min_masks=0, poisson_rate=0.5)
    out, _ = objective.apply(pair("cm3leon"), np.random.default_rng(seed))
    assert np.array_equal(objective.restore(out), pair("cm3leon"))


@pytest.mark.parametrize("runs", [[], [Run("text", np.array([T]))], [Run("image", np.arange(4, 10))]])
@every_format
def test_metaseq_2_documents_with_one_or_no_stretch_work(name: str, runs: list[Run]) -> None:
    ids, objective = FORMAT[name].join(runs), masked()
    out, _ = objective.apply(ids, np.random.default_rng(0))
    assert num_masks(out) == (1 if runs else 0) or len(ids) > 3
    assert np.array_equal(objective.restore(out), ids)


@given(seed=seeds, length=st.integers(1, 20))
def test_metaseq_3_many_masks_lose_no_token_and_none_is_empty(seed: int, length: int) -> None:
    ids, objective = text_document(length), masked(min_masks=16)
    out, _ = objective.apply(ids, np.random.default_rng(seed))
    assert num_masks(out) == min(length, 16)
    assert np.array_equal(objective.restore(out), ids)
    follows_sentinel = VOCABULARY.contains("sentinel", out[:-1]) & (out[1:] == VOCABULARY.end_of_span)
    assert not follows_sentinel.any()


@given(seed=seeds)
def test_metaseq_4_nothing_is_cut_to_a_length(seed: int) -> None:
    ids = text_document(40)
    out, _ = masked(min_masks=4).apply(ids, np.random.default_rng(seed), max_len=64)
    assert len(out) == len(ids) + TOKENS_PER_MASK * num_masks(out) <= 64
    assert out[-2:].tolist() == [VOCABULARY.end_of_span, VOCABULARY.eos]


def test_metaseq_5_more_than_one_document_is_refused() -> None:
    two = np.concatenate([text_document(4), text_document(4)])
    spans = masked(min_masks=8).draw_spans(two, np.random.default_rng(0))
    assert all(VOCABULARY.is_content(two[start:stop]).all() for start, stop in spans)
    for part in (two[1:], two[:-1], two[:0]):
        with pytest.raises(SequenceError, match="whole document"):
            masked().apply(part, np.random.default_rng(0))


@every_format
@given(seed=seeds)
def test_metaseq_6_no_span_crosses_a_break_or_an_end_of_image(name: str, seed: int) -> None:
    ids = pair(name)
    out, _ = masked(min_masks=4).apply(ids, np.random.default_rng(seed))
    spans = masked(min_masks=4).draw_spans(ids, np.random.default_rng(seed))
    controls = np.flatnonzero(~VOCABULARY.is_content(ids)).tolist()
    assert not any(start <= control < stop for start, stop in spans for control in controls)
    assert (out == VOCABULARY.break_).sum() == 1
    # A picture begins with its first code or with the mask in its place, never in its middle.
    follower = int(out[np.argmax(out == VOCABULARY.break_) + 1])
    assert follower == 4 or VOCABULARY.contains("sentinel", follower)


# metaseq's defect 7, packing without isolation, is tested in tests/data/test_packing.py


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([0, T, MASK, T, VOCABULARY.end_of_span, 2], id="no place"),
        pytest.param([0, MASK, MASK, T, MASK, T, VOCABULARY.end_of_span, 2], id="two places"),
        pytest.param([0, T], id="no end"),
        pytest.param([], id="empty"),
    ],
)
def test_spans_without_one_place_are_refused(ids: list[int]) -> None:
    with pytest.raises(SequenceError):
        masked().restore(np.array(ids, dtype=np.int64))


def test_a_span_that_a_model_left_empty_goes_back_as_nothing() -> None:
    ids = np.array([0, T, VOCABULARY.sentinel(0), T + 1, VOCABULARY.sentinel(0), VOCABULARY.end_of_span, 2])
    assert masked().restore(ids).tolist() == [0, T, T + 1, 2]


@pytest.mark.parametrize(
    "config", [{"min_masks": -1}, {"min_masks": 3, "max_masks": 2}, {"poisson_rate": -0.5}, {"max_masks": 21}]
)
def test_impossible_settings_are_refused(config: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="objective"):
        masked(**config)  # type: ignore[arg-type]
