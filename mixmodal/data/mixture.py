"""Which document comes next: sources in shares of tokens, in stages, exactly resumable."""

from __future__ import annotations

import heapq
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mixmodal.data.source import Source, SourceConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Other weights from a step on. Chameleon (arXiv 2405.09818, section 2.2) halves the share of all it trained on
    and adds sources at 80 % of training: give the new ones, together, the sum of the weights that the old ones have.

    Args:
        from_step: the first optimizer step, counted from 0, that is drawn with these weights.
        weights: new weights by source; a source that is not named keeps the weight it has.
    """

    from_step: int
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ShareLimits:
    """How far the share of a source may lie from its natural one, which is its part of all tokens that are there.

    CM3Leon names thresholds of 3 and 0.3 for up- and down-sampling of its tuning tasks (arXiv 2309.02591) and does not
    say of what; here they are factors of the natural share.

    Args:
        up: the largest factor, at least 1.
        down: the smallest factor, 0 .. 1.
    """

    up: float = 3.0
    down: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.down <= 1 <= self.up < float("inf"):
            raise ValueError(
                f"data.share_limits: down is {self.down} (0 .. 1), up is {self.up} (at least 1): factors of the shares "
                "that sources have by their size"
            )

    def apply(self, weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
        """Shares in proportion to the weights, but for the sources at a limit; they sum to 1.

        Args:
            weights: by source; one of weight 0 keeps it, and its size does not count.
            sizes: tokens that a source has, by its name.
        """
        names = sorted(name for name, weight in weights.items() if weight)
        wanted = np.array([weights[name] for name in names])
        natural = np.array([sizes[name] for name in names], np.float64)
        natural /= natural.sum()
        lowest, highest = self.down * natural, self.up * natural
        # the sum of the clipped shares grows with the scale of the weights, along straight lines between these scales
        scales = np.sort(np.concatenate([lowest / wanted, highest / wanted]))
        sums = np.clip(scales[:, None] * wanted, lowest, highest).sum(1)
        shares = np.clip(np.interp(1.0, sums, scales) * wanted, lowest, highest)
        return {**dict.fromkeys(weights, 0.0), **dict(zip(names, shares.tolist()))}


def check_mixture(sources: Mapping[str, SourceConfig], stages: Sequence[StageConfig]) -> None:
    """Whether every source and stage can act.

    Raises:
        ValueError: naming the source or the stage.
    """
    for name in sources:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"data.sources: {name!r} must be made of letters, digits, _ and -: it names metrics")
    steps = [0, *(stage.from_step for stage in stages)]
    for before, step in pairwise(steps):
        if step <= before:
            raise ValueError(f"data.stages: from_step {step} must be above {before}, where the weights before it begin")
    for stage in stages:
        for name, weight in stage.weights.items():
            if name not in sources:
                known = ", ".join(sources) or "none, since data.tokens is given"
                raise ValueError(f"data.stages: from step {stage.from_step}, {name!r} is no source; there are {known}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"data.stages: from step {stage.from_step}, the weight of {name} is {weight}")
        if weights_at(sources, stages, stage.from_step) == weights_at(sources, stages, stage.from_step - 1):
            raise ValueError(f"data.stages: from step {stage.from_step}, the weights are those before it")
    tables = {step: weights_at(sources, stages, step) for step in steps}
    for step, weights in tables.items():
        if not any(weights.values()):
            raise ValueError(f"data: from step {step}, all weights are 0")
    idle = [name for name in sources if not any(weights[name] for weights in tables.values())]
    if idle:
        raise ValueError(f"data.sources.{idle[0]}: its weight is 0 from start to end; leave it out or give it one")


def weights_at(sources: Mapping[str, SourceConfig], stages: Sequence[StageConfig], step: int) -> dict[str, float]:
    """The weight of each source in an optimizer step."""
    weights = {name: source.weight for name, source in sources.items()}
    for stage in stages:
        if stage.from_step <= step:
            weights.update(stage.weights)
    return weights


class Mixture:
    """Draws documents so that tokens are shared as the weights say.

    Next comes the source that has been given the fewest tokens for its weight, as in Megatron-LM's blended data sets,
    counted since the weights are what they are. So shares hold not on average but at every moment, to a document, and
    what is drawn is a function of (seed, number of the draw). Tokens are those that are trained on, with masks.

    Args:
        sources: by name.
        weights: of the first step.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float]) -> None:
        self.sources = dict(sorted(sources.items()))
        self.weights = dict(weights)
        self._line_up()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares from here on. A source that had rested does not catch up."""
        if weights == self.weights:
            return
        self.weights = dict(weights)
        for source in self.sources.values():
            source.drawn = 0
        self._line_up()

    def draw(self) -> tuple[Source, int]:
        """The source that is next and the index of its document; `charge` it before the next draw.

        Raises:
            StopIteration: saying which source is done, where one ends training or all are dropped.
        """
        while self._queue:
            source = self.sources[self._queue[0][1]]
            index = source.take()
            if index is not None:
                return source, index
            if source.config.when_done == "repeat":
                source.repeat()
            elif source.config.when_done == "stop":
                raise StopIteration(f"{source.label} is done, and its when_done is stop")
            else:
                logger.info("%s is done and left out from here on", source.label)
                source.done = True
                heapq.heappop(self._queue)
        raise StopIteration("data: every source that has a weight is done and left out")

    def charge(self, source: Source, tokens: int) -> None:
        """Counts the tokens of the source that `draw` gave last."""
        source.drawn += tokens
        heapq.heapreplace(self._queue, (source.drawn / self.weights[source.name], source.name))

    @property
    def is_done(self) -> bool:
        """Whether every source that has a weight is left out."""
        return not self._queue

    def state_dict(self) -> dict[str, Any]:
        """Plain data; what sources hold is not among it."""
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> None:
        """Weights that were in force, and `Source.state_dict` of each source; one that is new begins at its start."""
        self.weights = {name: state["weights"].get(name, 0.0) for name in self.sources}
        for name, source in self.sources.items():
            if name in places:
                source.load_state_dict(places[name])
        self._line_up()

    def _line_up(self) -> None:
        """The sources that can be drawn, as a heap."""
        self._queue = [
            (source.drawn / self.weights[name], name)
            for name, source in self.sources.items()
            if self.weights[name] and not source.done
        ]
        heapq.heapify(self._queue)


def counters(state: Mapping[str, Any]) -> dict[str, float]:
    """What a stream of documents has trained on so far, by source, for the log.

    Args:
        state: `PackedDocuments.state_dict()`.

    Returns:
        `documents`, `tokens` (with masks, without padding), `epochs` (with the part of the current one that is drawn)
        and `skipped` (documents too long); with retrieval also `retrieved` (documents that stood before those) and
        `left_out` (those that did not fit); behind a slash the source's name, where sources have names. With
        `data.modality_balance` also `answer_share` of each modality: its part of these documents.
    """
    found: dict[str, float] = {}
    answers = dict.fromkeys(state.get("balance", {}).get("shares", {}), 0)
    for name, place in state["sources"].items():
        epochs = round(place["epoch"] + place["position"] / place["num_documents"], 6)
        values = {"documents": place["used"], "tokens": place["tokens"], "epochs": epochs, "skipped": place["too_long"]}
        if place.get("retrieval_sha256"):
            values |= {"retrieved": place["retrieved"], "left_out": place["left_out"]}
        found |= {f"{key}/{name}" if name else key: value for key, value in values.items()}
        if answers:
            answers[name.rpartition("/")[2]] += place["used"]
    total = max(1, sum(answers.values()))
    return found | {f"answer_share/{modality}": round(count / total, 6) for modality, count in answers.items()}
