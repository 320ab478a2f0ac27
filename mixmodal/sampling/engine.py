"""Decodes samples side by side: each at its own place, in text or in a picture, with rows for its guidance.

Shapes: S slots (samples that are being drawn), R rows of the network (one or more a slot), T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import SequenceFormat
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.grammar import Grammar, State, Template
from mixmodal.sampling.guidance import NO_GUIDANCE, Guidance, Stream, steer
from mixmodal.sampling.rules import TokenSampling, build_rules, draw, draw_uniforms, penalise_repetition

FREE = -1
"""Marks codes that are drawn, among those that are given."""
SPAN, LEAST_STEPS = 256, 16
"""With a recorder, attention looks at a multiple of so many slots; fewer steps than these are not worth recording."""
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def record_graph(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step: the host launches it as one, in place of each kernel.

    The step must have been called before, act on tensors in place alone, and not wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Kind(NamedTuple):
    """What requests have in common that follow the same grammar; see `Request`."""

    output: str
    is_known: bool
    has_turns: bool


class Request(NamedTuple):
    """One sample to draw.

    Args:
        prompt: ids `(T,)` from `<s>` on.
        seed: equal seeds give equal samples, whatever else is drawn.
        output: `text`, a coded modality such as `image` (exactly one), or `mixed` (until `</s>`).
        room: tokens that may follow.
        before: what is read before the prompt, in place of its `<s>`: what the format's `prefix` gives.
        weight, streams: of the logits of codes; see `build_streams`.
        known: the tokens of the sample, `(n,)`, `FREE` where a code of `output` is drawn; it has these n and no more.
            The prompt then need not be one of the format: this is how codes are drawn into a picture.
        has_turns: whether an end of turn may end it, as behind a prompt with one.
    """

    prompt: np.ndarray
    seed: int | Sequence[int]
    output: str
    room: int
    before: np.ndarray
    weight: float = 1.0
    streams: tuple[Stream, ...] = ()
    known: np.ndarray | None = None
    has_turns: bool = False

    @property
    def kind(self) -> Kind:
        """Requests of one kind follow the same grammar."""
        return Kind(self.output, self.known is not None, self.has_turns)

    @property
    def rows(self) -> list[np.ndarray]:
        """What each row of the network reads first, the whole prompt before the others."""
        rows = [np.concatenate([self.before, self.prompt[1:]])]
        for stream in self.streams:
            start = 1 if stream.bare and len(self.before) == 1 else 0
            rows.append(np.concatenate([self.before, stream.prompt[1:]])[start:])
        return [row.astype(np.int64) for row in rows]

    @property
    def length(self) -> int:
        """Slots of the cache that it needs."""
        return max(len(row) for row in self.rows) + self.room


class Progress(NamedTuple):
    """What has been drawn of a request `number` since the last time, and whether it is finished."""

    number: int
    ids: np.ndarray
    finished: bool


class Group(NamedTuple):
    """Slots of one output in one modality with equally many streams, which take a step together.

    Args:
        kind: of the requests.
        modality: None where rows choose between several ranges; the logits then have all columns.
        slots: `(B,)`.
        rows: of their streams, the whole prompt first, `(K, B)`.
        weights: of the logits of their streams, float32 `(K, B)`.
    """

    kind: Kind
    modality: str | None
    slots: Tensor
    rows: Tensor
    weights: Tensor


def build_grammar(
    format: SequenceFormat, kind: Kind, vocab_size: int, device: torch.device | str = "cpu"
) -> Grammar | Template:
    """What may follow in requests of a kind."""
    if kind.is_known:
        return Template(format, kind.output, device)
    return Grammar(format, kind.output, vocab_size, device, has_turns=kind.has_turns)


def start(grammar: Grammar | Template, request: Request, size: int, number: int = 0) -> State:
    """The state behind the prompt of a request, in a cache of `size` tokens.

    Raises:
        SequenceError: for a prompt that the format does not allow or behind which the output does not fit.
    """
    room = min(request.room, size - max(len(row) for row in request.rows))
    if isinstance(grammar, Template):
        return grammar.start([request.room], [room], first=number)
    return grammar.start([request.prompt], [max(0, room)], [len(request.before) - 1], first=number)


class Engine:
    """Slots that are filled with requests, advanced together, and free again when their sample has ended.

    Rows of the network are kept together at the front of the cache, so that a step computes no row of an empty slot.
    Within pictures the host does not look at the device, and only the columns of the codebook are computed.

    Args:
        model: the network, in evaluation mode.
        format: the sequence format it was trained on.
        num_slots: samples that are drawn at a time.
        num_rows: of the network, for all slots.
        length: tokens of the longest request, prompt and sample.
        sampling: settings by modality, as `{"image": TokenSampling(top_k=50)}`.
        guidance: how the streams of codes are mixed.
        chunk: most steps between two looks, so that what is shown meanwhile is not late.
        record: makes of a step what does the same each time that it is called, as `record_graph` does; see there.

    Raises:
        ValueError: for settings of a modality that there is not.
    """

    def __init__(
        self,
        model: Transformer,
        format: SequenceFormat,
        *,
        num_slots: int,
        num_rows: int,
        length: int,
        sampling: Mapping[str, TokenSampling] | None = None,
        guidance: Guidance = NO_GUIDANCE,
        chunk: int = 1 << 20,
        record: Recorder | None = None,
    ) -> None:
        self.model, self.format, self.guidance, self.chunk, self.record = model, format, guidance, chunk, record
        self.device = model.embedding.weight.device
        modalities = format.vocabulary.modalities
        sampling = sampling or {}
        if unknown := sorted(set(sampling) - set(modalities)):
            raise ValueError(f"sampling settings for {', '.join(unknown)}; the model has {', '.join(modalities)}")
        self._sampling = {name: sampling.get(name, TokenSampling()) for name in modalities}
        self._rules = {name: build_rules(one) for name, one in self._sampling.items()}
        self._grammars: dict[Kind, Grammar | Template] = {}
        self._requests: dict[int, tuple[int, Request]] = {}  # by slot: number and request
        self._rows: dict[int, list[int]] = {}
        self._lengths: list[int] = []  # tokens in the cache, of each row
        self._told: dict[int, int] = {}
        self._recorded: tuple[str, Callable[[], None]] | None = None  # for whom and for how many slots, and the step
        self._free = list(range(num_slots))[::-1]
        self.cache = model.build_cache(num_rows, length)
        blank = {"dtype": torch.int64, "device": self.device}
        self.last, self.positions = torch.zeros(num_rows, **blank), torch.zeros(num_rows, **blank)  # (R,)
        self.state = State(*(torch.zeros(num_slots, **blank) for _ in State._fields))
        self.steps = torch.zeros(num_slots, **blank)  # (S,) tokens drawn
        self.drawn = torch.zeros(num_slots, length, **blank)
        self.uniforms = torch.zeros(num_slots, length, dtype=torch.float64, device=self.device)
        self.known = torch.full((num_slots, length), FREE, **blank)
        penalised = any(one.repetition_penalty != 1 for one in self._sampling.values())
        width = model.config.vocab_size if penalised else 0
        self.seen = torch.zeros(num_slots, width, dtype=torch.bool, device=self.device)

    def __len__(self) -> int:
        """Samples that are being drawn."""
        return len(self._requests)

    def start(self, request: Request, number: int = 0) -> State:
        """The state behind a prompt.

        Raises:
            SequenceError: for a prompt that the format does not allow or behind which the output does not fit.
        """
        return start(self._grammar(request.kind), request, self.cache.size, number)

    def _grammar(self, kind: Kind) -> Grammar | Template:
        if kind not in self._grammars:
            self._grammars[kind] = build_grammar(self.format, kind, self.model.config.vocab_size, self.device)
        return self._grammars[kind]

    @torch.inference_mode()
    def add(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Reads the prompts of requests, each with its number, for which there is room."""
        rows: list[np.ndarray] = []
        for number, request in requests:
            state = self.start(request, number)
            slot = self._free.pop()
            self._requests[slot], self._told[slot] = (number, request), 0
            first = len(self._lengths) + len(rows)
            self._rows[slot] = list(range(first, first + len(request.rows)))
            rows += request.rows
            for kept, new in zip(self.state, state):
                kept[slot] = new[0]
            self.steps[slot] = 0
            self.uniforms[slot, : request.room] = draw_uniforms(request.seed, request.room).to(self.device)
            if request.known is not None:
                self.known[slot, : len(request.known)] = torch.from_numpy(request.known).to(self.device)
            if self.seen.shape[1]:
                self.seen[slot] = False
                self.seen[slot, torch.from_numpy(request.rows[0]).to(self.device)] = True
        self._read(rows)

    def _read(self, rows: Sequence[np.ndarray]) -> None:
        """Keys and values of new rows, but for each one's last token, which the next step takes; equal ones once."""
        start = len(self._lengths)
        distinct = {row.tobytes(): place for place, row in reversed(list(enumerate(rows)))}
        firsts = sorted(distinct.values())
        longest = max(len(row) for row in rows) - 1
        if longest:
            tokens = torch.full((len(firsts), longest), self.format.vocabulary.pad)
            for place, first in enumerate(firsts):
                tokens[place, : len(rows[first]) - 1] = torch.from_numpy(rows[first][:-1])
            cache = self.model.build_cache(len(firsts), longest)
            self.model.hidden(tokens.to(self.device), cache=cache)
            copies = torch.tensor([firsts.index(distinct[row.tobytes()]) for row in rows], device=self.device)
            self.cache.put(start, cache.select(copies))
        self._lengths += [len(row) - 1 for row in rows]
        span = slice(start, start + len(rows))
        self.last[span] = torch.tensor([int(row[-1]) for row in rows], device=self.device)
        self.positions[span] = torch.tensor([len(row) - 1 for row in rows], device=self.device)

    @torch.inference_mode()
    def advance(self) -> list[Progress]:
        """Takes as many steps as need no look at the device, and tells what they gave; finished slots are free then."""
        self._take(*self._look())
        return self._tell()

    def _look(self) -> tuple[list[Group], int]:
        """Who takes a step with whom, and how many: the only wait for the device."""
        nodes, left = torch.stack((self.state.nodes, self.state.codes_left)).tolist()
        kinds, steps = [], self.chunk
        for slot, (_, request) in self._requests.items():
            modality = self._grammar(request.kind).modality_at(nodes[slot])
            steps = min(steps, max(left[slot], 1) if modality else 1)
            kinds.append((request.kind, modality or "", len(request.streams), slot))
        groups = []
        for (kind, modality, _), members in groupby(sorted(kinds), key=lambda one: one[:3]):
            slots = [slot for *_, slot in members]
            requests = [self._requests[slot][1] for slot in slots]
            rows = torch.tensor([self._rows[slot] for slot in slots], device=self.device)
            weights = [[one.weight, *(stream.weight for stream in one.streams)] for one in requests]
            shared = torch.tensor(slots, device=self.device), rows.T, torch.tensor(weights, device=self.device).T
            groups.append(Group(kind, modality or None, *shared))
        return groups, steps

    def _take(self, groups: Sequence[Group], steps: int) -> None:
        """Steps of groups; with a recorder many are replayed, in stretches that see as many slots of the cache."""
        taken, used = 0, max(self._lengths)
        while taken < steps:
            if self.record is None or steps - taken < LEAST_STEPS:
                self._step(groups, used + taken + 1)
                taken += 1
                continue
            seen = min(self.cache.size, -(-(used + taken + LEAST_STEPS) // SPAN) * SPAN)
            rows = [(slot, number, self._rows[slot]) for slot, (number, _) in self._requests.items()]
            key = repr((seen, rows, [group[:2] for group in groups]))
            if self._recorded is None or self._recorded[0] != key:
                self._step(groups, seen)  # what is recorded has been called before
                taken += 1
                self._recorded = None  # its memory serves the next
                self._recorded = key, self.record(partial(self._step, groups, seen))
            stop = min(steps, seen - used)
            for _ in range(taken, stop):
                self._recorded[1]()
            taken = stop
        self._lengths = [length + steps for length in self._lengths]

    def _step(self, groups: Sequence[Group], seen: int) -> None:
        """One token in each row, of which none has more than `seen` with it; changes nothing but tensors, in place."""
        num = len(self._lengths)
        self.cache.used = seen - 1  # the network adds what it writes
        hidden = self.model.hidden(self.last[:num, None], self.positions[:num, None], cache=self.cache)[:, 0]  # (R, D)
        self.positions[:num] += 1
        for group in groups:
            slots, grammar = group.slots, self._grammar(group.kind)
            state, steps = State(*(part[slots] for part in self.state)), self.steps[slots]
            tokens = grammar.settle(state, self._choose(group, grammar, state, hidden, self.uniforms[slots, steps]))
            if isinstance(grammar, Template):
                known = self.known[slots, steps]
                tokens = torch.where(known == FREE, tokens, known)
            self.drawn[slots, steps] = tokens
            self.steps[slots] = steps + 1
            self.last[group.rows] = tokens
            if self.seen.shape[1]:
                self.seen[slots, tokens] = True
            for kept, new in zip(self.state, grammar.advance(state, tokens)):
                kept[slots] = new

    def _choose(
        self, group: Group, grammar: Grammar | Template, state: State, hidden: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Ids `(B,)` of a group whose rows have `hidden` `(R, D)`."""
        columns = slice(0, None)
        if group.modality is None:  # text also decides whether a picture begins
            modality, logits = "text", self.model.logits(hidden[group.rows[0]])
            logits = logits.masked_fill(~grammar.legal(state), -torch.inf)
        else:
            modality, columns = group.modality, grammar.columns(group.modality)
            logits = self.model.logits(hidden[group.rows.reshape(-1)], ids=columns)
            if len(group.rows) > 1:
                logits = steer(self.guidance, logits.unflatten(0, group.rows.shape), group.weights)
        if self._sampling[modality].repetition_penalty != 1:
            seen = self.seen[group.slots, columns]
            logits = penalise_repetition(logits, seen, self._sampling[modality].repetition_penalty)
        for rule in self._rules[modality]:
            logits = rule(logits)
        return draw(logits, uniforms) + columns.start

    def _tell(self) -> list[Progress]:
        """What was drawn since the last time; slots of finished samples are given free."""
        nodes, steps, drawn = self.state.nodes.tolist(), self.steps.tolist(), self.drawn.cpu().numpy()
        told = []
        for slot, (number, _) in list(self._requests.items()):
            ids = drawn[slot, self._told[slot] : steps[slot]].copy()
            finished = nodes[slot] == Grammar.done
            told.append(Progress(number, ids, finished))
            self._told[slot] = steps[slot]
            if finished:
                self._release(slot)
        return told

    def _release(self, slot: int) -> None:
        """Gives a slot free; the last rows take the places of its rows, so that rows stay together."""
        del self._requests[slot]
        self._free.append(slot)
        for row in sorted(self._rows.pop(slot), reverse=True):
            length = self._lengths.pop()
            last = len(self._lengths)
            if row == last:
                continue
            self.cache.move(last, row, length)
            self._lengths[row] = length
            self.last[row], self.positions[row] = self.last[last].clone(), self.positions[last].clone()
            for rows in self._rows.values():
                if last in rows:
                    rows[rows.index(last)] = row
