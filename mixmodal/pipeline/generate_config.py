"""The options of the generate command."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixmodal.config import check_least
from mixmodal.document import EndOfTurn
from mixmodal.pipeline.drawing_config import DrawingConfig
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.infilling import Order
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import DEFAULT_SAMPLING, is_guided
from mixmodal.pipeline.prompt_files import NamedPrompt
from mixmodal.pipeline.prompt_parts import PromptPart, gather_parts
from mixmodal.records import Shard
from mixmodal.sampling.grammar import INFILL
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content

SIZE = re.compile(r"[1-9]\d{0,5}x[1-9]\d{0,5}")
Given = Content | PartialPicture
"""An opened part of a prompt."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawingConfig):
    """Samples texts and pictures behind a prompt, or behind each of many.

    `--prompt TEXT` and `--image FILE`, given as often as needed, are short for the entries of `parts`, in their order.
    `--turn` between or behind them ends a speaker's turn, for models of conversations; the answer then ends with its
    own.

    With `--output infill` the model fills in what the prompt leaves open: `--mask 0` stands for a text, and behind its
    image `--box L,T,R,B` or `--region FILE` for what is drawn anew of it.

    With `--prompts FILE.jsonl` there are many, whose samples are written as they end; the same command goes on where it
    broke off. With `--memory DIR --retrieve N` the model reads documents of a memory first.

    Further options are those of `DrawingConfig`.

    Args:
        parts: the prompt, as `[{text: a red apple}, {image: apple.png}]`; for `infill` with masks in its texts, as
            `[{text: "a red "}, {mask: 0}]`, or with a box or region of its last image, as `[{image: apple.png, box: [0,
            16, 32, 32]}]` or `[{image: apple.png, region: mask.png}]`, where white is drawn anew. `{end_of_turn: true}`
            ends a turn.
        prompts: a JSONL file in place of `parts`: `{"prompt": "a red apple"}` or `{"parts": [{"text": ...}, {"image":
            "apple.png"}]}` a line, where a `key` may begin the names of its files (else the number of the line does),
            `seed` and `num` stand in for those below, and paths are relative to the file's folder.
        shard: `INDEX/COUNT` takes every COUNT-th of the prompts, as 0/4 to 3/4 do in four processes, which may share
            `out`; null takes all, and under a launcher what its RANK and WORLD_SIZE say.
        contact_sheet: draw the first 64 pictures with their prompts into `contact_sheet.png`, where there is more than
            one.
        output: `text`, `image`, `mixed` for texts and pictures as the model likes, or `infill` for what fills the holes
            of a prompt: the texts of its masks, or its picture with the region drawn anew.
        size: `WIDTHxHEIGHT` of the picture in pixels, as 768x512, for models of pictures of several sizes; null leaves
            it to the model.
        template: what the model reads in place of the prompt's only text, which stands at `{prompt}` in it, and the
            size's numbers at `{width}` and `{height}`; null is the text alone.
        end_turn: end the prompt's turn where no `--turn` does.
        order: of the codes of a region: `raster` draws one by one and knows what stands before each; `masks` reads all
            that is known of the picture, which takes a model that was trained with masks in pictures (CM3).
        best_of: images drawn for each one that is kept, the one from which the model reads the prompt's text best.
        ranker: folder or hub id of a CLIP or SigLIP: the one that is nearest to the text by it is kept instead.
        text_sampling: how text is drawn.
        max_new_tokens: most tokens of a sample, or of the text of a mask; null is as many as the model's context takes.
    """

    parts: list[PromptPart] = field(default_factory=list)
    prompts: Path | None = None
    shard: str | None = None
    contact_sheet: bool = True
    output: Literal["text", "image", "mixed", "infill"] = "image"
    size: str | None = None
    template: str | None = None
    end_turn: bool = False
    order: Order = "raster"
    best_of: int = 1
    ranker: str | None = None
    text_sampling: TokenSampling = DEFAULT_SAMPLING["text"]
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "best_of", "max_new_tokens")
        self.check_guidance(follows_text=self.output != "text")
        if self.prompts is not None and self.parts:
            raise ValueError("give either prompts, a file, or one prompt by --prompt, --image or --parts")
        if self.ranker is not None and self.best_of == 1:
            raise ValueError(
                "ranker can not act without best_of; say how many images are drawn for each, or leave it out"
            )
        if self.shard is not None:
            Shard.parse(self.shard)
            if self.prompts is None:
                raise ValueError(f"shard is {self.shard}, which can not act on one prompt; give --prompts FILE.jsonl")
        if self.output == INFILL and self.best_of != 1:
            raise ValueError("best_of can not act where output is infill; leave it out")
        if self.output != INFILL and self.order != "raster":
            raise ValueError(f"order can not act where output is {self.output}; leave it out")
        self._check_framing()
        if self.output in ("text", "image"):
            self._check_sampling(self.output, f"output is {self.output}")

    def _check_framing(self) -> None:
        """Whether size, template and turn can act."""
        if self.size is not None and not SIZE.fullmatch(self.size):
            raise ValueError(f"size is {self.size!r}; it must be WIDTHxHEIGHT in pixels, as 768x512")
        if self.size is not None and self.output != "image":
            raise ValueError(f"size can not act where output is {self.output}; leave it out")
        if self.output == INFILL and (self.template is not None or self.end_turn):
            raise ValueError(
                "template and end_turn can not act where output is infill; write texts and --turn where they stand"
            )
        if self.template is None:
            return
        if "{prompt}" not in self.template:
            raise ValueError(f"template is {self.template!r}; it must have {{prompt}}, where the prompt's text stands")
        if self.size is None and ("{width}" in self.template or "{height}" in self.template):
            raise ValueError(f"template is {self.template!r}, which names a size; give --size WIDTHxHEIGHT")

    def frame(self, parts: Sequence[Given]) -> list[Given]:
        """The opened parts of a prompt as the model reads them: with template and end of turn."""
        framed = list(parts)
        if self.template is not None:
            width, height = (self.size or "x").split("x")
            around = self.template.replace("{width}", width).replace("{height}", height)
            framed = [around.replace("{prompt}", part) if isinstance(part, str) else part for part in framed]
        if self.end_turn and not isinstance(framed[-1], EndOfTurn):
            framed.append(EndOfTurn())
        return framed

    def _check_sampling(self, drawn: str, where: str) -> None:
        """Whether what is set of the sampling can act where only the modality `drawn` is."""
        idle = "image" if drawn == "text" else "text"
        if getattr(self, f"{idle}_sampling") != DEFAULT_SAMPLING[idle]:
            raise ValueError(f"{idle}_sampling can not act where {where}; leave it out")

    def check_prompt(self, prompt: NamedPrompt) -> None:
        """Whether a prompt is one for the output, and what is set can act on it; nothing is opened.

        Of a file some prompts may be without what a setting of the sampling acts on.

        Raises:
            ValueError: naming the prompt, or a part of it.
        """
        prompt.check()
        try:
            if self.output == INFILL:
                self._check_holes(prompt)
            else:
                prompt.holes.check_none(self.output)
            texts = sum(bool(part.text) for part in prompt.parts)
            if self.template is not None and texts != 1:
                raise ValueError(f"the template is for a prompt of one text, and there are {texts}; leave it out")
        except ValueError as error:
            raise ValueError(f"{prompt.name}: {error}") from error

    def _check_holes(self, prompt: NamedPrompt) -> None:
        holes = prompt.holes
        holes.check(order=self.order, is_guided=is_guided(self.guidance_options()), reads=bool(self.retrieve))
        if self.prompts is None:
            self.check_guidance(follows_text=bool(prompt.caption))
            drawn, where = ("text", "masks are filled") if holes.masks else ("image", "a region is filled")
            self._check_sampling(drawn, where)
            if holes.regions and self.max_new_tokens is not None:
                raise ValueError("max_new_tokens can not act where a region is filled; leave it out")

    @property
    def samplings(self) -> dict[str, TokenSampling]:
        """How tokens are drawn, by modality."""
        return {"text": self.text_sampling, **super().samplings}

    def drawing_options(self) -> dict[str, Any]:
        """The settings of every sample, for the results and for `MixedModal.generate_each`."""
        more: dict[str, Any] = {"order": self.order} if self.output == INFILL else {}
        if self.size is not None:
            more["size"] = tuple(map(int, self.size.split("x")))
        return {**self.options(), "best_of": self.best_of, "max_new_tokens": self.max_new_tokens, **more}

    def _framing(self) -> dict[str, Any]:
        """What stands around prompts, as plain data; nothing where nothing does."""
        template = {} if self.template is None else {"template": self.template}
        return {**template, **({"end_turn": True} if self.end_turn else {})}

    def describe_prompt(self, prompt: NamedPrompt) -> dict[str, Any]:
        """What makes the samples of a prompt, as plain data."""
        return {
            "model": self.model,
            "prompt": prompt.described,
            "output": self.output,
            "seed": prompt.seed,
            "settings": self.drawing_options(),
            "ranker": self.ranker,
            **self._framing(),
            **self.describe(),
        }

    def describe_call(self) -> dict[str, Any]:
        """What the samples of many prompts have in common, as plain data."""
        return {
            "model": self.model,
            "prompts": str(self.prompts),
            "output": self.output,
            "num": self.num,
            "seed": self.seed,
            "dtype": self.dtype,
            "ranker": self.ranker,
            "settings": self.drawing_options(),
            **self._framing(),
            **self.describe(),
        }

    def load(self) -> MixedModal:
        """The model with its memory and what ranks its pictures."""
        model = super().load()
        if self.ranker is not None:
            model.attach_ranker(self.ranker)
        return model

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        """Gathers `--prompt`, `--turn` and the like into `--parts`, because ordinary options would lose their order.

        Raises:
            ValueError: for one of them without a value, or beside `--parts`.
        """
        rest, parts = gather_parts(argv)
        if not parts:
            return rest
        if any(argument.partition("=")[0] == "--parts" for argument in rest):
            raise ValueError("give the prompt either by --prompt and --image or by --parts")
        return [*rest, f"--parts={json.dumps(parts)}"]
