"""Caption metrics against pycocoevalcap 1.2, whose numbers stand in golden/published_captions.json.

Made once from the file's raw captions by its `PTBTokenizer` (stanford-corenlp 3.4.1, Java), `Bleu(4)`, `Cider()` and
`Rouge()`; the file names them and keeps the tokenised captions, which the metrics are compared on.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixmodal.evaluation.captioning import (
    DocumentFrequencies,
    bleu,
    caption_scores,
    cider_d,
    document_frequencies,
    exact_concept_rate,
    named_concept,
    rouge_l,
    tokenize_caption,
)

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "published_captions.json").read_text())["sets"]
TOLERANCE = 1e-6  # worst difference seen: 9e-16 for CIDEr-D, 2e-16 for BLEU, 2e-8 for ROUGE-L, which is in float32


def of(items: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return [item["caption"] for item in items], [item["references"] for item in items]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_metrics_are_equal_to_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    captions, references = of(published["tokenised"])
    assert bleu(captions, references) == pytest.approx(published["bleu"], abs=TOLERANCE, rel=1e-9)
    for metric, key in ((cider_d, "cider_d"), (rouge_l, "rouge_l")):
        mean, each = metric(captions, references)
        assert mean == pytest.approx(published[key], abs=TOLERANCE)
        assert each == pytest.approx(published[f"{key}_each"], abs=TOLERANCE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_captions_are_tokenised_as_by_the_published_tokenizer(name: str) -> None:
    raw, tokenised = (of(PUBLISHED[name][key]) for key in ("raw", "tokenised"))
    assert list(map(tokenize_caption, raw[0])) == tokenised[0]
    assert [list(map(tokenize_caption, texts)) for texts in raw[1]] == tokenised[1]


def test_raw_captions_get_the_scores_of_tokenised_ones() -> None:
    published = PUBLISHED["mixed"]
    scores = caption_scores(*of(published["raw"]))
    assert scores.cider_d == pytest.approx(published["cider_d"], abs=TOLERANCE)
    assert scores.bleu == pytest.approx(published["bleu"], abs=TOLERANCE)
    assert scores.rouge_l == pytest.approx(published["rouge_l"], abs=TOLERANCE)
    assert scores.num_captions == 10


def test_a_caption_that_is_its_only_reference_has_the_highest_scores() -> None:
    texts = ["a red circle above a square", "a dog runs on green grass", "two men ride big waves"]
    references = [[text] for text in texts]
    assert cider_d(texts, references).each == pytest.approx([10.0] * 3)
    assert bleu(texts, references) == pytest.approx([1.0] * 4)
    assert rouge_l(texts, references).each == pytest.approx([1.0] * 3)


def test_a_tie_of_lengths_goes_to_the_shorter_reference_whatever_the_order() -> None:
    texts = [["a b c d e f", "a b"], ["a b", "a b c d e f"]]  # both differ by two words from the caption
    assert [bleu(["a b x c"], [some])[0] for some in texts] == pytest.approx([0.75, 0.75])


def test_document_frequencies_of_a_larger_corpus_give_one_picture_a_score() -> None:
    caption, reference = ["a dog"], [["a dog"]]
    assert cider_d(caption, reference).mean == 0  # each n-gram stands in the references of all pictures
    known = document_frequencies([["a dog"], ["a cat", "a dog"], ["a tree"]])
    alone = dict.fromkeys([("cat",), ("a", "cat"), ("tree",), ("a", "tree")], 1)
    assert known == DocumentFrequencies(Counter({("a",): 3, ("dog",): 2, ("a", "dog"): 2, **alone}), 3)
    assert cider_d(caption, reference, known).mean == pytest.approx(5)  # n = 1 and 2 of 4


def test_a_caption_of_another_length_loses_by_a_gaussian() -> None:
    known = DocumentFrequencies(Counter(), 10)
    long = cider_d(["dog tree tree tree"], [["dog"]], known, sigma=2.0).mean
    assert long == pytest.approx(10 * (1 / math.sqrt(1 + 9) / 4) * math.exp(-9 / 8))


@pytest.mark.parametrize(
    ("caption", "concept"),
    [
        ("red apple, flat style", "red apple"),
        ("pineapple, flat style", None),
        ("an apple in outline style", "apple"),
        ("Red Apple", "red apple"),
        ("flag: Åland Islands!", "flag: Åland Islands"),
        ("keycap: *", "keycap: *"),
        ("an apple tree", "apple tree"),
        ("", None),
    ],
)
def test_a_caption_names_the_longest_concept_in_whole_words(caption: str, concept: str | None) -> None:
    assert (
        named_concept(caption, ["apple", "tree", "apple tree", "red apple", "flag: Åland Islands", "keycap: *"])
        == concept
    )


def test_the_exact_concept_rate_counts_captions_that_name_no_other() -> None:
    captions = ["a red apple", "an apple", "Dog!", "pineapple"]
    concepts = ["apple", "red apple", "dog"]
    assert exact_concept_rate(captions, ["apple", "apple", "dog", "apple"], concepts) == 0.5


def test_what_can_not_be_scored_is_named() -> None:
    for metric in (bleu, rouge_l, cider_d, caption_scores):
        with pytest.raises(ValueError, match="2 captions, but references of 1"):
            metric(["a", "b"], [["a"]])
        with pytest.raises(ValueError, match="0 captions"):
            metric([], [])
        with pytest.raises(ValueError, match="picture 1 needs a list of one or more references"):
            metric(["a", "b"], [["a"], []])
        with pytest.raises(ValueError, match="not 'a dog'"):
            metric(["a"], ["a dog"])
    with pytest.raises(ValueError, match="sigma is 0"):
        cider_d(["a"], [["a"]], sigma=0)
    with pytest.raises(ValueError, match="of no picture"):
        cider_d(["a"], [["a"]], document_frequencies([]))
    with pytest.raises(ValueError, match="'cat' is wanted"):
        exact_concept_rate(["a"], ["cat"], ["dog"])
    with pytest.raises(ValueError, match="1 captions for 2 concepts"):
        exact_concept_rate(["a"], ["dog", "dog"], ["dog"])
