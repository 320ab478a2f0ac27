"""A sequence format as an automaton: places in a sequence, and where each kind of token leads from there.

Nothing here knows a modality by name, so that a further coded one is an entry of the format.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from mixmodal.document import Block, SequenceFormat

MIXED, INFILL = "mixed", "infill"
NEVER = 1 << 40  # more tokens than fit anywhere
DONE = "done"

Kind = str | int
"""Of a token: the range of its id, or the id where it is a control token."""


class Inside(NamedTuple):
    """A node among the codes of a block.

    Args:
        modality: of the codes.
        codes: the node where a code follows; itself, but for where a newline does.
        left: tokens that the block lacks behind the one that enters it, without the one that closes it.
        row: codes of a row and its newline; 0 where there are no rows.
        newline: the node where a newline follows.
        end: the node behind the block's last token.
    """

    modality: str
    codes: str
    left: int
    row: int
    newline: str
    end: str

    def node(self, left: int) -> str:
        """Where a row stands that lacks `left` tokens of the block."""
        if not left:
            return self.end
        return self.newline if self.row and left % self.row == 1 else self.codes


class Automaton:
    """Nodes, kinds of tokens and edges of a format for an output; see `Grammar`."""

    def __init__(self, format: SequenceFormat, output: str, *, has_turns: bool = False) -> None:
        self.format, self.output, self.vocabulary = format, output, format.vocabulary
        self.inside = {
            node: one for modality, block in format.blocks.items() for node, one in _insides(modality, block)
        }
        self._sizes = {token for block in format.blocks.values() for token in _sizes(block)}
        self._newlines = {block.lines.newline_id for block in format.blocks.values() if block.lines is not None}
        self.kinds: list[Kind] = ["none", "text", "sentinel", *format.blocks, *self._control_ids()]
        self.nodes = self._build_nodes()
        self.spelled = self._build_edges()
        """As the format spells whole documents."""
        self.edges = {(node, kind): to for (node, kind), to in self.spelled.items() if self._allows(node, kind)}
        """As the output allows."""
        if output == INFILL:
            self.edges["text", self.vocabulary.end_of_span] = DONE
        if has_turns and output in ("text", MIXED):
            self.edges |= {(node, self.vocabulary.end_of_turn): DONE for node in self._ends_of_turn()}
        if output == "text":  # a text that a block follows has ended, too; its mass must not go to more text
            self.edges |= {("text", block.open_id): DONE for block in format.blocks.values()}
        if output in format.blocks and (close := format.blocks[output].close_id) is not None:
            self.edges[f"end {output}", close] = DONE

    def end(self, node: str) -> str:
        """The node behind the last token of a block that `node` is in."""
        one = self.inside[node]
        stops = self.output == one.modality and self.format.blocks[one.modality].close_id is None
        return DONE if stops else one.end

    def step(self, node: str, left: int, kind: Kind) -> tuple[str | None, int]:
        """Where a token of a document leads from a node, and how many its block then lacks; None for nowhere."""
        to = self.spelled.get((node, kind))
        if to is None or to not in self.inside:
            return to, 0
        one = self.inside[to]
        is_in = node in self.inside and self.inside[node].codes == one.codes
        left = left - 1 if is_in else one.left
        return one.node(left), left

    def costs(self) -> dict[tuple[str, Kind], int]:
        """Tokens that each edge takes, with those that must follow until the row may stop."""

        @cache
        def least(node: str) -> int:
            """Tokens that must follow at a node before the row may stop, at the least."""
            if self._stops_at(node):
                return 0
            return min((cost(*edge) for edge in self.edges if edge[0] == node), default=NEVER)

        @cache
        def cost(node: str, kind: Kind) -> int:
            to = self.edges[node, kind]
            if to not in self.inside:
                return 1 + least(to)
            if node in self.inside:  # paid for at the entry
                return 1
            return 1 + self.inside[to].left + self.closing(to)

        return {edge: min(cost(*edge), NEVER) for edge in self.edges}

    def forced(self, node: str) -> int:
        """The newline that follows at a node for one."""
        lines = self.format.blocks[self.inside[node].modality].lines
        assert lines is not None
        return lines.newline_id

    def closing(self, node: str) -> int:
        """Tokens that close the block of a node."""
        return int(self.format.blocks[self.inside[node].modality].close_id is not None)

    def only_modality(self, node: str) -> str | None:
        """The coded modality of which only codes, or what stands between them, may follow; None for a choice."""
        if node in self.inside:
            return self.inside[node].modality
        kinds = {kind for start, kind in self.edges if start == node}
        return str(kinds.pop()) if len(kinds) == 1 and kinds <= set(self.format.blocks) else None

    def _control_ids(self) -> list[int]:
        blocks = self.format.blocks.values()
        closing = {block.close_id for block in blocks if block.close_id is not None}
        if self.output == INFILL:
            closing.add(self.vocabulary.end_of_span)
        marks = {block.open_id for block in blocks} | closing | self._sizes | self._newlines
        return [self.vocabulary.eos, self.vocabulary.end_of_turn, *sorted(marks)]

    def _build_nodes(self) -> list[str]:
        nodes = [DONE, "start", "text"]
        for block in self.format.blocks.values():
            nodes += [f"open {block.open_id} after {last}" for last in ("text", "codes")]
        for modality, block in self.format.blocks.items():
            heights = [] if block.lines is None else [tokens[0] for tokens in block.lines.sizes.values()]
            nodes += [f"height {height} of {modality}" for height in heights]
            nodes.append(f"end {modality}")
        return [*dict.fromkeys([*nodes, *self.inside])]

    def _build_edges(self) -> dict[tuple[str, Kind], str]:
        """Where each kind of token leads from each node, as the format spells whole documents."""
        edges: dict[tuple[str, Kind], str] = {}
        separates = self.format.text_after_open
        for node in ("start", "text"):
            edges |= {(node, "text"): "text", (node, "sentinel"): "text", (node, self.vocabulary.eos): DONE}
            edges[node, self.vocabulary.end_of_turn] = "text"
        for modality, block in self.format.blocks.items():
            end, after_text = f"end {modality}", f"open {block.open_id} after text"
            after_codes = f"open {block.open_id} after codes"
            for opened in (after_text, after_codes, *(["start"] if separates else [])):
                edges |= _entries(modality, block, opened)
            insides = [one for one in self.inside.values() if one.modality == modality]
            edges |= {(one.codes, modality): one.codes for one in insides}
            if block.lines is not None:
                edges |= {(one.newline, block.lines.newline_id): one.codes for one in insides}
            edges["text", block.open_id] = after_text
            if separates:  # no token opens the first part, and two texts can not be separated
                kinds = ("text", "sentinel", self.vocabulary.end_of_turn)
                edges |= {(after_codes, kind): "text" for kind in kinds}
            else:
                edges["start", block.open_id] = after_text
            if block.close_id is None:
                edges[end, self.vocabulary.eos] = DONE
                edges |= {(end, one.open_id): f"open {one.open_id} after codes" for one in self.format.blocks.values()}
            else:
                edges[end, block.close_id] = "text"
            if self.output == INFILL:  # masks stand once more behind whatever ends the document
                edges[end, "sentinel"] = "text"
        if self.output == INFILL:
            edges["text", self.vocabulary.end_of_span] = "text"
        return edges

    def _allows(self, node: str, kind: Kind) -> bool:
        """Whether the output allows what the format allows."""
        if kind in ("sentinel", self.vocabulary.end_of_turn):
            return False
        if self.output == INFILL:
            return (node, kind) == ("text", "text")
        if self.output == MIXED or node in self.inside:
            return True
        if node.startswith("end ") and kind == self.format.blocks[node.removeprefix("end ")].close_id:
            return True
        if self.output == "text":
            return kind in ("text", self.vocabulary.eos)
        block = self.format.blocks[self.output]
        return kind in (self.output, block.open_id, *_sizes(block))

    def _ends_of_turn(self) -> list[str]:
        """Where a row may end its turn: in text and, where a token leads to it, right behind a picture."""
        opened = [f"open {block.open_id} after codes" for block in self.format.blocks.values()]
        return ["text", *(opened if self.format.text_after_open and self.output == MIXED else [])]

    def _stops_at(self, node: str) -> bool:
        """Whether a whole document may end here by `</s>`, though none may have been drawn yet."""
        if node.startswith("end "):
            return self.format.blocks[node.removeprefix("end ")].close_id is None
        return node in (DONE, "start", "text")


def _sizes(block: Block) -> set[int]:
    """Tokens that say sizes."""
    return set() if block.lines is None else {token for tokens in block.lines.sizes.values() for token in tokens}


def _insides(modality: str, block: Block) -> list[tuple[str, Inside]]:
    """The nodes among the codes of a block."""
    end = f"end {modality}"
    if block.lines is None:  # the first code enters
        codes = f"codes {modality}"
        return [(codes, Inside(modality, codes, block.length - 1, 0, codes, end))]
    found = []
    for grid in block.lines.sizes:
        codes, newline = (f"{what} {modality} {grid}" for what in ("codes", "newline"))
        one = Inside(modality, codes, block.lines.length(grid), grid[-1] + 1, newline, end)
        found += [(codes, one), (newline, one)]
    return found


def _entries(modality: str, block: Block, opened: str) -> dict[tuple[str, Kind], str]:
    """The edges from a node behind an opened block to its codes."""
    if block.lines is None:
        return {(opened, modality): f"codes {modality}"}
    edges: dict[tuple[str, Kind], str] = {}
    for grid, (height, width) in block.lines.sizes.items():
        node = f"height {height} of {modality}"
        edges |= {(opened, height): node, (node, width): f"codes {modality} {grid}"}
    return edges
