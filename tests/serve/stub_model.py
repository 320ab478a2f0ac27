"""A model that draws at once, or as slowly as a test wants, and tells what it was asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mixmodal.pipeline.drawing import Piece
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.tokenization.preprocessing import resize_and_crop, resize_and_pad

GRID = (4, 4)


class StubModel:
    """What the page needs of `MixedModal`.

    Args:
        size: of its pictures, pixels.
        steps: previews before a picture is whole.
        step_s: seconds that each takes.
        has_memory: whether it has documents.
        conversations: whether it was tuned on such.
    """

    def __init__(
        self,
        size: int = 32,
        steps: int = 4,
        step_s: float = 0.0,
        has_memory: bool = False,
        conversations: bool = False,
    ) -> None:
        self.size, self.steps, self.step_s = size, steps, step_s
        config = SimpleNamespace(image_size=size, preprocess="meta")
        tokenizer = SimpleNamespace(config=config)
        self.codec = SimpleNamespace(image_tokenizer=tokenizer, from_documents=list, fit=self._fit)
        self.codec.conversations = conversations
        self.format = SimpleNamespace(grids={"image": GRID}, allowed_grids=lambda _: (GRID,), parse=self._parse)
        self.retriever = object() if has_memory else None
        self.calls: list[dict[str, Any]] = []
        self.open = self.most_open = self.num_closed = self.num_finished = self.num_infilled = 0

    def _fit(self, picture: Image.Image, *, padded: bool) -> Image.Image:
        return (resize_and_pad if padded else resize_and_crop)(picture, self.size)

    def room_left(self, prompt: Sequence[Any], output: str) -> int:
        return 8 - len(prompt)

    def _parse(self, ids: np.ndarray) -> list[Any]:
        return [self.picture(int(ids[0])), f"document {int(ids[0])}"]

    def picture(self, number: int, shown: float = 1.0) -> Image.Image:
        """A picture of its own for each number, of which a share is shown."""
        colour = ((37 * number) % 256, (91 * number + 60) % 256, (53 * number + 120) % 256)
        picture = Image.new("RGB", (self.size, self.size), (235, 235, 235))
        picture.paste(colour, (0, 0, self.size, int(self.size * shown)))
        return picture

    def retrieve(self, prompts: Sequence[Any], count: int, output: str = "image") -> list[list[Retrieved]]:
        return [[Retrieved(n, f"key {n}", 0.5 + n / 10, np.array([n])) for n in range(count)] for _ in prompts]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts what is drawn at a time, and what is closed before its end."""
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield
        except GeneratorExit:
            self.num_closed += 1
            raise
        finally:
            self.open -= 1

    def stream(
        self, prompt: Sequence[Any], output: str, *, num: int, seed: int, preview_every: int, **more: Any
    ) -> Iterator[Piece]:
        call = {"prompt": list(prompt), "output": output, "num": num, "seed": seed, "preview_every": preview_every}
        self.calls = [*self.calls[-9:], {**call, **more}]
        text = " ".join(part for part in prompt if isinstance(part, str))
        if "too long" in text:
            raise ValueError("the prompt of 999 tokens leaves no room for an image")
        with self._counted():
            for step in range(1, self.steps + 1):
                time.sleep(self.step_s)
                if "fail" in text and step == 2:
                    raise RuntimeError("a secret path /srv/model")
                for sample in range(num):
                    whole = step == self.steps
                    if output == "text":
                        yield Piece(sample, 0, "word " * step, whole)
                    else:
                        yield Piece(sample, 0, self.picture(seed + sample, step / self.steps), whole)
            if output == "mixed":
                yield from (Piece(sample, 1, f"words for {text}", True) for sample in range(num))
            self.num_finished += 1

    def stream_infill(
        self,
        picture: Image.Image,
        region: Image.Image,
        prompt: Sequence[Any],
        *,
        num: int,
        seed: int,
        preview_every: int,
        **options: Any,
    ) -> Iterator[Piece]:
        call = {"picture": picture, "region": region, "prompt": prompt, "num": num, "seed": seed, **options}
        self.calls = [*self.calls[-9:], call]
        if picture.size != region.size:
            raise AssertionError("picture and region differ in size")
        with self._counted():
            for step in range(1, self.steps + 1):
                time.sleep(self.step_s)
                for sample in range(num):
                    drawn, whole = picture.copy(), step == self.steps
                    drawn.paste((200, 30 * sample, 30) if whole else (235, 235, 235), mask=region)
                    yield Piece(sample, 0, drawn, whole)
            self.num_infilled += 1
