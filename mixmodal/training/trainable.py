"""What of a network is trained: parameters by name, and of the matrices with a row a token, some rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mixmodal.models.transformer import TOKEN_MATRICES
from mixmodal.training.optimizer import leave_undecayed
from mixmodal.vocabulary import Vocabulary

TRAINED_ROWS = "trained_rows"
"""Attribute of a matrix of which only so many rows are trained."""


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """What is trained; all else is frozen bit for bit, without gradients and optimizer states.

    Args:
        parameters: names of parameters or of modules, such as `output`, `blocks.31` or `blocks.*.ffn`, with `*` for
            anything; all by default.
        rows: of embedding and output, those of these tokens alone: a range of the vocabulary (`image`, `text`,
            `special`, `control`, `sentinel`, `reserved`, another coded modality) or a single control token (`bos`,
            `pad`, `eos`, `unk`, `end_of_span`, `break`, `end_of_turn`); all by default. A matrix with frozen rows is
            not decayed, and has optimizer states for all of its rows.
    """

    parameters: list[str] = field(default_factory=lambda: ["*"])
    rows: list[str] = field(default_factory=list)


def restrict(model: nn.Module, config: TrainableConfig, vocabulary: Vocabulary, key: str = "trainable") -> None:
    """Freezes what `config` does not name.

    Rows are kept apart where the gradient of a matrix comes in, before it is added to what has come before: there ZeRO
    stages 1 to 3, which take gradients away as soon as they are whole, see it already masked. What is frozen has a
    gradient of zero, moments of zero and no decay, so that AdamW leaves it as it is; and norms are those of what is
    trained.

    Args:
        model: with the parameters `TOKEN_MATRICES`, of which the output is absent where it is tied.
        key: of the config, for messages.

    Raises:
        ValueError: naming the entry that can not act.
    """
    parameters = dict(model.named_parameters())
    chosen = choose_names(parameters, config.parameters, f"{key}.parameters")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    spans = choose_rows(vocabulary, config.rows, f"{key}.rows")
    matrices = [name for name in TOKEN_MATRICES if name in chosen]
    if spans and not matrices:
        raise ValueError(
            f"{key}.rows {config.rows} can not act: {key}.parameters {config.parameters} has neither embedding "
            "nor output"
        )
    for name in matrices if spans else ():
        keep_rows(parameters[name], spans)


def choose_names(
    names: Iterable[str], patterns: Sequence[str], key: str = "trainable.parameters", what: str = "parameter"
) -> set[str]:
    """Those that a pattern names, or that stand below a module that it names.

    Args:
        key: of the config, for messages.
        what: the names are of.

    Raises:
        ValueError: for a pattern that names nothing, or where there is none.
    """
    chosen: set[str] = set()
    names = list(names)
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"{key}: {pattern!r} names no {what}; the network has {tops}")
        chosen |= found
    if not chosen:
        raise ValueError(f"{key} is empty; leave it out to train all of the network")
    return chosen


def choose_rows(vocabulary: Vocabulary, names: Iterable[str], key: str = "trainable.rows") -> list[range]:
    """Ids in stretches that do not touch, in order.

    Raises:
        ValueError: naming the entry that the vocabulary does not have.
    """
    stretches: list[range] = []
    for name in names:
        try:
            stretches.append(vocabulary.named(name))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    merged: list[range] = []
    for one in sorted(stretches, key=lambda ids: ids.start):
        if merged and one.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, one.stop))
        else:
            merged.append(one)
    return merged


def keep_rows(parameter: nn.Parameter, spans: Sequence[range]) -> None:
    """Lets only these rows of a matrix be trained."""

    def keep(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        for ids in spans:
            kept[ids.start : ids.stop] = gradient[ids.start : ids.stop]
        return kept

    parameter.register_hook(keep)
    setattr(parameter, TRAINED_ROWS, sum(map(len, spans)))
    leave_undecayed(parameter)
