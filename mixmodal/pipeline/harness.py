"""What lm-evaluation-harness asks of a language model, of the texts of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixmodal.classification.likelihoods import ScoredSequence, SequenceScorer
from mixmodal.document import Document, Text
from mixmodal.evaluation.text import score_texts
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.queue import Ask, Drawn

MAX_NEW_TOKENS = 256
"""Where a task does not say how many."""
ACTING = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class Continuation(NamedTuple):
    """Log-likelihood in nats, and whether greedy drawing gives the same."""

    total: float
    is_greedy: bool


class TextHarness:
    """Texts alone: a prompt is one text that goes on.

    Args:
        model: asked.
    """

    def __init__(self, model: MixedModal) -> None:
        self.model = model
        self._scorer = SequenceScorer(model.model, model.format, model.batch_size)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """Each continuation behind its context, which may be empty; the end of the text is not scored.

        Of a context that does not fit with the continuation the start is left out.

        Raises:
            ValueError: for an empty continuation, or one longer than the model's context.
        """
        sequences = [self._spell(*pair) for pair in pairs]
        totals, misses = self._scorer.score(sequences).totals, self._scorer.count_misses(sequences)
        return [Continuation(float(total), not missed) for total, missed in zip(totals, misses, strict=True)]

    def _spell(self, context: str, continuation: str) -> ScoredSequence:
        stripped = context.rstrip()  # white space belongs to the piece behind it
        continuation = context[len(stripped) :] + continuation
        if not continuation.strip():
            raise ValueError(f"the continuation of {context[-40:]!r} is empty")
        lead, whole = self._pieces(stripped + continuation)
        start = len(self._pieces(stripped)[1]) if stripped else 0
        start = min(start, len(whole) - 1)  # pieces may join over the border; something is scored
        room = self.model.model.config.max_seq_len - len(lead)
        if len(whole) - start > room:
            raise ValueError(f"a continuation of {len(whole) - start} pieces does not fit into the model's {room}")
        left_out = max(0, len(whole) - room)
        ids = np.concatenate([lead, whole[left_out:]]).astype(np.int64)
        return ScoredSequence(ids, np.arange(len(ids)) >= len(lead) + start - left_out)

    def _pieces(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """What stands before a text, and its pieces; ids."""
        ids = self.model.format.spell(Document([Text(text)]))
        content = np.flatnonzero(self.model.format.vocabulary.is_content(ids))
        return ids[: content[0]], ids[content[0] : content[-1] + 1]

    def score_whole(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihoods of whole texts of any length, in nats; see `rolling_windows`."""
        return score_texts(self._scorer, texts).totals.tolist()

    def generate_until(self, asked: Sequence[tuple[str, Mapping[str, Any]]], seed: int = 0) -> list[str]:
        """What follows each context, up to one of the texts `until`, which is left out.

        Args:
            asked: contexts, each with `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`; without
                `do_sample` or a temperature the likeliest pieces are taken.
            seed: of samples.

        Raises:
            ValueError: for an option that can not act, or a context behind which nothing fits.
        """
        found = [""] * len(asked)
        groups: dict[str, list[int]] = {}
        for place, (_, options) in enumerate(asked):
            groups.setdefault(repr(sorted(options.items())), []).append(place)
        for places in groups.values():
            options = dict(asked[places[0]][1])
            if idle := [name for name in options if name not in ACTING]:
                raise ValueError(f"generation option {idle[0]!r} can not act; choose {', '.join(ACTING)}")
            room = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
            asks = [Ask(str(place), self._cut(asked[place][0], room), seed=seed + place) for place in places]
            drawn = self.model.generate_each(asks, "text", max_new_tokens=room, **_sampling(options))
            for one in drawn:
                if not isinstance(one, Drawn):
                    raise one.error
                found[int(one.key)] = cut_at(str(one.sample), options.get("until") or [])
        return found

    def _cut(self, context: str, room: int) -> str:
        """The context without the start that does not fit beside `room` new pieces."""
        lead, pieces = self._pieces(context) if context.strip() else (np.zeros(1), np.zeros(0))
        most = self.model.model.config.max_seq_len - len(lead) - room - 1
        if most < 1:
            raise ValueError(f"max_gen_toks is {room}; the model's context leaves no place for a prompt beside it")
        if len(pieces) <= most:
            return context
        vocabulary = self.model.format.vocabulary
        kept = np.asarray(vocabulary.from_ids("text", pieces[len(pieces) - most :]))
        return self.model.codec.text_tokenizer.decode(kept.tolist())


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
    if options.get("do_sample") is False:
        temperature = 0.0
    return {"temperature": temperature, "top_k": options.get("top_k"), "top_p": options.get("top_p")}


def cut_at(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of the texts `until`."""
    stops = [until] if isinstance(until, str) else until
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]
