"""What steers the codes of images: rows of the same sample that know less of its prompt.

A sample has one row for its whole prompt, and as many others as its guidance needs, each with a weight. Logits are
mixed by these weights (classifier-free guidance), or the whole prompt is contrasted with what knows no text (CD-K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Unconditional = Literal["mask", "drop"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How codes follow the prompt; text is never guided.

    With f for the whole prompt, i for its pictures without text and u for neither, the logits are

        u + image_scale (i - u) + text_scale (f - i)

    as in Chameleon's released code and InstructPix2Pix (arXiv 2211.09800, equation 3). A prompt without pictures has
    i = u, and CM3Leon's `u + text_scale (f - u)` is left (arXiv 2309.02591, section 3.2). Rows of no weight are not
    computed: an image_scale of 1, or both scales alike, takes two rows.

    Args:
        text_scale: weight of what the text adds; 1 is none.
        image_scale: weight of what the prompt's pictures add; 1 is none.
        unconditional: how a row goes without: `mask` puts `<mask>` in the place of text (CM3Leon, needs no training
            beyond CM3's objective), `drop` leaves it out (Chameleon).
        contrast_k: k of contrastive decoding CD-K (CM3Leon, section 3.2): codes are drawn by how much likelier the text
            makes them, among those of at least `contrast_alpha` times the probability of the k-th likeliest. 0 is none.
        contrast_alpha: 0 .. 1.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    unconditional: Unconditional = "mask"
    contrast_k: int = 0
    contrast_alpha: float = 0.1

    def __post_init__(self) -> None:
        for name in ("text_scale", "image_scale"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"guidance: {name} is {getattr(self, name)}; it must be a number, 1 for none")
        if self.unconditional not in ("mask", "drop"):
            raise ValueError(f"guidance: unconditional is {self.unconditional!r}; choose mask or drop")
        if self.contrast_k < 0 or not 0 <= self.contrast_alpha <= 1:
            raise ValueError(
                f"guidance: contrast_k is {self.contrast_k} (0 or more), contrast_alpha {self.contrast_alpha} (0 .. 1)"
            )
        if self.contrast_k and (self.text_scale, self.image_scale) != (1, 1):
            raise ValueError("guidance: contrast_k takes the place of the scales; leave them at 1")
        if not self.contrast_k and self.contrast_alpha != 0.1:
            raise ValueError("guidance: contrast_alpha can not act without contrast_k; leave it out")
        if not self.acts and self.unconditional != "mask":
            raise ValueError("guidance: unconditional can not act without a scale or contrast_k; leave it out")

    @property
    def acts(self) -> bool:
        """Whether samples have more rows than one."""
        return bool(self.contrast_k) or (self.text_scale, self.image_scale) != (1, 1)


NO_GUIDANCE = Guidance()


class Stream(NamedTuple):
    """A further row of a sample: `prompt` ids `(T,)` that know less, and the `weight` of its logits.

    A `bare` one is read without its `<s>`, from what opens the picture on (Lumina-mGPT's released code), but behind
    other documents.
    """

    prompt: np.ndarray
    weight: float
    bare: bool = False


def build_streams(
    guidance: Guidance, whole: np.ndarray, without_text: np.ndarray, without_both: np.ndarray, *, bare: bool = False
) -> tuple[float, tuple[Stream, ...]]:
    """The weight of the whole prompt, and the further rows that have one.

    Args:
        whole, without_text, without_both: one prompt as f, i and u, ids `(T,)`.
        bare: whether u, and an i that is the same, are read without `<s>`.
    """

    def stream(prompt: np.ndarray, weight: float) -> Stream:
        return Stream(prompt, weight, bare and np.array_equal(prompt, without_both))

    if guidance.contrast_k:
        return 1.0, (stream(without_text, -1.0),)
    text, image = guidance.text_scale, guidance.image_scale
    weights: dict[bytes, list] = {}
    for prompt, weight in ((whole, text), (without_text, image - text), (without_both, 1 - image)):
        entry = weights.setdefault(prompt.tobytes(), [prompt, 0.0])  # equal prompts have equal logits
        entry[1] += weight
    (_, first), *others = weights.values()
    return first, tuple(stream(prompt, weight) for prompt, weight in others if weight)


def mix(logits: Tensor, weights: Tensor) -> Tensor:
    """Classifier-free guidance: logits `(K, B, C)` of streams to their sum `(B, C)` by `weights` `(K, B)`."""
    return (logits * weights[:, :, None]).sum(dim=0)


def contrast(expert: Tensor, amateur: Tensor, k: int, alpha: float) -> Tensor:
    """CD-K: log-ratios `(B, C)` of the plausible codes, -inf for the others (CM3Leon, equations 3 and 4).

    Args:
        expert, amateur: logits `(B, C)` with and without the text.
        k, alpha: plausible is what has at least `alpha` times the k-th largest probability of the expert.
    """
    likely, unlikely = expert.log_softmax(dim=1), amateur.log_softmax(dim=1)
    bar = likely.exp().topk(min(k, likely.shape[1]), dim=1).values[:, -1:] * alpha
    return (likely - unlikely).masked_fill(likely.exp() < bar, -torch.inf)


def steer(guidance: Guidance, logits: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
    """Logits `(S, B, C)` of the streams, the whole prompt first, to those that are drawn from, `(B, C)`."""
    if guidance.contrast_k:
        return contrast(logits[0], logits[1], guidance.contrast_k, guidance.contrast_alpha)
    return mix(torch.as_tensor(logits), weights)
