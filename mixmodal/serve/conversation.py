"""What a visitor has asked and what came of it: bounded, so that a page that stays open for days does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from PIL.Image import Image as Picture

from mixmodal.pipeline.drawing import Piece
from mixmodal.serve.settings import Settings

MAX_TURNS = 8
"""Turns that are kept and shown."""
MAX_DRAWN = 24
"""Pictures of the gallery."""

Content = str | Picture


class Read(NamedTuple):
    """A document that the model has read before the prompt.

    Args:
        key: its name in the memory.
        score: nearness to the prompt.
        parts: its texts and pictures.
    """

    key: str
    score: float
    parts: list[Content]


class Exchange(NamedTuple):
    """What was asked, and the answer to it."""

    asked: list[Content]
    answered: list[Content]


class Drawn(NamedTuple):
    """A whole picture, and the words under it in the gallery."""

    picture: Picture
    caption: str


@dataclass
class Turn:
    """One prompt and its answer, which grows while it is drawn.

    Args:
        prompt: texts and pictures.
        settings: how it is answered.
        samples: of each, its parts so far.
        documents: of the memory that were read first, the nearest last.
        notes: what was done differently than asked.
        error: why there is no answer, or no more of it.
        state: `drawing` until it is whole or stopped.
        html: how a finished turn is shown, once that has been written.
    """

    prompt: list[Content]
    settings: Settings
    samples: list[list[Content]] = field(default_factory=list)
    documents: list[Read] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    state: Literal["drawing", "done", "stopped"] = "drawing"
    html: str = ""
    _whole: set[tuple[int, int]] = field(default_factory=set)

    def add(self, piece: Piece) -> None:
        """Puts a piece into its place."""
        parts = self.samples[piece.sample]
        parts[piece.place :] = [piece.part]
        if piece.whole:
            self._whole.add((piece.sample, piece.place))

    def is_whole(self, sample: int, place: int) -> bool:
        """Whether a part stays as it is."""
        return self.state == "done" or (sample, place) in self._whole

    def pictures(self) -> Iterator[Picture]:
        """The whole pictures of the answer."""
        for number, parts in enumerate(self.samples):
            for place, part in enumerate(parts):
                if isinstance(part, Picture) and self.is_whole(number, place):
                    yield part

    def exchange(self) -> Exchange | None:
        """The prompt and its first sample, as later turns read it; None where there is none."""
        if self.state != "done" or not self.samples or not self.samples[0]:
            return None
        return Exchange(*([part for part in parts if part != ""] for parts in (self.prompt, self.samples[0])))


class Conversation:
    """The last turns of one visitor and the pictures that came of them.

    Args:
        max_turns, max_drawn: the oldest ones beyond are forgotten.
    """

    def __init__(self, max_turns: int = MAX_TURNS, max_drawn: int = MAX_DRAWN) -> None:
        self.turns: deque[Turn] = deque(maxlen=max_turns)
        self.drawn: deque[Drawn] = deque(maxlen=max_drawn)
        self.open: Turn | None = None
        self.edit: Turn | None = None
        self._picked: Drawn | None = None

    def begin(self, turn: Turn) -> None:
        """Opens a turn; one that is still open is stopped."""
        self.settle()
        self.open = turn

    def begin_edit(self, turn: Turn) -> None:
        """Opens an edit, beside the turn that may be open; one that is still open is stopped."""
        self.settle_edit()
        self.edit = turn

    def settle(self) -> None:
        """Closes the open turn, where there is one: it is done, or else stopped with what it has by now."""
        turn, self.open = self.open, None
        if turn is not None:
            self.turns.append(turn)
            self._close(turn, "from a picture")

    def settle_edit(self) -> Turn | None:
        """Closes the open edit in the same way, and gives it. It is no turn, but its pictures are in the gallery."""
        turn, self.edit = self.edit, None
        if turn is not None:
            self._close(turn, "redrawn")
        return turn

    def close(self, turn: Turn) -> None:
        """Closes a turn or an edit, if it is still open."""
        if turn is self.open:
            self.settle()
        elif turn is self.edit:
            self.settle_edit()

    def _close(self, turn: Turn, words: str) -> None:
        turn.state = "stopped" if turn.state == "drawing" else turn.state
        self.keep(turn.pictures(), caption(turn, words))

    def pick(self, place: int | None) -> None:
        """Picks a picture of the gallery, by its place from the newest on, to be edited; None is always the newest."""
        newest_first = list(reversed(self.drawn))
        self._picked = None if place is None or not 0 <= place < len(newest_first) else newest_first[place]

    @property
    def place(self) -> int | None:
        """Of the picture that is picked, from the newest on; None where none is, or it has been forgotten."""
        return next((place for place, one in enumerate(reversed(self.drawn)) if one is self._picked), None)

    @property
    def picked(self) -> Picture | None:
        """The picture to be edited, where there is one."""
        return self.drawn[-1 - (self.place or 0)].picture if self.drawn else None

    def keep(self, pictures: Iterator[Picture] | list[Picture], words: str) -> None:
        """Puts pictures into the gallery."""
        self.drawn.extend(Drawn(picture, words) for picture in pictures)

    def exchanges(self, count: int) -> list[Exchange]:
        """The last `count` answered turns, oldest first."""
        answered = [exchange for turn in self.turns if (exchange := turn.exchange())]
        return answered[-count:] if count else []

    def clear(self) -> None:
        """Forgets everything."""
        self.settle()
        self.settle_edit()
        self.turns.clear()
        self.drawn.clear()
        self.pick(None)


def caption(turn: Turn, otherwise: str) -> str:
    """What stands under a turn's pictures; where it has no text, what is said `otherwise`."""
    words = " ".join(part for part in turn.prompt if isinstance(part, str)) or otherwise
    return f"{words[:80]} \N{MIDDLE DOT} seed {turn.settings.seed}"
