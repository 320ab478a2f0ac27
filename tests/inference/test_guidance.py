"""Each rule against its formula."""

import numpy as np
import pytest
import torch

from mixmodal.sampling.guidance import (
    TokenSampling,
    apply_temperature,
    build_rules,
    draw,
    draw_uniforms,
    guide,
    keep_top_k,
    keep_top_p,
)

LOGITS = torch.tensor([[0.1, 2.0, 1.0, -1.0], [3.0, 3.0, 0.0, -torch.inf]])


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_guidance_moves_from_unconditional_to_conditional_and_beyond() -> None:
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert guide(conditional, unconditional, 0.0).tolist() == [[3.0, 5.0]]
    assert guide(conditional, unconditional, 1.0).tolist() == [[1.0, 2.0]]
    assert guide(conditional, unconditional, 3.0).tolist() == [[-3.0, -4.0]]


def test_temperature_divides_each_row_by_its_own() -> None:
    scaled = apply_temperature(LOGITS, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(scaled, torch.stack((LOGITS[0] / 2, LOGITS[1] * 2)))


def test_temperature_zero_keeps_the_first_largest() -> None:
    assert kept(apply_temperature(LOGITS, torch.tensor([0.0, 0.0]))) == [[1], [0]]


@pytest.mark.parametrize(("top_k", "left"), [([1, 1], [[1], [0, 1]]), ([2, 3], [[1, 2], [0, 1, 2]]), ([0, 9], "all")])
def test_top_k_keeps_the_k_likeliest_and_ties(top_k: list[int], left: object) -> None:
    found = kept(keep_top_k(LOGITS, torch.tensor(top_k), max(top_k)))
    assert found == (left if left != "all" else kept(LOGITS))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.65, 0.9, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    probabilities = LOGITS[0].double().softmax(0).numpy()
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    rows = keep_top_p(LOGITS, torch.tensor([top_p, 1.0]))
    assert kept(rows) == [sorted(order[:count].tolist()), kept(LOGITS)[1]]


def test_rules_apply_in_order_with_the_settings_of_each_rows_modality() -> None:
    settings = {"text": TokenSampling(temperature=0.5, top_k=3), "image": TokenSampling(top_p=0.5)}
    rows = LOGITS[:1].repeat(2, 1)
    text, image = rows[:1], rows[1:]
    for rule in build_rules(settings, ("text", "image")):
        rows = rule(rows, torch.tensor([0, 1]))
    expected = keep_top_k(apply_temperature(text, torch.tensor([0.5])), torch.tensor([3]), 3)
    torch.testing.assert_close(rows[:1], expected)
    torch.testing.assert_close(rows[1:], keep_top_p(image, torch.tensor([0.5])))
    assert build_rules({}, ("text", "image")) == []


def test_draws_follow_the_softmax_and_never_take_what_is_struck_out() -> None:
    uniforms = torch.arange(10000, dtype=torch.float64) / 10000
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    counts = draw(logits.expand(10000, -1), uniforms).bincount(minlength=6)
    torch.testing.assert_close(counts / 10000, logits.softmax(0), atol=2e-4, rtol=0)  # worst seen 7e-5
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert draw(logits[None], torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 4


def test_uniforms_depend_on_the_seed_and_the_step_alone() -> None:
    together, alone = draw_uniforms([3, [5, 1]], 40), draw_uniforms([[5, 1]], 7)
    assert together[1, :7].tolist() == alone[0].tolist()
    assert together[0].tolist() != together[1].tolist()


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenSampling(**options)


def test_settings_of_an_unknown_modality_are_refused() -> None:
    with pytest.raises(ValueError, match="settings for sound; the model has text, image"):
        build_rules({"sound": TokenSampling()}, ("text", "image"))
