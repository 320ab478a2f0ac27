"""Losses of preferences: equal to what each document's own log-softmax gives, with its gradient, in packed rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mixmodal.objectives.preference import Pairs, PreferenceConfig, PreferenceLoss
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=9, num_sentinels=2))
V, D = VOCABULARY.size, 6
LENGTHS = [[5, 4, 3, 6], [7, 4]]  # of the documents of two rows of 20
ANSWERS = [[2, 1, 2, 3], [4, 1]]  # tokens at the end of each


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    pairs: Pairs


def build_case(at_reference: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (2, 20), generator=generator)
    hidden, weight = torch.randn(2, 20, D, generator=generator), torch.randn(V, D, generator=generator)
    segments, answers = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 20, dtype=torch.bool)
    for row, (lengths, counts) in enumerate(zip(LENGTHS, ANSWERS)):
        stop = 0
        for segment, (length, count) in enumerate(zip(lengths, counts), start=1):
            segments[row, stop : stop + length] = segment
            stop += length
            answers[row, stop - count : stop] = True
    answers[1, 0] = True  # of what stands first in a document nothing is predicted
    pairs = Pairs(tokens, segments, answers, torch.zeros(2, 4))
    case = Case(hidden.requires_grad_(), weight.requires_grad_(), pairs)
    reference = torch.zeros(2, 4)
    for (row, segment), value in log_probabilities(case).items():
        noise = 0 if at_reference else torch.randn((), generator=generator)
        reference[row, segment - 1] = value.detach() + noise
    return case._replace(pairs=pairs._replace(reference=reference))


def log_probabilities(case: Case) -> dict[tuple[int, int], Tensor]:
    """Of the answer of each segment of each row, document by document."""
    found = {}
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for segment, (length, count) in enumerate(zip(lengths, ANSWERS[row]), start=1):
            document = slice(start, start + length)
            logits = case.hidden[row, document] @ case.weight.t()
            logps = logits[:-1].log_softmax(-1).gather(-1, case.pairs.tokens[row, document][1:, None]).squeeze(-1)
            found[row, segment] = logps[length - 1 - count :].sum()
            start += length
    return found


def oracle(case: Case, config: PreferenceConfig) -> tuple[Tensor, list[Tensor]]:
    """Equation 7 of arXiv 2305.18290, with its options, pair by pair: the sum of the losses, and the margins."""
    logps, total, margins = log_probabilities(case), torch.zeros(()), []
    for row, lengths in enumerate(LENGTHS):
        for chosen in range(1, len(lengths), 2):
            rewards = []
            for segment in (chosen, chosen + 1):
                ratio = logps[row, segment] - case.pairs.reference[row, segment - 1]
                rewards.append(config.beta * ratio / (ANSWERS[row][segment - 1] if config.length_normalised else 1))
            margin = rewards[0] - rewards[1]
            right, wrong = torch.sigmoid(margin).log(), torch.sigmoid(-margin).log()
            total = total - (1 - config.label_smoothing) * right - config.label_smoothing * wrong
            total = total - config.sft_weight * logps[row, chosen] / ANSWERS[row][chosen - 1]
            margins.append(margin)
    return total, margins


OPTIONS: list[dict[str, Any]] = [
    {"beta": 0.3},
    {"beta": 2.0, "length_normalised": True},
    {"beta": 0.3, "label_smoothing": 0.2},
    {"beta": 0.3, "sft_weight": 0.5, "length_normalised": True, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_elements", [V, 10**6])
def test_loss_and_gradient_are_those_of_each_document_by_itself(options: dict[str, Any], chunk_elements: int) -> None:
    case, config = build_case(), PreferenceConfig(**options)
    wanted, margins = oracle(case, config)
    expected = torch.autograd.grad(wanted / 3, [case.hidden, case.weight])
    loss = PreferenceLoss(case.pairs, VOCABULARY, config, chunk_elements=chunk_elements)
    reduced = loss(case.hidden, case.weight)
    assert reduced[0].item() == pytest.approx(wanted.item(), abs=1e-5)
    for own, other in zip(torch.autograd.grad(reduced[0] / 3, [case.hidden, case.weight]), expected):
        assert (own - other).abs().max() < 1e-5
    found = loss.collect(reduced)
    assert float(found["loss"].total) == pytest.approx(wanted.item(), abs=1e-5)
    assert float(found["loss"].count) == len(margins) == 3
    assert float(found["accuracy"].total) == sum(int(margin > 0) for margin in margins)
    assert float(found["reward_margin"].total) == pytest.approx(sum(margin.item() for margin in margins), abs=1e-5)


def test_at_the_reference_the_loss_is_the_logarithm_of_two_and_the_slope_half_of_beta() -> None:
    case, beta = build_case(at_reference=True), 0.3
    loss = PreferenceLoss(case.pairs, VOCABULARY, PreferenceConfig(beta=beta))
    with torch.no_grad():
        logps = loss(case.hidden, case.weight)[1]
    case = case._replace(pairs=case.pairs._replace(reference=logps))
    loss = PreferenceLoss(case.pairs, VOCABULARY, PreferenceConfig(beta=beta))
    reduced = loss(case.hidden, case.weight)
    assert reduced[0].item() == pytest.approx(3 * math.log(2), rel=1e-7)
    found = {name: (sums.total / sums.count).item() for name, sums in loss.collect(reduced).items() if sums.count}
    assert [found[name] for name in ("accuracy", "reward_margin", "kl_estimate", "log_ratio_chosen")] == [0] * 4
    separate = log_probabilities(case)
    gained = sum((-1) ** segment * value for (_, segment), value in separate.items())  # rejected less chosen
    assert isinstance(gained, Tensor)
    expected = torch.autograd.grad(beta / 2 * gained, case.hidden)[0]
    assert (torch.autograd.grad(reduced[0], case.hidden)[0] - expected).abs().max() < 1e-6


def test_divergence_is_a_mean_over_tokens_of_answers() -> None:
    case = build_case()
    loss = PreferenceLoss(case.pairs, VOCABULARY, PreferenceConfig())
    found = loss.collect(loss(case.hidden, case.weight))
    ratios = {place: value.item() - case.pairs.reference[place[0], place[1] - 1].item()
              for place, value in log_probabilities(case).items()}  # fmt: skip
    chosen = sum(value for (_, segment), value in ratios.items() if segment % 2)
    assert found["log_ratio_chosen"].total.item() == pytest.approx(chosen, abs=1e-5)
    assert found["log_ratio_chosen"].count.item() == 2 + 2 + 4
    assert found["log_ratio_rejected"].count.item() == 1 + 3 + 1
    mean = -sum(ratios.values()) / 13
    assert (found["kl_estimate"].total / found["kl_estimate"].count).item() == pytest.approx(mean, abs=1e-5)


def test_pairs_are_counted_by_what_is_chosen() -> None:
    case = build_case()
    image, text = (VOCABULARY.ids(name).start for name in ("image", "text"))
    tokens = torch.full_like(case.pairs.tokens, text)
    tokens[1, 6] = image  # in the chosen answer of the second row
    tokens[0, 1] = image  # in a prompt
    pairs = case.pairs._replace(tokens=tokens)
    loss = PreferenceLoss(pairs, VOCABULARY, PreferenceConfig())
    found = loss.collect(loss(case.hidden, case.weight))
    assert {name: found[f"accuracy_{name}"].count.item() for name in ("image", "text")} == {"image": 1, "text": 2}
    total = sum(found[f"accuracy_{name}"].total.item() for name in ("image", "text"))
    assert total == found["accuracy"].total.item()


def test_a_row_without_pairs_adds_nothing() -> None:
    case = build_case()
    empty = case.pairs._replace(
        segment_ids=case.pairs.segment_ids * torch.tensor([[1], [0]]),
        answers=case.pairs.answers & torch.tensor([[True], [False]]),
    )
    loss = PreferenceLoss(empty, VOCABULARY, PreferenceConfig(sft_weight=1.0, label_smoothing=0.1))
    reduced = loss(case.hidden, case.weight)
    assert loss.collect(reduced)["loss"].count.item() == 2
    assert torch.autograd.grad(reduced[0], case.hidden)[0][1].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"beta": 0.0}, "beta is 0"), ({"label_smoothing": 0.5}, "label_smoothing"), ({"sft_weight": -1.0}, "sft_weight")],
)
def test_settings_without_a_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"preference: {said}"):
        PreferenceConfig(**options)
