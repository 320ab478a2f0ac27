"""Modality balance: the shares of answers that are texts, pictures or both, held at every moment.

Chameleon's authors saw that data with too much of one modality teach a prior that exaggerates it, and mute one of which
there is too little (arXiv 2405.09818, section 3). What is muted is the choice of how an answer begins, and every answer
makes it once: a picture of 1,024 codes as a text of ten tokens. So documents are counted here, not tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixmodal.data.mixture import Mixture, ShareLimits, StageConfig
from mixmodal.data.source import Documents, Source, SourceConfig
from mixmodal.data.token_shards import TokenShards

if TYPE_CHECKING:
    from mixmodal.data.retrieved import Retrieval
    from mixmodal.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
BOTH = "both"
"""What answers of several modalities are counted under."""
CHUNK_TOKENS = 1 << 22
"""Tokens that are looked at together, which bounds the memory that this takes."""


class Settings(Protocol):
    """What is asked of a `DataConfig` here."""

    @property
    def modality_balance(self) -> dict[str, float]: ...

    @property
    def share_limits(self) -> ShareLimits | None: ...

    @property
    def stages(self) -> tuple[StageConfig, ...]: ...

    @property
    def shuffle(self) -> bool: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def max_skipped_share(self) -> float: ...

    @property
    def mixture(self) -> dict[str, SourceConfig]: ...

    def weights_at(self, step: int) -> dict[str, float]: ...


def check_balance(shares: Mapping[str, float]) -> None:
    """Whether the shares wanted are some.

    Raises:
        ValueError: naming the one that is none.
    """
    for name, share in shares.items():
        if not 0 <= share < float("inf"):
            raise ValueError(f"data.modality_balance: the share of {name} is {share}; it must be at least 0")
    if shares and sum(share > 0 for share in shares.values()) < 2:
        raise ValueError(
            f"data.modality_balance: {dict(shares)} gives fewer than two modalities a share; name them, as in "
            f"{{text: 0.5, image: 0.5}}, or leave it out"
        )


def modalities_of(shards: TokenShards) -> np.ndarray:
    """Which modalities the answers of each document have, by the tokens that carry loss: uint8 `(documents,)`.

    Bit i stands for `vocabulary.modalities[i]`. A document that is no conversation has none: its `<s>` carries loss,
    which that of a conversation never does. Ids and flags of all documents are read once.
    """
    vocabulary = shards.vocabulary
    found = np.zeros(len(shards), np.uint8)
    done = 0
    for ids, offsets, loss in shards.arrays():
        first, last = 0, len(offsets) - 1
        while loss is not None and first < last:
            stop = int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, side="right")) - 1
            stop = min(max(stop, first + 1), last)
            part = slice(int(offsets[first]), int(offsets[stop]))
            starts = np.asarray(offsets[first : stop + 1]) - offsets[first]
            found[done + first : done + stop] = _kinds(ids[part], loss[part], starts, vocabulary)
            first = stop
        done += last
    return found


def _kinds(ids: np.ndarray, loss: np.ndarray, starts: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Of some documents, which begin at `starts`; the last of these is the end."""
    kinds = np.zeros(len(ids), np.uint8)
    for bit, modality in enumerate(vocabulary.modalities):
        kinds |= vocabulary.contains(modality, ids).view(np.uint8) << bit
    kinds *= loss
    found = np.zeros(len(starts) - 1, np.uint8)
    held = np.flatnonzero(starts[1:] > starts[:-1])  # what is empty has no token to begin at
    found[held] = np.bitwise_or.reduceat(kinds, starts[held]) * (1 - loss[starts[held]])
    return found


def name_modalities(bits: int, modalities: tuple[str, ...]) -> str:
    """The modality of answers, or `both`."""
    names = [name for place, name in enumerate(modalities) if bits >> place & 1]
    return names[0] if len(names) == 1 else BOTH


def build_sources(
    config: Settings, documents: Mapping[str, Documents], *, seed: int, retrieval: Mapping[str, Retrieval]
) -> dict[str, Source]:
    """The sources of a config by name; with `modality_balance` those of each modality apart, as `NAME/MODALITY`.

    Raises:
        ValueError: naming the source and the modality where the balance can not act.
    """
    found: dict[str, Source] = {}
    for name, source in config.mixture.items():
        parts: dict[str | None, np.ndarray | None] = {None: None}
        if config.modality_balance:
            parts = {**_split(Source.label_of(name, source), documents[name], config.modality_balance)}
        for modality, indices in parts.items():
            one = Source(
                name,
                documents[name],
                source,
                shuffle=config.shuffle,
                seq_len=config.seq_len,
                max_skipped_share=config.max_skipped_share,
                seed=seed,
                retrieval=retrieval.get(name),
                modality=modality,
                indices=indices,
            )
            found[one.name] = one
    if config.modality_balance:
        _check_wanted(config, found)
    return found


def _split(label: str, documents: Documents, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Indices of a source's documents by the modality of their answers, without those of share 0."""
    if not isinstance(documents, TokenShards) or not documents.has_loss:
        raise ValueError(
            f"data.modality_balance: {label} holds no conversations, so nothing says what its answers are; leave the "
            "source or the balance out"
        )
    known = documents.vocabulary.modalities
    for name in shares:
        if name not in (*known, BOTH):
            raise ValueError(f"data.modality_balance: {name!r} is no modality; there are {', '.join((*known, BOTH))}")
    bits = modalities_of(documents)
    if len(alone := np.flatnonzero(bits == 0)):
        raise ValueError(
            f"data.modality_balance: {label}: {len(alone)} of {len(bits)} documents, the first of them "
            f"{documents.keys[int(alone[0])]}, are no conversations, so nothing says what their answers are; keep them "
            "in a folder of their own, or leave the balance out"
        )
    found: dict[str, list[np.ndarray]] = {}
    for kind in np.unique(bits).tolist():
        found.setdefault(name_modalities(kind, known), []).append(np.flatnonzero(bits == kind))
    indices = {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
    for name, own in indices.items():
        if name not in shares:
            raise ValueError(
                f"data.modality_balance does not name {name}, which the answers of {len(own)} of {len(bits)} documents "
                f"of {label} are; give its share, of which 0 leaves them out"
            )
        if not shares[name]:
            logger.info("%s: %d documents are left out, for modality_balance gives %s 0", label, len(own), name)
    wanted = {name: own for name, own in indices.items() if shares[name]}
    if not wanted:
        raise ValueError(
            f"data.modality_balance: of {label} nothing is trained on, since {', '.join(indices)} has 0; leave it out"
        )
    return wanted


def _check_wanted(config: Settings, sources: Mapping[str, Source]) -> None:
    """Whether there are documents of each modality wanted, in every stage."""
    for step in (0, *(stage.from_step for stage in config.stages)):
        weights = config.weights_at(step)
        there = {source.modality for source in sources.values() if weights[source.origin]}
        for name, share in config.modality_balance.items():
            if share and name not in there:
                place = f"from step {step}, no source that has a weight has" if config.stages else "there are no"
                raise ValueError(
                    f"data.modality_balance gives {name} a share, but {place} documents whose answers are {name}; "
                    "leave it out, or bring some"
                )


def build_mixture(config: Settings, sources: Mapping[str, Source]) -> Mixture | BalancedMixture:
    """What draws from the sources of a config, with the weights of its first step."""
    weights = weights_of(config, sources, 0)
    if config.modality_balance:
        return BalancedMixture(sources, weights, config.modality_balance, config.share_limits)
    return Mixture(sources, weights)


def weights_of(config: Settings, sources: Mapping[str, Source], step: int) -> dict[str, float]:
    """The weight of each source in a step; within the limits, where there are some: in each modality apart."""
    given = config.weights_at(step)
    weights = {name: given[source.origin] for name, source in sources.items()}
    if config.share_limits is None:
        return weights
    for modality in {source.modality for source in sources.values()}:
        own = {name: weights[name] for name, source in sources.items() if source.modality == modality}
        if any(own.values()):
            weights |= config.share_limits.apply(own, {name: sources[name].size for name in own})
    return weights


class BalancedMixture:
    """Draws documents so that their modalities have shares of the documents, and in each of them sources of the tokens.

    Next comes the modality that has been given the fewest documents for its share, and of it the document that a
    `Mixture` of the sources of this modality gives. So the rare are repeated and the frequent wait, none is dropped
    from an epoch of its own, and what is drawn is a function of (seed, number of the draw).

    Args:
        sources: by name, each of one modality.
        weights: of the first step.
        wanted: shares of modalities, relative to each other.
        limits: how far a share may lie from that which a modality has by the number of its documents.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        wanted: Mapping[str, float],
        limits: ShareLimits | None,
    ) -> None:
        total = sum(wanted.values())
        self.wanted = {name: share / total for name, share in sorted(wanted.items()) if share}
        self._limits = limits
        self._mixtures: dict[str, Mixture] = {}
        for modality in self.wanted:
            own = {name: source for name, source in sources.items() if source.modality == modality}
            self._mixtures[modality] = Mixture(own, {name: weights[name] for name in own})
        self._begin()
        self._tell_limits()

    @property
    def weights(self) -> dict[str, float]:
        """Of all sources; those of one modality are relative to each other."""
        return {name: weight for mixture in self._mixtures.values() for name, weight in mixture.weights.items()}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Weights from here on; where limits then give other shares, these are counted anew."""
        if weights == self.weights:
            return
        for mixture in self._mixtures.values():
            mixture.set_weights({name: weights[name] for name in mixture.weights})
        if self._within_limits() != self.shares:
            self._begin()
            self._tell_limits()

    def draw(self) -> tuple[Source, int]:
        """The source that is next and the index of its document; `charge` it before the next draw.

        Raises:
            StopIteration: saying which source is done, where one ends training or all are dropped.
        """
        while left := [name for name, mixture in self._mixtures.items() if not mixture.is_done]:
            modality = min(left, key=lambda name: (self.taken[name] + 0.5) / self.shares[name])
            try:
                drawn = self._mixtures[modality].draw()
            except StopIteration:
                if not self._mixtures[modality].is_done:
                    raise
                continue  # the others share what was its
            self.taken[modality] += 1
            return drawn
        raise StopIteration("data: every source that has a weight is done and left out")

    def charge(self, source: Source, tokens: int) -> None:
        """Counts the tokens of the source that `draw` gave last."""
        assert source.modality is not None
        self._mixtures[source.modality].charge(source, tokens)

    def state_dict(self) -> dict[str, Any]:
        """Plain data; what sources hold is not among it."""
        return {"weights": self.weights, "balance": {"shares": dict(self.shares), "taken": dict(self.taken)}}

    def load_state_dict(self, state: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> None:
        """See `Mixture.load_state_dict`; shares that have changed since are counted anew."""
        for mixture in self._mixtures.values():
            mixture.load_state_dict(state, places)
        self._begin()
        if state["balance"]["shares"] == self.shares:
            self.taken = dict(state["balance"]["taken"])

    def _begin(self) -> None:
        """Counts from here on."""
        self.shares = self._within_limits()
        self.taken = dict.fromkeys(self.shares, 0)

    def _tell_limits(self) -> None:
        stored = self.stored
        bound = [name for name, share in self.wanted.items() if abs(self.shares[name] - share) > 1e-6]
        if bound and self._limits:
            told = [f"{n} {self.shares[n]:.1%} (wanted {self.wanted[n]:.1%}, stored {stored[n]:.1%})" for n in bound]
            logger.warning(
                "data.modality_balance can not be reached within data.share_limits (up %g, down %g): answers are %s; "
                "widen the limits or bring more documents",
                self._limits.up,
                self._limits.down,
                ", ".join(told),
            )

    def _within_limits(self) -> dict[str, float]:
        return self._limits.apply(self.wanted, self._sizes()) if self._limits else self.wanted

    @property
    def stored(self) -> dict[str, float]:
        """Shares of the modalities in the documents of the sources that have a weight, as they are stored."""
        sizes = self._sizes()
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}

    def _sizes(self) -> dict[str, int]:
        return {
            modality: sum(s.num_documents for name, s in mixture.sources.items() if mixture.weights[name])
            for modality, mixture in self._mixtures.items()
        }
