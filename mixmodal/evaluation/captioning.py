"""Captions against references: CIDEr-D, BLEU and ROUGE-L as the COCO caption evaluation has them, and exact concepts.

The metrics of pycocoevalcap 1.2 (arXiv 1504.00325, section 3), to which these are equal on tokenised captions: words
with one space between them. `tokenize_caption` makes such, without Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

MAX_NGRAM = 4
SIGMA = 6.0
BETA = 1.2
TINY, SMALL = 1e-15, 1e-9
"""What the published BLEU adds to matches and to n-grams, so that none in common is nearly and not quite zero."""
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
TOKEN = re.compile(
    r"n't(?!\w)|'(?:s|m|d|re|ve|ll)(?!\w)|\w+(?:(?:-+|/|(?<=\d)[.,:](?=\d)|')\w+)*|[()\[\]{}&%$#@+=*<>/]"
)

Ngram = tuple[str, ...]


class EachScore(NamedTuple):
    """A score of a corpus: the mean over its pictures, and float64 `(pictures,)` of each."""

    mean: float
    each: np.ndarray


class DocumentFrequencies(NamedTuple):
    """In the references of how many pictures an n-gram stands, of `num_pictures` in all."""

    counts: Counter[Ngram]
    num_pictures: int


class CaptionScores(NamedTuple):
    """The metrics of a set of captions.

    Args:
        cider_d: from 0 to 10; a published "CIDEr 120" is 1.2 here.
        bleu: BLEU-1 to BLEU-4 of the corpus, 0 to 1.
        rouge_l: 0 to 1.
        num_captions: how many pictures were described.
    """

    cider_d: float
    bleu: tuple[float, ...]
    rouge_l: float
    num_captions: int


def tokenize_caption(text: str) -> str:
    """Words of a caption in lower case, one space between them, without punctuation.

    Stands for the Penn Treebank tokenizer of the published evaluation, which needs Java: `isn't` becomes `is n't`,
    `dog's` `dog 's`, `(` `-lrb-`; `black-and-white` and `3,000` stay whole. What it does beyond that (`cannot`,
    abbreviations with full stops) is left out: of 1,903 names of emoji, 1,893 come out alike.
    """
    spaced = CLITIC.sub(r" \1", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    tokens: list[str] = TOKEN.findall(spaced)
    return " ".join(BRACKETS.get(token, token) for token in tokens)


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """All metrics of raw captions, tokenised here; CIDEr-D with the document frequencies of these references.

    Args:
        captions: one of each picture.
        references: one or more of each picture.

    Raises:
        ValueError: where a picture has no reference, or the numbers of pictures differ, or are none.
    """
    _check(captions, references)
    own = [tokenize_caption(caption) for caption in captions]
    wanted = [[tokenize_caption(text) for text in texts] for texts in references]
    return CaptionScores(cider_d(own, wanted).mean, bleu(own, wanted), rouge_l(own, wanted).mean, len(own))


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of a corpus, each without the smoothing of single sentences (Papineni et al. 2002, section 2.3).

    torchmetrics counts; the rest is as published: of references that are equally near in length the shorter one counts,
    and n-grams that are never right leave a score of nearly 0.

    Args:
        captions: tokenised, one of each picture.
        references: tokenised, one or more of each picture.

    Raises:
        ValueError: where a picture has no reference, or the numbers of pictures differ, or are none.
    """
    import torch
    from torchmetrics.text import BLEUScore

    _check(captions, references)
    metric = BLEUScore(n_gram=MAX_NGRAM).set_dtype(torch.float64)
    # of the first of the nearest lengths: the shorter one has to come first
    metric.update(captions, [sorted(texts, key=lambda text: len(text.split())) for texts in references])
    states = ("numerator", "denominator", "preds_len", "target_len")
    right, number, length, wanted = (cast("torch.Tensor", metric.metric_state[name]) for name in states)
    precisions = (right + TINY) / (number + SMALL)
    powers = torch.arange(1, MAX_NGRAM + 1, dtype=torch.float64)
    means = (precisions.log().cumsum(0) / powers).exp()
    ratio = (float(length) + TINY) / (float(wanted) + SMALL)
    return tuple((means * math.exp(min(0.0, 1 - 1 / ratio))).tolist())


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]], beta: float = BETA) -> EachScore:
    """ROUGE-L of each caption (Lin 2004, section 3.1), as published for COCO.

    Precision and recall of the longest common subsequence, of torchmetrics, are each the best over the references, not
    of the same one, and recall weighs `beta` times as much: `(1 + beta^2) P R / (R + beta^2 P)`.

    Args:
        captions: tokenised, one of each picture.
        references: tokenised, one or more of each picture.
        beta: see above.

    Raises:
        ValueError: where a picture has no reference, or the numbers of pictures differ, or are none.
    """
    from torchmetrics.functional.text import rouge_score

    _check(captions, references)
    each = np.zeros(len(captions))
    for index, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        found = [rouge_score(caption, text, rouge_keys="rougeL", normalizer=str, tokenizer=str.split) for text in texts]
        precision = max(float(one["rougeL_precision"]) for one in found)
        recall = max(float(one["rougeL_recall"]) for one in found)
        if precision and recall:
            each[index] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return EachScore(float(each.mean()), each)


def document_frequencies(references: Iterable[Sequence[str]]) -> DocumentFrequencies:
    """Document frequencies of the n-grams of 1 to 4 words, for `cider_d`.

    Args:
        references: tokenised, those of each picture.
    """
    counts: Counter[Ngram] = Counter()
    num_pictures = 0
    for texts in references:
        counts.update({ngram for text in texts for ngram in _ngrams(text)})
        num_pictures += 1
    return DocumentFrequencies(counts, num_pictures)


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
    sigma: float = SIGMA,
) -> EachScore:
    """CIDEr-D of each caption (arXiv 1411.5726, "Gameability and evaluation server"): 0 to 10.

    The similarity of the TF-IDF vectors of n-grams, clipped to the reference's counts, times a Gaussian of the
    difference in length, as the mean over n = 1 .. 4 and over the references. n-grams that stand in the references of
    all pictures weigh nothing: a corpus of one picture has a score of 0, and few pictures say little.

    Args:
        captions: tokenised, one of each picture.
        references: tokenised, one or more of each picture.
        frequencies: of a larger corpus; None takes those of `references`, as published.
        sigma: standard deviation of the Gaussian, in words.

    Raises:
        ValueError: where a picture has no reference, or the numbers of pictures differ, or are none; for frequencies
            of no picture and a `sigma` that is not above 0.
    """
    _check(captions, references)
    if sigma <= 0:
        raise ValueError(f"cider_d: sigma is {sigma}, it must be above 0 words")
    known = document_frequencies(references) if frequencies is None else frequencies
    if known.num_pictures < 1:
        raise ValueError("cider_d: the document frequencies are of no picture")
    each = np.zeros(len(captions))
    for index, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        own = _weights(caption, known)
        similar = [_similarity(own, _weights(text, known)) * _penalty(caption, text, sigma) for text in texts]
        each[index] = 10 * sum(similar) / len(similar)
    return EachScore(float(each.mean()), each)


def named_concept(caption: str, concepts: Iterable[str]) -> str | None:
    """The concept that a caption names: the longest that stands in it as whole words; None where there is none.

    The longest, so that `pineapple` and `red apple` do not count as `apple`.
    """
    text = caption.casefold()
    found = [name for name in concepts if name.casefold() in text and _stands_alone(name.casefold(), text)]
    return max(found, key=len, default=None)


def exact_concept_rate(captions: Sequence[str], wanted: Sequence[str], concepts: Sequence[str]) -> float:
    """Share of the captions that name the concept of their picture and not a longer one that holds its name.

    Args:
        captions: one of each picture, as written.
        wanted: the concept of each picture, one of `concepts`.
        concepts: all there are.

    Raises:
        ValueError: where the numbers differ or are none, or a wanted concept is not among all.
    """
    if len(captions) != len(wanted) or not captions:
        raise ValueError(f"exact concept: {len(captions)} captions for {len(wanted)} concepts")
    unknown = sorted(set(wanted) - set(concepts))
    if unknown:
        raise ValueError(f"exact concept: {unknown[0]!r} is wanted, but not among the {len(concepts)} concepts")
    return sum(named_concept(text, concepts) == name for text, name in zip(captions, wanted)) / len(captions)


def _stands_alone(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(captions) != len(references) or not captions:
        raise ValueError(f"captions: {len(captions)} captions, but references of {len(references)} pictures")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"captions: picture {index} needs a list of one or more references, not {texts!r}")


def _ngrams(text: str) -> Counter[Ngram]:
    words = text.split()
    return Counter(tuple(words[at : at + n]) for n in range(1, MAX_NGRAM + 1) for at in range(len(words) - n + 1))


def _weights(text: str, frequencies: DocumentFrequencies) -> list[dict[Ngram, float]]:
    """For n = 1 .. 4 the weight of each n-gram: its count times log(pictures / pictures that have it)."""
    weights: list[dict[Ngram, float]] = [{} for _ in range(MAX_NGRAM)]
    for ngram, count in _ngrams(text).items():
        idf = math.log(frequencies.num_pictures / max(1, frequencies.counts[ngram]))
        weights[len(ngram) - 1][ngram] = count * idf
    return weights


def _similarity(own: list[dict[Ngram, float]], other: list[dict[Ngram, float]]) -> float:
    """Mean over n of the clipped cosine."""
    total = 0.0
    for left, right in zip(own, other, strict=True):
        lengths = math.hypot(*left.values()) * math.hypot(*right.values())
        dot = sum(min(weight, right.get(ngram, 0.0)) * right.get(ngram, 0.0) for ngram, weight in left.items())
        total += dot / lengths if lengths else 0.0
    return total / MAX_NGRAM


def _penalty(caption: str, reference: str, sigma: float) -> float:
    difference = len(caption.split()) - len(reference.split())
    return math.exp(-(difference**2) / (2 * sigma**2))
