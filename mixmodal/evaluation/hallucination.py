"""Objects that a model claims and a picture does not show: POPE's questions and CHAIR's shares of captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np

Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)


class Probe(NamedTuple):
    """A question whether an object is in a picture.

    Args:
        picture: its index.
        name: of the object.
        question: the text.
        answer: yes or no.
    """

    picture: int
    name: str
    question: str
    answer: str


class PopeScores(NamedTuple):
    """Scores of yes and no, yes being what is to be found; each 0 where there is nothing to take a share of.

    Args:
        accuracy: share of right answers; one that says neither yes nor no is wrong.
        precision: share of the yes that are right.
        recall: share of the objects there that got a yes.
        f1: harmonic mean of precision and recall.
        yes: share of the answers that are yes; half of the questions should have one.
        unclear: share of the answers that say neither.
        num_questions: how many were asked.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    unclear: float
    num_questions: int


class ChairScores(NamedTuple):
    """Hallucinated objects of captions.

    Args:
        chair_i: hallucinated mentions over all mentions of objects; 0 where none is mentioned.
        chair_s: captions with a hallucinated object over all captions.
        mentioned: mentions of objects.
        hallucinated: those of objects that the picture does not show.
        each: of each caption the hallucinated objects, in order of mention.
    """

    chair_i: float
    chair_s: float
    mentioned: int
    hallucinated: int
    each: list[list[str]]


def pope_questions(
    objects: Sequence[Iterable[str]],
    negatives: Negatives,
    num_pairs: int = 3,
    seed: int = 0,
    template: str = "Is there {article} {name} in the image?",
) -> list[Probe]:
    """Questions about objects in and not in each picture, as many of each (arXiv 2305.10355, section 5).

    Objects not in a picture are drawn at random (`random`), or are those that stand in most pictures (`popular`), or
    those that stand most often in pictures with the objects of this one (`adversarial`): the counts of pictures shared
    with each of its objects, added up. Equally frequent ones go by alphabet. Objects in the picture are drawn, the same
    ones for each kind of `negatives`. A picture with too few objects in it or out of it has fewer questions of both.

    Args:
        objects: of each picture the names of what it shows.
        negatives: see above.
        num_pairs: most questions of each answer for a picture; 3 in the paper.
        seed: of what is drawn, for each picture apart.
        template: of the question, with `{name}` and, where wanted, `{article}`, which is a or an.

    Raises:
        ValueError: for unknown negatives, fewer than one pair, a template without `{name}`, or no object at all.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"POPE: negatives must be one of {', '.join(NEGATIVES)}, not {negatives!r}")
    if num_pairs < 1 or "{name}" not in template:
        raise ValueError(f"POPE: num_pairs must be 1 or more and the template hold {{name}}: {num_pairs}, {template!r}")
    shown = [sorted(set(names)) for names in objects]
    frequency = Counter(name for names in shown for name in names)
    if not frequency:
        raise ValueError(f"POPE: none of the {len(shown)} pictures has an object")
    rank = _ranking(shown, frequency)[negatives]
    probes: list[Probe] = []
    for picture, names in enumerate(shown):
        absent = [name for name in sorted(frequency) if name not in set(names)]
        count = min(num_pairs, len(names), len(absent))
        there = np.random.default_rng((seed, picture)).permutation(len(names))[:count]
        ranked = rank(names, absent, np.random.default_rng((seed, picture, 1)))[:count]
        for yes, no in zip([names[index] for index in there], ranked, strict=True):
            for name, answer in ((yes, "yes"), (no, "no")):
                article = "an" if name[:1].lower() in "aeiou" else "a"
                probes.append(Probe(picture, name, template.format(name=name, article=article), answer))
    return probes


def _ranking(
    shown: Sequence[Sequence[str]], frequency: Counter[str]
) -> dict[str, Callable[[Sequence[str], list[str], np.random.Generator], list[str]]]:
    """For each kind of negatives what orders the objects that a picture lacks as they are asked for."""
    together: Counter[tuple[str, str]] = Counter(pair for names in shown for pair in combinations(names, 2))

    def random(names: Sequence[str], absent: list[str], rng: np.random.Generator) -> list[str]:
        return [absent[index] for index in rng.permutation(len(absent))]

    def popular(names: Sequence[str], absent: list[str], rng: np.random.Generator) -> list[str]:
        return sorted(absent, key=lambda name: -frequency[name])

    def adversarial(names: Sequence[str], absent: list[str], rng: np.random.Generator) -> list[str]:
        return sorted(absent, key=lambda name: -sum(together[min(name, own), max(name, own)] for own in names))

    return {"random": random, "popular": popular, "adversarial": adversarial}


def pope_scores(probes: Sequence[Probe], answers: Sequence[str]) -> PopeScores:
    """Scores of answers to the questions (arXiv 2305.10355, section 5).

    An answer is what its first word of yes and no says, in any case; without one it counts as wrong, and as no yes.

    Args:
        probes: the questions.
        answers: one to each.

    Raises:
        ValueError: where the numbers differ or are none.
    """
    if not probes or len(probes) != len(answers):
        raise ValueError(f"POPE: {len(answers)} answers to {len(probes)} questions")
    said = [re.search(r"\b(yes|no)\b", answer.lower()) for answer in answers]
    words = [match.group() if match else None for match in said]
    truths = [probe.answer for probe in probes]
    right_yes = sum(word == truth == "yes" for word, truth in zip(words, truths))
    precision, recall = _share(right_yes, words.count("yes")), _share(right_yes, truths.count("yes"))
    return PopeScores(
        accuracy=_share(sum(word == truth for word, truth in zip(words, truths)), len(words)),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        yes=_share(words.count("yes"), len(words)),
        unclear=_share(words.count(None), len(words)),
        num_questions=len(words),
    )


def mentioned_objects(caption: str, synonyms: Mapping[str, Sequence[str]]) -> list[str]:
    """Objects that a caption mentions, in order, one entry for each mention.

    Words are compared in lower case, and where a plural by -s or -es is not known, its singular is; other plurals stand
    among the synonyms. The longest name counts where several begin at one word, and its words count once: with
    `hot dog` among the names a hot dog is no dog.

    Args:
        caption: as written.
        synonyms: of each object the other names, of one or more words.

    Raises:
        ValueError: where two objects have a name in common.
    """
    return _mentions(caption, _names(synonyms))


def chair_scores(
    captions: Sequence[str], objects: Sequence[Iterable[str]], synonyms: Mapping[str, Sequence[str]]
) -> ChairScores:
    """CHAIR of captions (arXiv 1809.02156, section 2.1, equations of CHAIR_i and CHAIR_s).

    A mention is hallucinated where the picture does not show its object. As in the authors' script, an object that is
    mentioned twice counts twice in CHAIR_i.

    Args:
        captions: one of each picture.
        objects: of each picture the objects that it shows, or synonyms of them: with COCO's, those of the annotated
            boxes and those of the reference captions.
        synonyms: of each object the other names. What is not in the table is never counted.

    Raises:
        ValueError: where the numbers differ or are none, two objects have a name in common, or a picture shows an
            object that the table lacks.
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(f"CHAIR: {len(captions)} captions, but objects of {len(objects)} pictures")
    names = _names(synonyms)
    mentioned, each = 0, []
    for index, (caption, shown) in enumerate(zip(captions, objects, strict=True)):
        there: set[str] = set()
        for name in shown:
            known = names.get(tuple(_words(name)))
            if known is None:
                raise ValueError(f"CHAIR: picture {index} shows {name!r}, which is not in the table of synonyms")
            there.add(known)
        found = _mentions(caption, names)
        mentioned += len(found)
        each.append([name for name in found if name not in there])
    wrong = sum(map(len, each))
    return ChairScores(_share(wrong, mentioned), _share(sum(map(bool, each)), len(each)), mentioned, wrong, each)


def _names(synonyms: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], str]:
    """The object of each name, the name as words."""
    names: dict[tuple[str, ...], str] = {}
    for name, others in synonyms.items():
        for words in {tuple(_words(text)) for text in (name, *others)}:
            if not words or words in names:
                raise ValueError(
                    f"synonyms: {' '.join(words)!r} of {name!r} is "
                    + (f"of {names[words]!r}, too" if words else "empty")
                )
            names[words] = name
    return names


def _mentions(caption: str, names: Mapping[tuple[str, ...], str]) -> list[str]:
    words = _words(caption)
    longest = max(map(len, names), default=0)
    found: list[str] = []
    at = 0
    while at < len(words):
        for size in range(min(longest, len(words) - at), 0, -1):
            part = tuple(words[at : at + size])
            known = next((names[one] for one in _singulars(part) if one in names), None)
            if known is not None:
                found.append(known)
                at += size
                break
        else:
            at += 1
    return found


def _singulars(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The words as they are, and without -s and -es at the end."""
    last = words[-1]
    return [words, *((*words[:-1], last[: -len(ending)]) for ending in ("s", "es") if last.endswith(ending))]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
