"""What the page does with the model, without a page: prompts in, growing answers out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

from PIL.Image import Image as Picture

from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.serve.conversation import Content, Conversation, Read, Turn
from mixmodal.serve.settings import Settings
from mixmodal.serve.uploads import Limits, read_painting, read_prompt

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
    """

    def __init__(
        self,
        model: MixedModal,
        limits: Limits | None = None,
        preview_every: int | None = None,
        interval_s: float = 0.1,
    ) -> None:
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
        try:
            self._check(settings)
            turn.prompt = read_prompt(text, files, self.limits, self.model.codec.image_tokenizer.config)
            yield from self._draw(turn, conversation.documents(settings.remember))
            turn.state = "done" if turn.state == "drawing" else turn.state
        except Exception as error:
            turn.error = explain(error)
            turn.state = "stopped"
        finally:
            if conversation.open is turn:
                conversation.settle()
        yield turn

    def _check(self, settings: Settings) -> None:
        asked = {"samples": (settings.num, self.limits.max_num)}
        asked["documents"] = settings.retrieve, self.limits.max_retrieve
        for name, (value, most) in asked.items():
            if value > most:
                raise ValueError(f"{value} {name} are asked for; {most} are allowed")

    def _draw(self, turn: Turn, earlier: list[list[Content]]) -> Iterator[Turn]:
        settings = turn.settings
        options, turn.notes = settings.options(turn.prompt)
        yield turn
        before: list[Any] = list(earlier)
        if settings.retrieve and self.has_memory:
            (found,) = self.model.retrieve([turn.prompt], settings.retrieve, settings.output)
            contents = self.model.codec.from_documents([self.model.format.parse(one.ids) for one in found])
            for one, content in zip(found, contents):
                parts = [part if isinstance(part, Picture) else str(part) for part in content]
                turn.documents.append(Read(one.key, one.score, parts))
            before += found
        turn.samples = [[] for _ in range(settings.num)]
        yield turn
        more: dict[str, Any] = {"before": before} if before else {}
        pieces = self.model.stream(
            turn.prompt,
            settings.output,
            num=settings.num,
            seed=settings.seed,
            preview_every=self.preview_every,
            **more,
            **options,
        )
        shown = time.monotonic()
        with closing(cast(Any, pieces)):
            for piece in pieces:
                if turn.state != "drawing":  # settled meanwhile, by a click on Stop
                    return
                turn.add(piece)
                if time.monotonic() - shown >= self.interval_s:
                    yield turn
                    shown = time.monotonic()

    def redraw(
        self, conversation: Conversation, painting: Mapping[str, Any] | None, text: str | None, settings: Settings
    ) -> tuple[list[Picture], str]:
        """Pictures of which the painted region is drawn anew, and an error; one of them is empty.

        Args:
            painting: `background` and `layers`; see `read_painting`.
            text: what the picture is to show; may be empty.
        """
        try:
            self._check(settings)
            picture, region = read_painting(painting, self.limits, self.image_size)
            prompt = (text or "").strip()
            if len(prompt) > self.limits.max_text_chars:
                raise ValueError(f"the text has {len(prompt)} characters; {self.limits.max_text_chars} are allowed")
            parts = [prompt] if prompt else []
            options, _ = settings.options(parts)
            pictures = self.model.infill(picture, region, parts, num=settings.num, seed=settings.seed, **options)
        except Exception as error:
            return [], explain(error)
        conversation.keep(pictures, f"{prompt or 'redrawn'} \N{MIDDLE DOT} seed {settings.seed}")
        return pictures, ""


def explain(error: Exception) -> str:
    """What a visitor is told. What is not theirs to mend goes to the log whole, and to them by its kind alone."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split()) or "the request can not be answered"
    logger.error("a request failed", exc_info=error)
    return f"the model failed ({type(error).__name__}); the log of the server says where"
