"""What the page does with the model, without a page: prompts in, growing answers out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

from PIL.Image import Image as Picture

from mixmodal.document import EndOfTurn
from mixmodal.pipeline.drawing import Piece
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.serve.conversation import Content, Conversation, Exchange, Read, Turn
from mixmodal.serve.settings import Settings
from mixmodal.serve.uploads import Limits, check_text, read_painting, read_prompt

logger = logging.getLogger(__name__)

PREVIEWS = 16
"""How often an unfinished picture is shown, where nothing else is said."""


class Studio:
    """A model and what visitors may ask of it. It keeps nothing of them; the conversation is theirs.

    Args:
        model: with or without a memory.
        limits: of a request.
        preview_every: codes after which an unfinished picture is shown again; None shows it `PREVIEWS` times.
        interval_s: least seconds between two views of an answer that grows; 0 shows every piece.
        turns: whether a prompt ends its turn, and earlier ones stand before it in the same conversation, as a model
            reads them that was tuned on conversations; None does so for such a model. Otherwise they are documents.
    """

    def __init__(
        self,
        model: MixedModal,
        limits: Limits | None = None,
        preview_every: int | None = None,
        interval_s: float = 0.1,
        turns: bool | None = None,
    ) -> None:
        self.turns = model.codec.conversations if turns is None else turns
        self.model, self.limits, self.interval_s = model, Limits() if limits is None else limits, interval_s
        height, width = model.format.grids["image"]
        self.preview_every = max(1, height * width // PREVIEWS) if preview_every is None else preview_every

    @property
    def image_size(self) -> int:
        """Side of the model's pictures, pixels."""
        return self.model.codec.image_tokenizer.config.image_size

    @property
    def has_memory(self) -> bool:
        """Whether documents can be retrieved."""
        return self.model.retriever is not None

    def answer(
        self, conversation: Conversation, text: str | None, files: Sequence[str], settings: Settings
    ) -> Iterator[Turn]:
        """Opens a turn of the conversation and gives it again and again while it grows.

        It never raises for what the model refuses: the turn then has an error. Closing the iterator stops the model,
        and the turn stays in the conversation as far as it came.

        Args:
            files: paths of uploaded pictures.
        """
        prompt: list[Content] = [text.strip()] if text and text.strip() else []
        turn = Turn(prompt, settings)
        conversation.begin(turn)
        yield from self._tell(conversation, turn, self._answer(conversation, turn, text, files))

    def redraw(
        self, conversation: Conversation, painting: Mapping[str, Any] | None, text: str | None, settings: Settings
    ) -> Iterator[Turn]:
        """Opens an edit and gives it again and again while the painted region is drawn; otherwise as `answer`.

        Args:
            painting: `background` and `layers`; see `read_painting`.
            text: what the picture is to show; may be empty.
        """
        prompt: list[Content] = [text.strip()] if text and text.strip() else []
        turn = Turn(prompt, settings)
        conversation.begin_edit(turn)
        yield from self._tell(conversation, turn, self._redraw(turn, painting))

    def _tell(self, conversation: Conversation, turn: Turn, views: Iterator[Turn]) -> Iterator[Turn]:
        """The views, and the turn as it is in the end: done, stopped, or with an error."""
        try:
            yield from views
            turn.state = "done" if turn.state == "drawing" else turn.state
        except Exception as error:
            turn.error = explain(error)
            turn.state = "stopped"
        finally:
            conversation.close(turn)
        yield turn

    def _check(self, settings: Settings) -> None:
        asked = {"samples": (settings.num, self.limits.max_num)}
        asked["documents"] = settings.retrieve, self.limits.max_retrieve
        for name, (value, most) in asked.items():
            if value > most:
                raise ValueError(f"{value} {name} are asked for; {most} are allowed")

    def _answer(self, conversation: Conversation, turn: Turn, text: str | None, files: Sequence[str]) -> Iterator[Turn]:
        settings = turn.settings
        self._check(settings)
        turn.prompt = read_prompt(text, files, self.limits, self.model.codec, padded=self.turns)
        earlier = conversation.exchanges(settings.remember)
        before: list[Any] = [] if self.turns else [[*one.asked, *one.answered] for one in earlier]
        options, turn.notes = settings.options(turn.prompt)
        yield turn
        if settings.retrieve and self.has_memory:
            (found,) = self.model.retrieve([turn.prompt], settings.retrieve, settings.output)
            contents = self.model.codec.from_documents([self.model.format.parse(one.ids) for one in found])
            for one, content in zip(found, contents):
                parts = [part if isinstance(part, Picture) else str(part) for part in content]
                turn.documents.append(Read(one.key, one.score, parts))
            before += found
        more: dict[str, Any] = {"before": before} if before else {}
        prompt = self._speak(earlier, turn.prompt, settings.output) if self.turns else turn.prompt
        yield from self._grow(turn, self.model.stream, prompt, settings.output, **more, **options)

    def _speak(self, earlier: Sequence[Exchange], prompt: Sequence[Content], output: str) -> list[Any]:
        """A conversation that is open for the model's turn; the oldest exchanges are left out where not all fit."""
        said: list[Any] = []
        for start in range(len(earlier) + 1):
            turns = [turn for one in earlier[start:] for turn in one] + [prompt]
            said = [part for turn in turns for part in (*turn, EndOfTurn())]
            if start == len(earlier) or self.model.room_left(said, output) >= 0:
                break
        return said

    def _redraw(self, turn: Turn, painting: Mapping[str, Any] | None) -> Iterator[Turn]:
        self._check(turn.settings)
        picture, region = read_painting(painting, self.limits, self.image_size)
        check_text("".join(map(str, turn.prompt)), self.limits)
        options, _ = turn.settings.options(turn.prompt)
        yield from self._grow(turn, self.model.stream_infill, picture, region, turn.prompt, **options)

    def _grow(self, turn: Turn, stream: Callable[..., Iterator[Piece]], *asked: Any, **options: Any) -> Iterator[Turn]:
        """The turn, again and again while its samples are drawn."""
        settings = turn.settings
        turn.samples = [[] for _ in range(settings.num)]
        yield turn
        pieces = stream(*asked, num=settings.num, seed=settings.seed, preview_every=self.preview_every, **options)
        shown = time.monotonic()
        with closing(cast(Any, pieces)):
            for piece in pieces:
                if turn.state != "drawing":  # settled meanwhile, by a click on Stop
                    return
                turn.add(piece)
                if time.monotonic() - shown >= self.interval_s:
                    yield turn
                    shown = time.monotonic()


def explain(error: Exception) -> str:
    """What a visitor is told. What is not theirs to mend goes to the log whole, and to them by its kind alone."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split()) or "the request can not be answered"
    logger.error("a request failed", exc_info=error)
    return f"the model failed ({type(error).__name__}); the log of the server says where"
