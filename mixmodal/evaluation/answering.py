"""Answers to questions: VQA accuracy with the official normalisation, exact answers, and the baseline that is blind.

VQA accuracy is that of the VQA challenge (arXiv 1505.00468, section 3; script vqaEval.py of VQA's tools, March 2021),
to which it is equal, oddities included.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_FULL_STOPS = 32
"""The script gives a flag in the place of the number of replacements, and so replaces 32."""
DIGIT_COMMA = re.compile(r"\d,\d")
SHORTENED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each contraction by its spellings with one apostrophe left out."""
    found = {
        word[:at] + word[at + 1 :]: word
        for word in SHORTENED.split()
        for at, letter in enumerate(word)
        if letter == "'"
    }
    return found | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


class AnswerAccuracy(NamedTuple):
    """Accuracy of answers, which means little without that of the same questions without the picture.

    Args:
        accuracy: mean over the questions, 0 to 1.
        each: float64 `(questions,)`.
        by_kind: of each kind of question the mean, and how many there are.
    """

    accuracy: float
    each: np.ndarray
    by_kind: dict[str, tuple[float, int]]


def normalize_answer(text: str) -> str:
    """An answer in the challenge's normal form: lower case, number words as digits, no articles and punctuation.

    A mark of punctuation becomes a space, or nothing where it stands beside a space anywhere in the text or the text
    has a comma between digits; full stops go but before a digit; contractions get their apostrophes.
    """
    text = _one_line(text)
    has_comma = DIGIT_COMMA.search(text) is not None
    spaced = text
    for mark in MARKS:
        alone = has_comma or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if alone else " ")
    spaced = FULL_STOP.sub("", spaced, count=MOST_FULL_STOPS)
    words = (NUMBERS.get(word, word) for word in spaced.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """`min(n / 3, 1)`, n of the others having given the answer, as the mean over leaving out each human in turn.

    As in the script, answers are normalised only where the humans do not all say the same, and there may be fewer than
    ten humans: one alone gives 0, since none is left when that one is left out, and two give 1/3 at most; for questions
    with a single true answer there is `exact_accuracy`.

    Args:
        answer: to be judged.
        human_answers: usually ten, of each human one.

    Raises:
        ValueError: where there is no human answer.
    """
    if isinstance(human_answers, str) or not human_answers:
        raise ValueError(f"VQA accuracy: a list of one or more human answers is needed, not {human_answers!r}")
    given, wanted = _one_line(answer), list(map(_one_line, human_answers))
    if len(set(wanted)) > 1:
        given, wanted = normalize_answer(given), list(map(normalize_answer, wanted))
    agreeing = wanted.count(given)
    # of those who agree one is left out of what each of them is asked about
    left = [agreeing - (human == given) for human in wanted]
    return sum(min(number / 3, 1.0) for number in left) / len(left)


def exact_accuracy(answer: str, truth: str) -> float:
    """1 where both are the same in normal form, else 0."""
    return float(normalize_answer(answer) == normalize_answer(truth))


class BlindBaseline:
    """Answers by the question alone, without the picture: the most frequent answer to the same text in training.

    A question of an unknown text gets the most frequent answer to its kind, and where that is unknown, too, to all. Of
    equally frequent answers the first by alphabet is given.

    Args:
        questions: of the training split.
        answers: the answer to each.
        kinds: the kind of each; None is one kind.

    Raises:
        ValueError: where the numbers differ or are none.
    """

    def __init__(self, questions: Sequence[str], answers: Sequence[str], kinds: Sequence[str] | None = None) -> None:
        kinds = [""] * len(questions) if kinds is None else kinds
        if not questions or not len(questions) == len(answers) == len(kinds):
            raise ValueError(
                f"blind baseline: {len(questions)} questions, {len(answers)} answers, {len(kinds)} kinds of training"
            )
        texts: dict[str, Counter[str]] = defaultdict(Counter)
        sorts: dict[str, Counter[str]] = defaultdict(Counter)
        for question, answer, kind in zip(questions, answers, kinds, strict=True):
            texts[_question(question)][answer] += 1
            sorts[kind][answer] += 1
        self._by_text = {text: _most_frequent(counts) for text, counts in texts.items()}
        self._by_kind = {kind: _most_frequent(counts) for kind, counts in sorts.items()}
        self._overall = _most_frequent(Counter(answers))

    def answer(self, question: str, kind: str = "") -> str:
        """The answer to a question of this text and kind."""
        return self._by_text.get(_question(question), self._by_kind.get(kind, self._overall))


def answer_accuracy(
    answers: Sequence[str], truths: Sequence[Sequence[str]], kinds: Sequence[str] | None = None
) -> AnswerAccuracy:
    """Accuracy of answers, over all questions and by kind.

    Args:
        answers: one to each question.
        truths: what people answered to each, see `judge_answer`.
        kinds: of each question; None is one kind, named "".

    Raises:
        ValueError: where the numbers differ or are none.
    """
    kinds = [""] * len(answers) if kinds is None else kinds
    if not answers or not len(answers) == len(truths) == len(kinds):
        raise ValueError(f"answers: {len(answers)} answers, {len(truths)} truths and {len(kinds)} kinds")
    each, names = np.array([judge_answer(*pair) for pair in zip(answers, truths)]), np.array(kinds)
    by_kind = {kind: (float(each[names == kind].mean()), int((names == kind).sum())) for kind in sorted(set(kinds))}
    return AnswerAccuracy(float(each.mean()), each, by_kind)


def judge_answer(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy among the answers of several people; of a single answer whether it is the same in normal form."""
    return exact_accuracy(answer, truths[0]) if len(truths) == 1 else vqa_accuracy(answer, truths)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _question(text: str) -> str:
    return " ".join(text.lower().split())


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
