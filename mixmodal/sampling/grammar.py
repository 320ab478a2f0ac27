"""Which ids may follow, for every row of a batch at once: the sequence format as an automaton of tensors.

A row is at a node (in text, behind the token that opens a block, in the codes of a block, ...). Tables over nodes and
kinds of tokens say where a token leads and how many tokens it takes from there until the row may stop; a token is legal
where as many still fit. Nothing here knows a modality by name, so that a further coded one is an entry of the format.
Shapes: B batch, T tokens, V vocabulary, N nodes, K kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import SequenceError, SequenceFormat
from mixmodal.sampling.automaton import DONE, INFILL, MIXED, NEVER, Automaton

__all__ = ["INFILL", "MIXED", "NEVER", "Grammar", "State", "Template"]

NOTHING = -1
"""At nodes where the draw says what follows."""


class State(NamedTuple):
    """Where each row is; every tensor int64 `(B,)`.

    Args:
        nodes: the node.
        codes_left: codes that the block still lacks, with the newlines among them; 0 outside blocks.
        room: tokens that still fit.
    """

    nodes: Tensor
    codes_left: Tensor
    room: Tensor


class Grammar:
    """The ids that may follow in each row.

    Args:
        format: the sequence format.
        output: `text` (no blocks; a token that opens one ends the text, as `</s>` does), a coded modality such as
            `image` (one block, then stop), `mixed`, or `infill`: the text that a mask stands for, behind a prompt that
            ends with this mask once more, up to `<eoss>` (CM3, arXiv 2201.07520, section 2).
        vocab_size: rows of the model's output; ids behind the vocabulary are never legal.
        has_turns: whether a row may end by an end of turn as well, as behind prompts that have ended one.

    Raises:
        ValueError: for an `output` that the format does not have.
    """

    done = 0
    """The node of rows that have stopped."""

    def __init__(
        self,
        format: SequenceFormat,
        output: str,
        vocab_size: int,
        device: torch.device | str = "cpu",
        *,
        has_turns: bool = False,
    ) -> None:
        outputs = ("text", *format.blocks, MIXED, INFILL)
        if output not in outputs:
            raise ValueError(f"output {output!r} is unknown; choose {', '.join(outputs)}")
        self.format, self.output, self.has_turns = format, output, has_turns
        self.vocabulary = format.vocabulary
        self._automaton = Automaton(format, output, has_turns=has_turns)
        self._kind_of = self._classify(vocab_size)
        self._upload(torch.device(device))

    def _classify(self, vocab_size: int) -> np.ndarray:
        """Kind of every id, `(V,)`."""
        kinds = np.zeros(vocab_size, dtype=np.int64)
        for kind, name in enumerate(self._automaton.kinds):
            if isinstance(name, int):
                kinds[name] = kind
            elif name != "none":
                ids = self.vocabulary.ids(name)
                kinds[ids.start : ids.stop] = kind
        return kinds

    def _upload(self, device: torch.device) -> None:
        automaton = self._automaton
        index = {name: number for number, name in enumerate(automaton.nodes)}
        kinds = {kind: number for number, kind in enumerate(automaton.kinds)}
        follows, costs = np.zeros((len(index), len(kinds)), np.int64), np.full((len(index), len(kinds)), NEVER)
        for (node, kind), cost in automaton.costs().items():
            at = index[node], kinds[kind]
            follows[at], costs[at] = index[automaton.edges[node, kind]], cost
        blocks = np.zeros((5, len(index)), np.int64)
        blocks[2] = 1  # no row
        blocks[4] = NOTHING
        for node, one in automaton.inside.items():
            at = index[node]
            blocks[:4, at] = one.left + 1, index[automaton.end(node)], one.row or 1, index[one.newline]
            if node != one.codes:
                blocks[4, at] = automaton.forced(node)
        codes = [index[automaton.inside[name].codes] if name in automaton.inside else index[name] for name in index]
        self._modalities = [automaton.only_modality(node) for node in automaton.nodes]
        self._closing = torch.tensor([automaton.closing(node) if node in automaton.inside else 0 for node in index])
        self.has_lines = any(one.row for one in automaton.inside.values())
        self.kinds = torch.from_numpy(self._kind_of).to(device)  # (V,)
        self.follows, self.costs = (torch.from_numpy(table).to(device) for table in (follows, costs))  # (N, K)
        self.lengths, self.ends, self.rows, self.newlines, self.forced = torch.from_numpy(blocks).to(device)  # (N,)
        self.codes = torch.tensor(codes, device=device)  # (N,)

    # use

    def start(
        self, prompts: Sequence[np.ndarray], rooms: Sequence[int], before: Sequence[int] | None = None, first: int = 0
    ) -> State:
        """The state behind each prompt `(T,)`, with `rooms` tokens that may follow.

        Args:
            before: tokens that the model reads before each prompt; for the message alone.
            first: number of the first prompt, for the message alone.

        Raises:
            SequenceError: for a prompt that the format does not allow, or behind which nothing fits.
        """
        found = [self._read(np.asarray(prompt), first + row) for row, prompt in enumerate(prompts)]
        nodes, left = (torch.tensor(column, device=self.costs.device) for column in zip(*found))
        state = State(nodes, left, torch.tensor(list(rooms), device=self.costs.device))
        lacks = left + self._closing.to(left.device)[nodes]  # none is open before its first token
        stuck = ~(self.costs[nodes] <= state.room[:, None]).any(dim=1) | ((left > 0) & (lacks > state.room))
        if stuck.any():
            row = int(stuck.nonzero()[0])
            if not (self.costs[nodes[row]] < NEVER).any():
                raise SequenceError(f"prompt {first + row} is open for another part than the output {self.output!r}")
            behind = f" behind {before[row]} of other documents" if before is not None and before[row] else ""
            raise SequenceError(
                f"prompt {first + row} has {len(prompts[row])} tokens{behind} and {rooms[row]} may follow it: too few "
                f"for the output {self.output!r}. Shorten {'them' if behind else 'the prompt'}, or raise "
                "max_new_tokens or the model's max_seq_len"
            )
        return state

    def _read(self, prompt: np.ndarray, row: int) -> tuple[int, int]:
        if not len(prompt) or prompt[0] != self.vocabulary.bos:
            raise SequenceError(f"prompt {row} does not begin with <s>")
        automaton, node, left = self._automaton, "start", 0
        for place, token in enumerate(prompt.tolist()[1:], 1):
            kind = automaton.kinds[self._kind_of[token]] if 0 <= token < len(self._kind_of) else "none"
            to, left = automaton.step(node, left, kind)
            if to is None or to == DONE:
                raise SequenceError(f"prompt {row}: {self.vocabulary.name(token)} can not stand at position {place}")
            node = to
        return automaton.nodes.index(node), left

    def live(self, state: State) -> Tensor:
        """Rows that have not stopped, `(B,)` bool."""
        return state.nodes != self.done

    def legal(self, state: State) -> Tensor:
        """Ids that may follow, `(B, V)` bool."""
        return (self.costs[state.nodes] <= state.room[:, None])[:, self.kinds]

    def modality_at(self, node: int) -> str | None:
        """The coded modality of which only codes may follow at a node of a `State`; None where there is a choice.

        Within a block this counts for its newlines, too: what is drawn there gives way to them, see `settle`.
        """
        return self._modalities[node]

    def settle(self, state: State, tokens: Tensor) -> Tensor:
        """The drawn `tokens` `(B,)`, but the newline where nothing else may follow."""
        if not self.has_lines:
            return tokens
        forced = self.forced[state.nodes]
        return torch.where(forced == NOTHING, tokens, forced)

    def columns(self, modality: str) -> slice:
        """The ids of a modality."""
        ids = self.vocabulary.ids(modality)
        return slice(ids.start, ids.stop)

    def advance(self, state: State, tokens: Tensor) -> State:
        """The state after one more token in each row, `tokens` `(B,)`; done rows stay done."""
        nodes = self.follows[state.nodes, self.kinds[tokens]]
        room = (state.room - 1).clamp(min=0)
        is_in = self.codes[nodes] == self.codes[state.nodes]
        codes_left = torch.where(is_in, state.codes_left, self.lengths[nodes]) - 1
        in_block = self.lengths[nodes] > 0
        if self.has_lines:
            nodes = torch.where(in_block & (codes_left % self.rows[nodes] == 1), self.newlines[nodes], nodes)
        nodes = torch.where(in_block & (codes_left == 0), self.ends[nodes], nodes)
        nodes = torch.where((room == 0) | ~self.live(state), self.done, nodes)
        return State(nodes, torch.where(in_block, codes_left, 0), room)


class Template:
    """Codes of one modality in a given number, among them tokens that are given: what stands in for a grammar there.

    Args:
        format: the sequence format.
        modality: of the codes.
    """

    done = Grammar.done

    def __init__(self, format: SequenceFormat, modality: str, device: torch.device | str = "cpu") -> None:
        if modality not in format.blocks:
            raise ValueError(f"{modality!r} has no codes; choose {', '.join(format.blocks)}")
        ids = format.vocabulary.ids(modality)
        self._modality, self._columns, self._device = modality, slice(ids.start, ids.stop), device

    def start(self, lengths: Sequence[int], rooms: Sequence[int], first: int = 0) -> State:
        """The state before `lengths` tokens, of which `rooms` fit.

        Raises:
            SequenceError: where they do not fit.
        """
        for row, (length, room) in enumerate(zip(lengths, rooms)):
            if length > room:
                raise SequenceError(f"prompt {first + row}: {length} tokens follow it, and {room} fit into the context")
        left = torch.tensor(list(lengths), device=self._device)
        return State(torch.ones_like(left), left, left.clone())

    def advance(self, state: State, tokens: Tensor) -> State:
        """The state after one more token in each row."""
        left = state.codes_left - 1
        return State(torch.where(left > 0, state.nodes, self.done), left, left)

    def modality_at(self, node: int) -> str | None:
        """The modality of the codes."""
        return None if node == self.done else self._modality

    def columns(self, modality: str) -> slice:
        """The ids of the modality."""
        return self._columns

    def settle(self, state: State, tokens: Tensor) -> Tensor:
        """The drawn `tokens` as they are."""
        return tokens

    def legal(self, state: State) -> Tensor:
        """Never asked: there are only codes."""
        raise AssertionError
