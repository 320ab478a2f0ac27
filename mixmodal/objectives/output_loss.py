"""Output layer and loss in one, by chunks of positions: logits of a few positions exist at a time, never all.

`OutputLoss` goes into the forward of the network, which calls it with the last hidden states and the output matrix.
Value and gradients are those of `token_losses` over the logits. The weights of all positions are known before, so the
gradients of hidden states and matrix are found while a chunk's logits stand, and backward only scales them: three
matrix products a chunk, as without chunks (the idea of Liger, arXiv 2410.10989).

Shapes: B batch, T tokens, R = B T positions, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixmodal.models.packed_rows import is_readable
from mixmodal.objectives.loss import Sums, TokenLosses, next_token_targets, sum_losses, weighted
from mixmodal.vocabulary import Vocabulary

CHUNK_ELEMENTS = {"cpu": 2**22}
"""Logits that stand at a time. Measured on CPU cores; the matrix product of an accelerator needs more positions."""
DEFAULT_CHUNK_ELEMENTS = 2**27
FLOAT16_PEAK = 2.0**14
"""Products in float16 are scaled to stay below it, a quarter of its range."""

Reduced = tuple[Tensor, Tensor, Tensor, Tensor]
"""What the output layer gives in training: the objective, a scalar with gradient; and, `(B, T)` float32 without one,
negative log-likelihood of the targets, log-partition, and length of the logits. These are 0 where nothing is
learned nor measured. A plain tuple: DeepSpeed looks for tensors in nothing else."""


class OutputLoss:
    """Next-token loss of packed rows, to be given to `Transformer.forward` as `reduce`.

    Args:
        tokens, segment_ids, loss_weights, vocabulary, z_loss_weight: those of `token_losses`.
        measure: also find the length of the logits at every position that is not padding.
        chunk_elements: logits that stand at a time; by default what suits the device of the hidden states.
    """

    def __init__(
        self,
        tokens: Tensor,
        segment_ids: Tensor,
        loss_weights: Tensor,
        vocabulary: Vocabulary,
        z_loss_weight: float = 0.0,
        *,
        measure: bool = False,
        chunk_elements: int | None = None,
    ) -> None:
        self.targets, self.weights = next_token_targets(tokens, segment_ids, loss_weights)
        self.vocabulary, self.z_loss_weight = vocabulary, z_loss_weight
        self.measured = segment_ids != 0 if measure else None
        self.chunk_elements = chunk_elements

    def __call__(self, hidden: Tensor, weight: Tensor) -> Reduced:
        """Loss of `hidden` `(B, T, D)` under the output matrix `(V, D)`, in the type that autocast asks for."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        measured = None if self.measured is None else self.measured.reshape(-1)
        if not torch.is_grad_enabled():  # a function is told what its inputs need, also where nobody asks for it
            hidden, weight = hidden.detach(), weight.detach()
        with torch.autocast(device, enabled=False):
            objective, *found = _OutputLoss.apply(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                self.targets.reshape(-1),
                self.weights.reshape(-1),
                measured,
                self.z_loss_weight,
                dtype,
                self.chunk_elements or CHUNK_ELEMENTS.get(device, DEFAULT_CHUNK_ELEMENTS),
            )  # type: ignore[misc]
        nll, log_z, norms = (values.view(self.targets.shape) for values in found)
        return objective, nll, log_z, norms

    def collect(self, reduced: Reduced) -> TokenLosses:
        """The sums of `token_losses`, and `logit_norm` where it is measured."""
        objective, nll, log_z, norms = reduced
        found = sum_losses(nll, log_z, self.targets, self.weights, self.vocabulary)
        metrics = found.metrics
        if self.measured is not None:
            metrics["logit_norm"] = Sums((norms * self.measured).sum(), self.measured.sum().float())
        return TokenLosses(objective=objective, weight=found.weight, metrics=metrics)


class _OutputLoss(torch.autograd.Function):
    """Objective, and per position nll, log-partition and length of the logits; see `OutputLoss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        measured: Tensor | None,
        z_loss_weight: float,
        dtype: torch.dtype,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = weights != 0 if measured is None else (weights != 0) | measured
        rows = wanted.nonzero().squeeze(-1) if is_readable(wanted) else None
        per_row = [values if rows is None else values[rows] for values in (targets, weights)]
        used_hidden = (hidden if rows is None else hidden[rows]).to(dtype)
        used_weight = weight.to(dtype)
        grads = _Gradients.build(ctx.needs_input_grad[:2], used_hidden, used_weight)
        found = torch.empty(3, len(used_hidden), dtype=torch.float32, device=hidden.device)
        chunk_len = max(1, chunk_elements // len(weight))
        buffer = torch.empty(min(chunk_len, len(used_hidden)), len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(used_hidden), chunk_len):
            chunk = slice(start, start + chunk_len)
            logits = _logits(used_hidden[chunk], used_weight, buffer)
            ids, scale = per_row[0][chunk, None], per_row[1][chunk, None]
            if measured is not None:
                found[2, chunk] = torch.linalg.vector_norm(logits, dim=-1)
            at_targets, tops = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
            sums = logits.sub_(tops).exp_().sum(-1, keepdim=True)
            log_z = tops + sums.log()
            found[0, chunk], found[1, chunk] = (log_z - at_targets).squeeze(-1), log_z.squeeze(-1)
            if grads is not None:
                # d nll / d logits = softmax - one_hot(target); d log_z^2 / d logits = 2 log_z softmax
                logits.mul_(torch.where(scale != 0, scale * (1 + 2 * z_loss_weight * log_z), 0.0) / sums)
                logits.scatter_add_(-1, ids, -scale)
                grads.add(chunk, logits)
        nll, log_z, norms = found if rows is None else found.new_zeros(3, len(targets)).index_copy_(1, rows, found)
        objective = weighted(nll, weights).sum()
        if z_loss_weight:
            objective = objective + z_loss_weight * weighted(log_z.square(), weights).sum()
        if measured is None:
            norms = torch.zeros_like(nll)
        ctx.mark_non_differentiable(nll, log_z, norms)
        ctx.shapes, ctx.dtypes, ctx.rows = (hidden.shape, weight.shape), (hidden.dtype, weight.dtype), rows
        ctx.save_for_backward(*([] if grads is None else (grads.hidden, grads.weight)))
        return objective, nll, log_z, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        if hidden is not None:
            hidden = hidden.mul_(grad).to(ctx.dtypes[0])
            if ctx.rows is not None:
                hidden = hidden.new_zeros(ctx.shapes[0]).index_copy_(0, ctx.rows, hidden)
        if weight is not None:
            weight = weight.mul_(grad).to(ctx.dtypes[1])
        return hidden, weight, None, None, None, None, None, None


class _Gradients(NamedTuple):
    """Sums over chunks of the gradients of hidden states and matrix; None for one that nobody needs."""

    inputs: tuple[Tensor, Tensor]
    hidden: Tensor | None
    weight: Tensor | None

    @staticmethod
    def build(needed: tuple[bool, bool], hidden: Tensor, weight: Tensor) -> _Gradients | None:
        if not any(needed):
            return None
        return _Gradients(
            (hidden, weight),
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,  # a long sum: not in half precision
        )

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """Takes the gradient of a chunk's logits, float32, which may be overwritten."""
        hidden, weight = self.inputs
        logits = gradient.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(logits, weight, out=self.hidden[chunk])
        if self.weight is not None and hidden.dtype == torch.float32:
            self.weight.addmm_(logits.t(), hidden[chunk])
        elif self.weight is not None and hidden.dtype == torch.float16:
            self._add_scaled(hidden[chunk], gradient)
        elif self.weight is not None:
            self.weight.add_(logits.t() @ hidden[chunk])

    def _add_scaled(self, hidden: Tensor, gradient: Tensor) -> None:
        """Adds a product of float16 to the matrix's gradient, each row of it at a scale of its own.

        A token that is often the target has a sum beyond float16 whatever the scale of the loss, which only comes
        behind; a rare one has terms below it. Overwrites `gradient`.
        """
        assert self.weight is not None
        # no sum can be above the sum of absolute terms times the largest hidden value, nor any term above its sum
        most = torch.linalg.vector_norm(gradient, ord=1, dim=0) * hidden.abs().amax().float().clamp_min(1)
        scale = FLOAT16_PEAK / most.clamp_min(FLOAT16_PEAK * 1e-30)
        product = gradient.mul_(scale).half().t() @ hidden
        self.weight.addcdiv_(product, scale[:, None])


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logits `(R, V)` float32, in the memory of `buffer`."""
    logits = buffer[: len(hidden)]
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=logits)
    return logits.copy_(hidden @ weight.t())
