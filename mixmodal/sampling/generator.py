"""The sampler over ids: prompts in, new ids out, samples independent of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np

from mixmodal.document import SequenceError, SequenceFormat
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.engine import Engine, Kind, Progress, Recorder, Request, build_grammar, record_graph, start
from mixmodal.sampling.grammar import INFILL, Grammar, Template
from mixmodal.sampling.guidance import NO_GUIDANCE, Guidance, Stream
from mixmodal.sampling.rules import TokenSampling

LONG, MOST_BYTES = 16, 4 << 30
"""Samples from so many tokens on, of models of so many bytes at most, are drawn with weights that are copied into the
layout which is best for it."""


class SequenceGenerator:
    """Continues prompts token by token.

    Args:
        model: the network, in evaluation mode.
        format: the sequence format it was trained on.
        batch_size: most samples that are drawn at a time; where one ends, the next begins. They do not depend on it.
    """

    def __init__(self, model: Transformer, format: SequenceFormat, batch_size: int = 64) -> None:
        self.model, self.format, self.batch_size = model, format, batch_size
        self.record: Recorder | None = None
        """How steps are recorded, see `Engine`."""
        self._grammars: dict[Kind, Grammar | Template] = {}

    def accelerate(self, *, cuda_graphs: bool = False, compile: bool = False) -> None:
        """Spares the host work on a CUDA device; samples stay the same but for rounding.

        Args:
            cuda_graphs: launches each step within pictures as one graph, in place of hundreds of kernels.
            compile: lets torch.compile make one program of each block of the network.

        Raises:
            ValueError: on another device: none gains by it (on a processor, compiled blocks take longer).
        """
        device = self.model.embedding.weight.device
        if device.type != "cuda" and (cuda_graphs or compile):
            raise ValueError(f"cuda_graphs and compile are for a CUDA device, not for {device}; leave them out")
        self.record = record_graph if cuda_graphs else None
        if compile and not self.model.is_compiled:
            self.model.compile_blocks(dynamic=None)

    def request(
        self,
        prompt: np.ndarray,
        seed: int | Sequence[int],
        output: str = "mixed",
        *,
        weight: float = 1.0,
        streams: Sequence[Stream] = (),
        max_new_tokens: int | None = None,
        before: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> Request:
        """One sample to draw, with the room that the model's context leaves it.

        Args:
            prompt, seed, output, weight, streams, known: see `Request`.
            max_new_tokens: most tokens behind the prompt; None is as many as fit into the model's `max_seq_len`.
            before: what is read before the prompt, in place of its `<s>`: what `format.prefix` gives for retrieved
                documents or shots. All streams read it.

        Raises:
            SequenceError: for a `before` that is nothing of the kind.
            ValueError: for guidance of text, or codes that are given where there is no block for them.
        """
        before = self.format.prefix([]) if before is None else before
        vocabulary, block = self.format.vocabulary, self.format.blocks.get(output)
        ends = [vocabulary.bos, self.format.boundary if len(before) > 1 else vocabulary.bos]
        if not len(before) or [before[0], before[-1]] != ends:
            raise SequenceError("what stands before a prompt is not what the format's `prefix` gives")
        if streams and output in ("text", INFILL):
            raise ValueError(f"guidance acts on coded modalities only; leave it out for the output {output!r}")
        if known is not None and max_new_tokens is not None:
            raise ValueError("max_new_tokens can not act where the tokens are known; leave it out")
        if known is not None and (block is None or not len(known)):
            raise ValueError(
                f"{0 if block else len(known)} tokens are known; the output must be of codes, not {output!r}"
            )
        has_turns = vocabulary.end_of_turn in prompt
        request = Request(prompt, seed, output, 0, before, weight, tuple(streams), known, has_turns)
        if known is not None:
            return request._replace(room=len(known))
        most = self.model.config.max_seq_len if max_new_tokens is None else max_new_tokens
        if block is not None:
            most = min(most, max(block.length + 2, block.num_tokens() + 1))  # with the tokens that open and close it
        return request._replace(room=max(0, min(most, self.model.config.max_seq_len - request.length)))

    def check(self, request: Request) -> None:
        """Whether a request can be drawn, before others are drawn with it.

        Raises:
            SequenceError: for a prompt that the format does not allow or behind which the output does not fit.
        """
        if request.kind not in self._grammars:
            self._grammars[request.kind] = build_grammar(self.format, request.kind, self.model.config.vocab_size)
        start(self._grammars[request.kind], request, self.model.config.max_seq_len)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Mapping[str, TokenSampling] | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> list[np.ndarray]:
        """New ids behind each prompt, int64 `(n,)`, up to and with the token that ended them; see `stream`."""
        found: list[list[np.ndarray]] = [[] for _ in requests]
        for progress in self.stream(requests, sampling, guidance):
            found[progress.number].append(progress.ids)
        return [np.concatenate(parts) for parts in found]

    def stream(
        self,
        requests: Sequence[Request],
        sampling: Mapping[str, TokenSampling] | None = None,
        guidance: Guidance = NO_GUIDANCE,
        chunk: int = 1 << 20,
    ) -> Iterator[Progress]:
        """What is drawn of each request, as it comes, and the last piece of each marked as such; see `rounds`."""
        for pieces in self.rounds(requests, sampling, guidance, chunk):
            yield from pieces

    def rounds(
        self,
        requests: Sequence[Request],
        sampling: Mapping[str, TokenSampling] | None = None,
        guidance: Guidance = NO_GUIDANCE,
        chunk: int = 1 << 20,
    ) -> Iterator[list[Progress]]:
        """The pieces of all requests that are being drawn, each time that the device is looked at.

        Args:
            requests: of `request`, of any outputs.
            sampling: settings by modality, as `{"image": TokenSampling(top_k=50)}`.
            guidance: how the streams of requests are mixed.
            chunk: most tokens of a piece.

        Raises:
            SequenceError: for a prompt that the format does not allow or behind which the output does not fit.
            ValueError: for settings that can not act.
        """
        if not requests:
            return
        num_slots = min(self.batch_size, len(requests))
        engine = Engine(
            self.model,
            self.format,
            num_slots=num_slots,
            num_rows=num_slots * max(1 + len(request.streams) for request in requests),
            length=min(self.model.config.max_seq_len, max(request.length for request in requests)),
            sampling=sampling,
            guidance=guidance,
            chunk=chunk,
            record=self.record,
        )
        for number, request in enumerate(requests):
            engine.start(request, number)  # none is drawn where one can not be
        waiting = list(enumerate(requests))[::-1]
        with self.model.blocked() if self._pays_to_block(requests) else nullcontext():
            while waiting or len(engine):
                added: list[tuple[int, Request]] = []
                while waiting and len(engine) + len(added) < num_slots:
                    added.append(waiting.pop())
                if added:
                    engine.add(added)
                yield engine.advance()

    def _pays_to_block(self, requests: Sequence[Request]) -> bool:
        """Whether copies of the weights are worth their time and memory; there are none but on a processor."""
        weights = sum(one.numel() * one.element_size() for one in self.model.parameters())
        return max(request.room for request in requests) >= LONG and weights <= MOST_BYTES
