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

MIXED, INFILL = "mixed", "infill"
NEVER = 1 << 40  # more tokens than fit anywhere


class State(NamedTuple):
    """Where each row is; every tensor int64 `(B,)`.

    Args:
        nodes: the node.
        codes_left: codes that the block still lacks; 0 outside blocks.
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
        self._kinds = ["none", "text", "sentinel", *format.blocks, *self._control_ids()]
        self._kind_of = self._classify(vocab_size)
        self._build_nodes()
        self._spelled = self._build_edges()
        allowed = {(node, kind): to for (node, kind), to in self._spelled.items() if self._allows(node, kind)}
        if output == INFILL:
            allowed["text", self.vocabulary.end_of_span] = self._nodes[self.done]
        if has_turns and output in ("text", MIXED):
            allowed |= {(node, self.vocabulary.end_of_turn): "done" for node in self._ends_of_turn(output)}
        if output == "text":  # a text that a block follows has ended, too; its mass must not go to more text
            allowed |= {("text", block.open_id): self._nodes[self.done] for block in format.blocks.values()}
        self._upload(allowed, torch.device(device))

    # the automaton, on the host

    def _control_ids(self) -> list[int]:
        blocks = self.format.blocks.values()
        closing = {block.close_id for block in blocks if block.close_id is not None}
        if self.output == INFILL:
            closing.add(self.vocabulary.end_of_span)
        return [
            self.vocabulary.eos,
            self.vocabulary.end_of_turn,
            *sorted({block.open_id for block in blocks} | closing),
        ]

    def _classify(self, vocab_size: int) -> np.ndarray:
        """Kind of every id, `(V,)`."""
        kinds = np.zeros(vocab_size, dtype=np.int64)
        for kind, name in enumerate(self._kinds):
            if isinstance(name, int):
                kinds[name] = kind
            elif name != "none":
                ids = self.vocabulary.ids(name)
                kinds[ids.start : ids.stop] = kind
        return kinds

    def _build_nodes(self) -> None:
        self._nodes = ["done", "start", "text"]
        for block in self.format.blocks.values():
            for last in ("text", "codes"):
                if (name := f"open {block.open_id} after {last}") not in self._nodes:
                    self._nodes.append(name)
        for modality in self.format.blocks:
            self._nodes += [f"codes {modality}", f"end {modality}"]

    def _build_edges(self) -> dict[tuple[str, str | int], str]:
        """Where each kind of token leads from each node, as the format spells whole documents."""
        edges: dict[tuple[str, str | int], str] = {}
        separates = self.format.text_after_open
        for node in ("start", "text"):
            edges |= {(node, "text"): "text", (node, "sentinel"): "text", (node, self.vocabulary.eos): "done"}
            edges[node, self.vocabulary.end_of_turn] = "text"
        for modality, block in self.format.blocks.items():
            codes, end, after_text = f"codes {modality}", f"end {modality}", f"open {block.open_id} after text"
            after_codes = f"open {block.open_id} after codes"
            edges[codes, modality] = codes
            edges[after_text, modality] = edges[after_codes, modality] = codes
            edges["text", block.open_id] = after_text
            if separates:  # no token opens the first part, and two texts can not be separated
                edges["start", modality] = codes
                kinds = ("text", "sentinel", self.vocabulary.end_of_turn)
                edges |= {(after_codes, kind): "text" for kind in kinds}
            else:
                edges["start", block.open_id] = after_text
            if block.close_id is None:
                edges[end, self.vocabulary.eos] = "done"
                edges |= {(end, one.open_id): f"open {one.open_id} after codes" for one in self.format.blocks.values()}
            else:
                edges[end, block.close_id] = "text"
            if self.output == INFILL:  # masks stand once more behind whatever ends the document
                edges[end, "sentinel"] = "text"
        if self.output == INFILL:
            edges["text", self.vocabulary.end_of_span] = "text"
        return edges

    def _allows(self, node: str, kind: str | int) -> bool:
        """Whether the output allows what the format allows."""
        if kind in ("sentinel", self.vocabulary.end_of_turn):
            return False
        if self.output == INFILL:
            return (node, kind) == ("text", "text")
        if self.output == MIXED or node.startswith("codes "):
            return True
        if node.startswith("end ") and kind == self.format.blocks[node.removeprefix("end ")].close_id:
            return True
        if self.output == "text":
            return kind in ("text", self.vocabulary.eos)
        return kind in (self.output, self.format.blocks[self.output].open_id)

    def _ends_of_turn(self, output: str) -> list[str]:
        """Where a row may end its turn: in text and, where a token leads to it, right behind a picture."""
        opened = [f"open {block.open_id} after codes" for block in self.format.blocks.values()]
        return ["text", *(opened if self.format.text_after_open and output == MIXED else [])]

    def _stops_at(self, node: str) -> bool:
        """Whether a whole document may end here by `</s>`, though none may have been drawn yet."""
        if node.startswith("end "):
            return self.format.blocks[node.removeprefix("end ")].close_id is None
        return node in ("done", "start", "text")

    def _costs(self, edges: dict[tuple[str, str | int], str]) -> dict[tuple[str, str | int], int]:
        """Tokens that each edge takes, with those that must follow until the row may stop."""
        costs: dict[tuple[str, str | int], int] = {}
        for (node, kind), to in edges.items():
            cost = 1
            if to.startswith("codes ") and node != to:
                block = self.format.blocks[to.removeprefix("codes ")]
                cost = block.length + (block.close_id is not None)
            costs[node, kind] = cost
        for (node, kind), to in edges.items():
            if not self._stops_at(to) and not to.startswith("codes "):
                costs[node, kind] += min((cost for (start, _), cost in costs.items() if start == to), default=NEVER)
        return costs

    # the automaton, on the device

    def _upload(self, edges: dict[tuple[str, str | int], str], device: torch.device) -> None:
        index = {name: number for number, name in enumerate(self._nodes)}
        shape = (len(self._nodes), len(self._kinds))
        follows, costs = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NEVER)
        price = self._costs(edges)
        for (node, kind), to in edges.items():
            at = index[node], self._kinds.index(kind)
            follows[at], costs[at] = index[to], price[node, kind]
        lengths, ends = (
            torch.zeros(len(self._nodes), dtype=torch.int64),
            torch.zeros(len(self._nodes), dtype=torch.int64),
        )
        for modality, block in self.format.blocks.items():
            lengths[index[f"codes {modality}"]] = block.length
            stop = self.output == modality and block.close_id is None
            ends[index[f"codes {modality}"]] = self.done if stop else index[f"end {modality}"]
            if self.output == modality and block.close_id is not None:
                follows[index[f"end {modality}"], self._kinds.index(block.close_id)] = self.done
        self._modalities = [self._only_modality(node, edges) for node in self._nodes]
        self.kinds = torch.from_numpy(self._kind_of).to(device)  # (V,)
        self.follows, self.costs = follows.to(device), costs.to(device)  # (N, K)
        self.lengths, self.ends = lengths.to(device), ends.to(device)  # (N,)

    def _only_modality(self, node: str, edges: dict[tuple[str, str | int], str]) -> str | None:
        """The coded modality whose codes alone may follow at `node`, or None."""
        kinds = {kind for start, kind in edges if start == node}
        return str(kinds.pop()) if len(kinds) == 1 and kinds <= set(self.format.blocks) else None

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
        stuck = ~(self.costs[nodes] <= state.room[:, None]).any(dim=1) | (left > state.room)
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
        node, left = "start", 0
        for place, token in enumerate(prompt.tolist()[1:], 1):
            kind = self._kinds[self._kind_of[token]] if 0 <= token < len(self._kind_of) else "none"
            to = self._spelled.get((node, kind))
            if to is None or to == "done":
                raise SequenceError(f"prompt {row}: {self.vocabulary.name(token)} can not stand at position {place}")
            if to.startswith("codes "):
                modality = to.removeprefix("codes ")
                left = (left if node == to else self.format.blocks[modality].length) - 1
                to = to if left else f"end {modality}"
            node = to
        return self._nodes.index(node), left

    def live(self, state: State) -> Tensor:
        """Rows that have not stopped, `(B,)` bool."""
        return state.nodes != self.done

    def legal(self, state: State) -> Tensor:
        """Ids that may follow, `(B, V)` bool."""
        return (self.costs[state.nodes] <= state.room[:, None])[:, self.kinds]

    def modality_at(self, node: int) -> str | None:
        """The coded modality of which only codes may follow at a node of a `State`; None where there is a choice."""
        return self._modalities[node]

    def columns(self, modality: str) -> slice:
        """The ids of a modality."""
        ids = self.vocabulary.ids(modality)
        return slice(ids.start, ids.stop)

    def advance(self, state: State, tokens: Tensor) -> State:
        """The state after one more token in each row, `tokens` `(B,)`; done rows stay done."""
        nodes = self.follows[state.nodes, self.kinds[tokens]]
        room = (state.room - 1).clamp(min=0)
        codes_left = torch.where(nodes == state.nodes, state.codes_left, self.lengths[nodes]) - 1
        in_block = self.lengths[nodes] > 0
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

    def legal(self, state: State) -> Tensor:
        """Never asked: there are only codes."""
        raise AssertionError
