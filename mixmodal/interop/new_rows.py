"""Rows for the tokens that a text model does not have: image codes, control tokens, sentinels.

A Llama-style base model has a row of the embedding and one of the output for each of its text pieces. They keep their
values and move to the text range of the vocabulary; the rows of all other tokens are made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mixmodal.vocabulary import Vocabulary

SPECIAL = ("bos", "pad", "eos", "unk")
"""Tokens of the vocabulary that a base model may have a row of its own for, as a text piece."""
OUTPUT_SPREAD = 0.1
"""Standard deviation of new output rows, in that of the old ones."""


class Rows(NamedTuple):
    """Rows of the whole vocabulary.

    Args:
        embedding: `(V, D)`, in the dtype of the old one.
        output: `(V, D)` likewise; None where it is tied to the embedding.
    """

    embedding: Tensor
    output: Tensor | None


def add_rows(
    embedding: Tensor,
    output: Tensor | None,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    copied: Mapping[str, int] | None = None,
) -> Rows:
    """The rows of a text model's tokens at their new ids, with rows for all other tokens of the vocabulary.

    Old rows are copied bit for bit to the text range, and those that `copied` names a second time. The others, codes,
    control tokens, sentinels and reserved ones, are drawn in float32, per dimension from a normal distribution:

    - of the embedding with mean and standard deviation of the old rows, so that what the first layer reads of them is
      of the size that it knows, and no two codes start alike;
    - of the output with the mean of the old rows and a tenth of their standard deviation. The logit of the mean row is
      the mean of the old logits, so that a new token starts about as likely as an average one, and text keeps most of
      its likelihood: adding `n` mean rows to `V` takes at most `log(1 + n / V)` nats from each token (J. Hewitt,
      Initializing New Word Embeddings for Pretrained Language Models, 2021, nlp.stanford.edu/~johnhew).

    The last is the "mean resizing" with which transformers' `resize_token_embeddings` appends rows and Liquid
    (arXiv 2412.04332) adds image codes to a text model, but for the spread: there both matrices take the mean with a
    covariance of 1e-9 of that of the old rows, or the bare mean where this is not positive definite, so that all codes
    start with practically one embedding and have to be told apart by training.

    Args:
        embedding: `(V_old, D)`, row i that of text piece i.
        output: `(V_old, D)`, weight of the output layer; None where it is tied to the embedding, whose rows are then
            drawn as output rows are.
        vocabulary: of `V_old` text pieces.
        generator: of the draws: first those of the embedding, then those of the output, in the order of ids.
        copied: the old id whose row `bos`, `pad`, `eos` or `unk` take, such as `{"bos": 1, "eos": 2, "unk": 0}`; one
            that is not named is drawn.

    Raises:
        ValueError: naming shapes and sizes that do not fit, or the entry of `copied`.
    """
    copied = dict(copied or {})
    _check(embedding, output, vocabulary, copied)
    if output is None:
        return Rows(_extend(embedding, OUTPUT_SPREAD, vocabulary, generator, copied), None)
    new = _extend(embedding, 1.0, vocabulary, generator, copied)
    return Rows(new, _extend(output, OUTPUT_SPREAD, vocabulary, generator, copied))


def _extend(
    old: Tensor, spread: float, vocabulary: Vocabulary, generator: torch.Generator, copied: Mapping[str, int]
) -> Tensor:
    wide = old.float()
    deviation, mean = torch.std_mean(wide, dim=0, correction=0)
    shape = (vocabulary.size, old.shape[1])
    drawn = torch.randn(shape, generator=generator, device=generator.device).to(old.device)
    rows = drawn.mul_(spread * deviation).add_(mean).to(old.dtype)
    text = vocabulary.ids("text")
    rows[text.start : text.stop] = old
    for name, index in copied.items():
        rows[getattr(vocabulary, name)] = old[index]
    return rows


def _check(embedding: Tensor, output: Tensor | None, vocabulary: Vocabulary, copied: Mapping[str, int]) -> None:
    pieces = vocabulary.config.num_text_pieces
    if embedding.ndim != 2 or (output is not None and output.shape != embedding.shape):
        shapes = [tuple(weight.shape) for weight in (embedding, output) if weight is not None]
        raise ValueError(f"embedding and output of a base model have one row a text piece, not the shapes {shapes}")
    if len(embedding) != pieces:
        raise ValueError(
            f"the base model has {len(embedding)} rows, but the vocabulary {pieces} text pieces; both must be of the "
            "same text tokenizer"
        )
    for name, index in copied.items():
        if name not in SPECIAL:
            raise ValueError(f"no row of a base model can be copied to {name!r}; there are {', '.join(SPECIAL)}")
        if not 0 <= index < pieces:
            raise ValueError(f"{name} can not take row {index} of a base model with rows 0 .. {pieces - 1}")
