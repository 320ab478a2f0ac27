"""Preferences: of two answers to one prompt, the chosen one is to gain on the rejected one, as a reference sees them.

DPO (Rafailov et al., arXiv 2305.18290, equation 7), with log-probabilities that are sums over the tokens of an answer,
text and codes alike. The length-normalised variant, that of Tulu 3 (arXiv 2411.15124), divides them by the number of
tokens. Labels may be smoothed (conservative DPO, of arXiv 2305.18290's authors), and chosen answers be learnt as in
instruction tuning beside it, as in arXiv 2404.19733.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmodal.objectives.loss import Sums, target_weights
from mixmodal.objectives.output_loss import OutputLoss
from mixmodal.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is made of the preferences.

    Args:
        beta: how strongly a change of the log-probabilities counts, above 0; a small one lets the model go far from the
            reference. Sums of log-probabilities take 0.1 or less, means per token more (Tulu 3: 5).
        length_normalised: log-probabilities are divided by the number of an answer's tokens.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round, 0 .. below 0.5.
        sft_weight: factor of the chosen answer's negative log-likelihood, nats a token, in the loss.
    """

    beta: float = 0.1
    length_normalised: bool = False
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"preference: beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference: label_smoothing is {self.label_smoothing}; it must lie in 0 .. below 0.5")
        if not 0 <= self.sft_weight < float("inf"):
            raise ValueError(f"preference: sft_weight is {self.sft_weight}; it must be at least 0")


class Pairs(NamedTuple):
    """Packed rows whose segments 1 and 2 are a pair, 3 and 4 the next one: the chosen answer, then the rejected one.

    Args:
        tokens, segment_ids: `(B, T)` int64.
        answers: `(B, T)` bool, the tokens that an answer is judged by.
        reference: `(B, S)` float32, log-probabilities of the answers under the reference in nats; S is even, and 0
            stands where a row has fewer segments.
    """

    tokens: Tensor
    segment_ids: Tensor
    answers: Tensor
    reference: Tensor

    @property
    def counts(self) -> Tensor:
        """Tokens of each segment's answer, `(B, S)` float32; 0 where there is none."""
        return self.sum_answers(self.answers.float())

    @property
    def exist(self) -> Tensor:
        """`(B, S / 2)` bool: where there is a pair."""
        return (self.counts > 0).unflatten(-1, (-1, 2)).all(-1)

    def sum_answers(self, values: Tensor) -> Tensor:
        """Sums of `(B, T)` over the answer of each segment, `(B, S)`."""
        sums = values.new_zeros(len(values), self.reference.shape[1] + 1)
        found = torch.where(target_weights(self.segment_ids, self.answers) != 0, values, 0.0)
        return sums.scatter_add(1, self.segment_ids, found)[:, 1:]


def preference_losses(logps: Tensor, pairs: Pairs, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """The loss of each pair and its reward margin, both `(B, S / 2)`; 0 where there is no pair.

    `-log sigmoid(margin)` with `margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))`, of sums of log-probabilities or,
    length-normalised, of means.

    Args:
        logps: of the answers under the model, `(B, S)` float32.
        pairs: with those under the reference.
        config: see there.
    """
    counts = pairs.counts.clamp_min(1)
    ratios = logps - pairs.reference
    rewards = config.beta * (ratios / counts if config.length_normalised else ratios)
    chosen, rejected = rewards.unflatten(-1, (-1, 2)).unbind(-1)
    margin, share = chosen - rejected, config.label_smoothing
    loss = -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)
    if config.sft_weight:
        loss = loss - config.sft_weight * (logps / counts)[:, ::2]
    return torch.where(pairs.exist, loss, 0.0), torch.where(pairs.exist, margin, 0.0)


Reduced = tuple[Tensor, Tensor]
"""The sum of the pairs' losses, a scalar with gradient, and the answers' log-probabilities, `(B, S)` without one."""


class PreferenceLoss:
    """The loss of pairs without logits of all positions at once, to be given to `Transformer.forward` as `reduce`.

    The gradient of a pair's loss is that of a sum of log-likelihoods, whose weights, one for each answer, follow from
    the answers' log-probabilities. So the output layer is gone through twice: for these, and for the gradient.

    Args:
        pairs: see there.
        vocabulary: of the tokens.
        config: see there.
        chunk_elements: see `OutputLoss`.
    """

    def __init__(
        self, pairs: Pairs, vocabulary: Vocabulary, config: PreferenceConfig, *, chunk_elements: int | None = None
    ) -> None:
        self.pairs, self.vocabulary, self.config = pairs, vocabulary, config
        self.chunk_elements = chunk_elements

    def __call__(self, hidden: Tensor, weight: Tensor) -> Reduced:
        """Loss of `hidden` `(B, T, D)` under the output matrix `(V, D)`."""
        pairs = self.pairs
        with torch.no_grad():
            nll = self._output_loss(pairs.answers.float())(hidden, weight)[1]
            logps = -pairs.sum_answers(nll.roll(1, dims=1))  # a token's stands where it is predicted, one before
        with torch.enable_grad():
            leaf = logps.requires_grad_()
            loss = preference_losses(leaf, pairs, self.config)[0].sum()
            (slopes,) = torch.autograd.grad(loss, leaf)
        loss, logps = loss.detach(), logps.detach()
        if not torch.is_grad_enabled():
            return loss, logps
        by_segment = torch.cat([torch.zeros_like(slopes[:, :1]), -slopes], dim=1)
        objective = self._output_loss(by_segment.gather(1, pairs.segment_ids) * pairs.answers)(hidden, weight)[0]
        return loss + (objective - objective.detach()), logps

    def _output_loss(self, weights: Tensor) -> OutputLoss:
        tokens, segments = self.pairs.tokens, self.pairs.segment_ids
        return OutputLoss(tokens, segments, weights, self.vocabulary, chunk_elements=self.chunk_elements)

    def collect(self, reduced: Reduced) -> dict[str, Sums]:
        """Sums and counts to report.

        Over pairs: `loss`; `accuracy`, the share of pairs whose chosen answer gained more than the rejected one (with
        `_text` and `_image`, of pairs whose chosen answer is text alone, or has codes of that modality);
        `reward_margin`, `reward_chosen` and `reward_rejected` (`beta` times the log-ratio to the reference).

        Over the tokens of answers, nats a token: `log_ratio_chosen` and `log_ratio_rejected`, the mean of
        `log pi - log ref`; `nll_chosen`; and `kl_estimate`, the mean of `log ref - log pi` over both answers. That
        estimates the divergence KL(ref || pi) where answers are samples of the reference, and only as far as choosing
        the best and the worst of them has not changed what they are; of other answers it is no more than a mean.
        """
        loss, logps = reduced
        pairs, config = self.pairs, self.config
        exist, counts = pairs.exist, pairs.counts
        margin = preference_losses(logps, pairs, config)[1]
        ratios = torch.where(counts > 0, logps - pairs.reference, 0.0)
        rewards = config.beta * (ratios / counts.clamp_min(1) if config.length_normalised else ratios)
        num_pairs, wins = exist.sum().float(), (margin > 0) & exist
        tokens = counts.sum(0)
        chosen, rejected = counts[:, ::2].sum(), counts[:, 1::2].sum()
        found = {
            "loss": Sums(loss.detach(), num_pairs),
            "accuracy": Sums(wins.sum().float(), num_pairs),
            "reward_margin": Sums(margin.sum(), num_pairs),
            "reward_chosen": Sums(rewards[:, ::2].sum(), num_pairs),
            "reward_rejected": Sums(rewards[:, 1::2].sum(), num_pairs),
            "log_ratio_chosen": Sums(ratios[:, ::2].sum(), chosen),
            "log_ratio_rejected": Sums(ratios[:, 1::2].sum(), rejected),
            "nll_chosen": Sums(-logps[:, ::2].sum(), chosen),
            "kl_estimate": Sums(-ratios.sum(), tokens.sum()),
        }
        is_text = exist
        for name in self.vocabulary.config.codebook_sizes:
            codes = self.vocabulary.contains(name, pairs.tokens)
            having = exist & (pairs.sum_answers(codes.float())[:, ::2] > 0)
            is_text = is_text & ~having
            found[f"accuracy_{name}"] = Sums((wins & having).sum().float(), having.sum().float())
        found["accuracy_text"] = Sums((wins & is_text).sum().float(), is_text.sum().float())
        return found
