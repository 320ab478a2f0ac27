"""POPE's questions and scores and CHAIR, on fixtures that were worked out by hand."""

from collections import Counter
from collections.abc import Sequence

import pytest

from mixmodal.evaluation.hallucination import (
    NEGATIVES,
    Negatives,
    Probe,
    chair_scores,
    mentioned_objects,
    pope_questions,
    pope_scores,
)

OBJECTS = [
    ["person", "surfboard"],
    ["person", "dog", "frisbee"],
    ["person", "dog"],
    ["person", "fork", "table"],
    ["fork", "table", "cup"],
    ["table", "dog"],
    ["surfboard", "wave"],
    ["wave", "surfboard"],
]  # in pictures: person 4, surfboard 3, dog 3, table 3, fork 2, wave 2, frisbee 1, cup 1
TRUTHS = [Probe(0, "cat", "?", answer) for answer in ("yes", "yes", "yes", "no", "no", "no")]


def absent(negatives: Negatives, picture: int, num_pairs: int = 3, seed: int = 0) -> list[str]:
    probes = pope_questions(OBJECTS, negatives, num_pairs, seed)
    return [probe.name for probe in probes if probe.picture == picture and probe.answer == "no"]


def test_popular_negatives_are_the_most_frequent_objects_that_the_picture_lacks() -> None:
    assert absent("popular", 4) == ["person", "dog", "surfboard"]
    assert absent("popular", 3) == ["dog", "surfboard", "wave"]


def test_adversarial_negatives_stand_most_often_beside_what_the_picture_shows() -> None:
    # beside surfboard or wave: person once; beside fork, table and cup: person twice, dog once
    assert absent("adversarial", 6)[0] == "person"
    assert absent("adversarial", 4) == ["person", "dog", "frisbee"]
    # beside table and dog: person 1 + 2, fork 2, cup 1, frisbee 1; popular has person and surfboard
    assert absent("adversarial", 5) == ["person", "fork"]
    assert absent("popular", 5) == ["person", "surfboard"]


def test_random_negatives_are_drawn_by_the_seed_from_all_that_the_picture_lacks() -> None:
    drawn = [tuple(absent("random", 0, seed=seed)) for seed in range(60)]
    assert drawn == [tuple(absent("random", 0, seed=seed)) for seed in range(60)]
    counts = Counter(name for names in drawn for name in names)
    assert set(counts) == {"dog", "table", "fork", "wave", "frisbee", "cup"}
    assert min(counts.values()) >= 8  # 20 of each in the mean, standard deviation 3.7
    alike = [
        probe.name for probe in pope_questions([["a"]] * 40 + [["b", "c", "d"]], "random", 1) if probe.answer == "no"
    ]
    assert set(alike[:40]) == {"b", "c", "d"}  # each picture has a draw of its own


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_half_of_the_questions_of_each_picture_have_a_yes(negatives: Negatives) -> None:
    probes = pope_questions(OBJECTS, negatives)
    for picture, names in enumerate(OBJECTS):
        own = [probe for probe in probes if probe.picture == picture]
        assert Counter(probe.answer for probe in own) == {"yes": len(names), "no": len(names)}
        assert all((probe.name in names) == (probe.answer == "yes") for probe in own)
        assert len({probe.name for probe in own}) == len(own)


def test_the_objects_there_are_the_same_for_all_negatives_and_questions_have_articles() -> None:
    objects = [["apple", "pear", "dog"], ["cat", "umbrella"]]
    kinds = [pope_questions(objects, negatives, num_pairs=1) for negatives in NEGATIVES]
    assert len({tuple(probe.name for probe in probes if probe.answer == "yes") for probes in kinds}) == 1
    texts = {probe.question for probe in pope_questions(objects, "random", num_pairs=5)}
    assert {"Is there an apple in the image?", "Is there a pear in the image?"} <= texts
    assert pope_questions(objects, "popular", 1, template="{name}?")[0].question in ("apple?", "pear?", "dog?")


def test_an_answerer_that_always_says_yes_is_seen_by_its_share_of_yes() -> None:
    probes = pope_questions(OBJECTS, "adversarial")
    scores = pope_scores(probes, ["Yes, there is."] * len(probes))
    assert (scores.yes, scores.accuracy, scores.precision, scores.recall) == (1.0, 0.5, 0.5, 1.0)
    assert scores.f1 == pytest.approx(2 / 3)


def test_scores_are_those_counted_by_hand() -> None:
    scores = pope_scores(TRUTHS, ["yes", "Yes!", "no", "No, it is not", "yes", "I can not tell"])
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx(2 / 3)
    assert (scores.yes, scores.unclear, scores.num_questions) == (0.5, pytest.approx(1 / 6), 6)
    never = pope_scores(TRUTHS, ["nothing known"] * 6)
    assert (never.accuracy, never.precision, never.recall, never.f1, never.unclear) == (0, 0, 0, 0, 1)


SYNONYMS = {
    "person": ["man", "woman", "people", "men"],
    "dog": ["puppy"],
    "hot dog": [],
    "bench": [],
    "dining table": ["table"],
}


def test_mentions_are_the_longest_names_with_plurals_and_synonyms() -> None:
    found = mentioned_objects("Two men and a puppy eat hot dogs at dining tables, the dog sits by benches.", SYNONYMS)
    assert found == ["person", "dog", "hot dog", "dining table", "dog", "bench"]
    assert mentioned_objects("a doghouse and a glass", SYNONYMS) == []


def test_chair_is_what_is_counted_by_hand() -> None:
    captions = ["A man with two dogs at a table", "a puppy and a dog on a bench", "a red sky"]
    objects: Sequence[Sequence[str]] = [["person", "table"], ["bench"], ["dog"]]
    scores = chair_scores(captions, objects, SYNONYMS)
    # mentioned: person dog table | dog dog bench | nothing; not there: dog | dog dog
    assert (scores.mentioned, scores.hallucinated, scores.each) == (6, 3, [["dog"], ["dog", "dog"], []])
    assert scores.chair_i == pytest.approx(3 / 6)
    assert scores.chair_s == pytest.approx(2 / 3)
    assert chair_scores(["a red sky"], [[]], SYNONYMS)[:2] == (0.0, 0.0)


def test_what_can_not_be_asked_or_counted_is_named() -> None:
    with pytest.raises(ValueError, match="one of random, popular, adversarial, not 'rare'"):
        pope_questions(OBJECTS, "rare")  # type: ignore[arg-type]
    for fields in ({"num_pairs": 0}, {"template": "Is it there?"}):
        with pytest.raises(ValueError, match="num_pairs must be 1 or more and the template hold"):
            pope_questions(OBJECTS, "random", **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the 2 pictures has an object"):
        pope_questions([[], []], "random")
    with pytest.raises(ValueError, match="1 answers to 6 questions"):
        pope_scores(TRUTHS, ["yes"])
    with pytest.raises(ValueError, match="1 captions, but objects of 2"):
        chair_scores(["a dog"], [[], []], SYNONYMS)
    with pytest.raises(ValueError, match="picture 0 shows 'kite'"):
        chair_scores(["a dog"], [["kite"]], SYNONYMS)
    with pytest.raises(ValueError, match="'puppy' of 'cat' is of 'dog', too"):
        mentioned_objects("a dog", {"dog": ["puppy"], "cat": ["puppy"]})
