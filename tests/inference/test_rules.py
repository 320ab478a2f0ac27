"""Each rule against its formula, and against the processor of the same name in transformers."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from mixmodal.sampling.rules import (
    TokenSampling,
    apply_temperature,
    build_rules,
    draw,
    draw_uniforms,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

LOGITS = torch.tensor([[0.1, 2.0, 1.0, -1.0], [3.0, 3.0, 0.0, -torch.inf]])


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    library = pytest.importorskip("transformers")
    assert library.LlamaForCausalLM  # what takes long to import is read before tests begin
    return library


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def draw_logits(scale: float = 3.0) -> torch.Tensor:
    """Rows of 60 logits of which some can not be drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 60, generator=generator) * scale
    return logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.2, -torch.inf)


def test_temperature_divides_the_logits() -> None:
    torch.testing.assert_close(apply_temperature(LOGITS, 2.0), LOGITS / 2)


def test_temperature_zero_keeps_the_first_largest() -> None:
    assert kept(apply_temperature(LOGITS, 0.0)) == [[1], [0]]


@pytest.mark.parametrize(
    ("top_k", "left"), [(1, [[1], [0, 1]]), (2, [[1, 2], [0, 1]]), (3, [[0, 1, 2], [0, 1, 2]]), (9, kept(LOGITS))]
)
def test_top_k_keeps_the_k_likeliest_and_ties(top_k: int, left: list[list[int]]) -> None:
    assert kept(keep_top_k(LOGITS, top_k)) == left


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.65, 0.9, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    probabilities = LOGITS[0].double().softmax(0).numpy()
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    assert kept(keep_top_p(LOGITS, top_p))[0] == sorted(order[:count].tolist())


@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_min_p_keeps_a_share_of_the_likeliest(min_p: float) -> None:
    shares = (LOGITS.double() - LOGITS.double().amax(dim=1, keepdim=True)).exp()
    expected = [row.nonzero()[:, 0].tolist() for row in (shares >= min_p) & LOGITS.isfinite()]
    assert kept(keep_min_p(LOGITS, min_p)) == expected


def test_the_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign() -> None:
    seen = torch.tensor([[False, True, False, True], [True, False, True, True]])
    expected = [[0.1, 1.0, 1.0, -2.0], [1.5, 3.0, 0.0, -torch.inf]]
    assert penalise_repetition(LOGITS[:, :4], seen, 2.0).tolist() == torch.tensor(expected).tolist()


def test_rules_apply_in_order() -> None:
    settings, logits = TokenSampling(temperature=0.5, top_k=20, top_p=0.9, min_p=0.05), draw_logits()
    expected = keep_min_p(keep_top_p(keep_top_k(apply_temperature(logits, 0.5), 20), 0.9), 0.05)
    for rule in build_rules(settings):
        logits = rule(logits)
    assert logits.tolist() == expected.tolist()


def test_rules_that_would_change_nothing_are_left_out() -> None:
    assert build_rules(TokenSampling()) == []
    assert len(build_rules(TokenSampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1))) == 1
    assert len(build_rules(TokenSampling(top_k=5, min_p=0.1))) == 2


@pytest.mark.parametrize(
    ("name", "value", "rule", "tied"),
    [
        ("TemperatureLogitsWarper", 0.7, apply_temperature, True),
        ("TemperatureLogitsWarper", 1.9, apply_temperature, True),
        ("TopKLogitsWarper", 1, keep_top_k, True),
        ("TopKLogitsWarper", 7, keep_top_k, True),
        ("TopKLogitsWarper", 100, keep_top_k, True),
        ("TopPLogitsWarper", 0.1, keep_top_p, False),  # of tied tokens transformers keeps any
        ("TopPLogitsWarper", 0.8, keep_top_p, False),
        ("TopPLogitsWarper", 0.999, keep_top_p, False),
        ("MinPLogitsWarper", 0.02, keep_min_p, True),
        ("MinPLogitsWarper", 0.5, keep_min_p, True),
    ],
)
def test_a_rule_equals_the_processor_of_transformers(
    transformers: ModuleType, name: str, value: float, rule: Callable[[torch.Tensor, float], torch.Tensor], tied: bool
) -> None:
    for logits in (draw_logits(), draw_logits(0.5), *([draw_logits().round()] if tied else [])):
        expected = getattr(transformers, name)(value)(None, logits)
        assert rule(logits, value).tolist() == expected.tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_equals_that_of_transformers(transformers: ModuleType, penalty: float) -> None:
    ids = torch.randint(60, (40, 15), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(40, 60, dtype=torch.bool).scatter_(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, draw_logits())
    assert penalise_repetition(draw_logits(), seen, penalty).tolist() == expected.tolist()


def test_all_rules_together_equal_the_scores_of_transformers(transformers: ModuleType) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=60, initializer_range=1.0, **sizes)
    ).eval()
    settings = {"temperature": 0.7, "top_k": 25, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.3}
    prompt = torch.randint(3, 60, (8, 5))
    more = {"do_sample": True, "max_new_tokens": 6, "return_dict_in_generate": True, "pad_token_id": 0}
    found = model.generate(prompt, **settings, **more, output_scores=True, output_logits=True)
    assert len(found.scores) == 6
    for step, (logits, scores) in enumerate(zip(found.logits, found.scores)):
        seen = torch.zeros(8, 60, dtype=torch.bool).scatter_(1, found.sequences[:, : 5 + step], True)
        logits = penalise_repetition(logits, seen, 1.3)
        for rule in build_rules(TokenSampling(**settings)):
            logits = rule(logits)
        assert logits.tolist() == scores.tolist()


def test_draws_follow_the_softmax_and_never_take_what_is_struck_out() -> None:
    uniforms = torch.arange(10000, dtype=torch.float64) / 10000
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    counts = draw(logits.expand(10000, -1), uniforms).bincount(minlength=6)
    torch.testing.assert_close(counts / 10000, logits.softmax(0), atol=2e-4, rtol=0)  # worst seen 7e-5
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert draw(logits[None], torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 4


def test_uniforms_depend_on_the_seed_and_the_step_alone() -> None:
    long, short, other = draw_uniforms([5, 1], 40), draw_uniforms([5, 1], 7), draw_uniforms(3, 40)
    assert long[:7].tolist() == short.tolist()
    assert long.tolist() != other.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenSampling(**options)
