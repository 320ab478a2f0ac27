"""How often a judge prefers one model's answers to another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixmodal.pipeline.judging import Judge, Output, Question, draw_answers
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import SamplingOptions

NUM_RESAMPLES = 10_000


class WinRate(NamedTuple):
    """A judged win rate.

    Args:
        share: of the comparisons that the model wins; a tie is half a win.
        low, high: 95 % interval of it, by resampling questions (percentile bootstrap).
        wins, ties, losses: comparisons: one for each answer to each question.
        mean, mean_base: scores of the answers of the model and of the base.
    """

    share: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    mean: float
    mean_base: float


def measure_win_rate(
    model: MixedModal,
    base: MixedModal,
    questions: Sequence[Question],
    judge: Judge,
    output: Output = "image",
    *,
    num: int = 1,
    seed: int = 0,
    max_new_tokens: int | None = None,
    options: SamplingOptions | None = None,
) -> WinRate:
    """The share of questions to which the model's answer scores above the base's, answer by answer of equal seeds.

    An answer without content loses to one with some.

    Args:
        model, base: with the same tokenizers.
        questions: held out from what either was tuned on; see `read_questions`.
        judge: the same for both; see `build_judge`.
        output: the modality of the answers.
        num: answers of each to each question.
        seed: of answers, and of the resampling.
        max_new_tokens: of a text.
        options: how both draw.

    Raises:
        ValueError: without questions, or for models whose ids mean different tokens.
    """
    if not questions:
        raise ValueError("a win rate needs questions, and there are none")
    if model.format.vocabulary.digest != base.format.vocabulary.digest:
        raise ValueError("a win rate compares models of one vocabulary; these have different ones")
    scores = [_score(one, questions, judge, output, num, seed, max_new_tokens, options or {}) for one in (model, base)]
    return summarise(*scores, seed=seed)


def _score(
    model: MixedModal,
    questions: Sequence[Question],
    judge: Judge,
    output: Output,
    num: int,
    seed: int,
    max_new_tokens: int | None,
    options: SamplingOptions,
) -> np.ndarray:
    """Scores `(questions, num)` of a model's answers; -inf of those without content."""
    drawn = draw_answers(model, questions, output, num=num, seed=seed, max_new_tokens=max_new_tokens, options=options)
    asked = [question for question, answers in zip(questions, drawn) for _ in answers]
    answers = [answer for row in drawn for answer in row]
    told = [place for place, answer in enumerate(answers) if answer.parts]
    scores = np.full(len(answers), -np.inf)
    if told:
        scores[told] = judge([asked[place] for place in told], [answers[place] for place in told])
    return scores.reshape(len(questions), num)


def summarise(scores: np.ndarray, base: np.ndarray, *, seed: int = 0) -> WinRate:
    """The win rate of scores `(questions, answers)` over those of the base, of the same shape."""
    wins, losses = scores > base, scores < base
    by_question = (wins + 0.5 * ~(wins | losses)).mean(axis=1)
    drawn = np.random.default_rng(seed).integers(len(by_question), size=(NUM_RESAMPLES, len(by_question)))
    low, high = np.quantile(by_question[drawn].mean(axis=1), [0.025, 0.975])
    means = [float(one[np.isfinite(one)].mean()) if np.isfinite(one).any() else float("nan") for one in (scores, base)]
    ties = scores.size - int(wins.sum()) - int(losses.sum())
    return WinRate(float(by_question.mean()), float(low), float(high), int(wins.sum()), ties, int(losses.sum()), *means)
