"""VQA accuracy against the official script, whose numbers stand in golden/published_answers.json; the blind baseline.

Made once by `VQAEval` of the VQA tools (commit a013f0043c1e, its print statements rewritten for Python 3): `evaluate`
on the answers of the file, each human with an id of its own, and `processDigitArticle(processPunctuation(text))`.
"""

import json
from pathlib import Path

import pytest

from mixmodal.evaluation.answering import (
    CONTRACTIONS,
    BlindBaseline,
    answer_accuracy,
    exact_accuracy,
    judge_answer,
    normalize_answer,
    vqa_accuracy,
)

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "published_answers.json").read_text())
TOLERANCE = 1e-6  # worst difference seen: 5e-15, the script rounds


def test_accuracy_is_that_of_the_official_script() -> None:
    cases = PUBLISHED["accuracy"]
    assert len(cases) == 33
    found = [vqa_accuracy(case["answer"], case["human_answers"]) for case in cases]
    assert found == pytest.approx([case["accuracy"] for case in cases], abs=TOLERANCE)


@pytest.mark.parametrize(("text", "normal"), PUBLISHED["normalised"])
def test_answers_get_the_official_normal_form(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_is_the_mean_over_nine_of_ten(agreeing: int, accuracy: float) -> None:
    humans = ["yes"] * agreeing + [f"no {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("yes", humans) == pytest.approx(accuracy)


def test_a_contraction_is_known_by_all_spellings_with_one_apostrophe_less() -> None:
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert len(CONTRACTIONS) == 114


def test_a_single_truth_is_judged_in_normal_form() -> None:
    assert exact_accuracy(" Two circles.", "the 2 circles") == 1
    assert exact_accuracy("three", "2") == 0


def test_the_blind_baseline_says_what_is_most_frequent_for_the_text_then_the_kind_then_all() -> None:
    questions = ["how many dogs?", "how many dogs?", "How many  dogs?", "what color?", "what color?", "who?", "why?"]
    answers = ["2", "3", "3", "red", "blue", "man", "man"]
    kinds = ["count", "count", "count", "attribute", "attribute", "other", "other"]
    baseline = BlindBaseline(questions, answers, kinds)
    assert baseline.answer("how many dogs?", "count") == "3"
    assert baseline.answer("what color?", "attribute") == "blue"  # as frequent as red, and first by alphabet
    assert baseline.answer("how many cats?", "count") == "3"
    assert baseline.answer("where?", "place") == "3"  # 3 and man are equally frequent


def test_accuracy_is_counted_by_kind() -> None:
    kinds = ["relation", "relation", "count", "count"]
    found = answer_accuracy(["yes", "No.", "two", "3"], [["yes"], ["no"], ["2"], ["1"]], kinds)
    assert found.each.tolist() == [1, 1, 1, 0]
    assert found.accuracy == 0.75
    assert found.by_kind == {"count": (0.5, 2), "relation": (1.0, 2)}


def test_answers_of_several_people_are_judged_by_vqa_accuracy_and_a_single_one_in_normal_form() -> None:
    assert judge_answer("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)
    assert judge_answer("The red.", ["Red"]) == 1
    assert judge_answer("red", ["red", "blue"]) < 1
    assert answer_accuracy(["yes"], [["yes"] * 3 + ["no"] * 7]).by_kind[""] == (pytest.approx(0.9), 1)


def test_what_can_not_be_judged_is_named() -> None:
    for humans in ([], "yes"):
        with pytest.raises(ValueError, match="one or more human answers is needed"):
            vqa_accuracy("yes", humans)
    with pytest.raises(ValueError, match="0 questions, 0 answers"):
        BlindBaseline([], [])
    with pytest.raises(ValueError, match="1 questions, 2 answers, 1 kinds of training"):
        BlindBaseline(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="1 answers, 2 truths and 2 kinds"):
        answer_accuracy(["b"], [["b"], ["b"]], ["", ""])
