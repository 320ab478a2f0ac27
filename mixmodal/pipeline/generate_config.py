"""The options of the generate command."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch

from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import DEFAULT_SAMPLING, SamplingOptions, build_guidance
from mixmodal.pipeline.prompt_files import NamedPrompt, PromptPart, Shard, is_launched
from mixmodal.pipeline.reading import ReadingConfig
from mixmodal.sampling.guidance import Unconditional
from mixmodal.sampling.rules import TokenSampling

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReadingConfig):
    """Samples texts and pictures behind a prompt, or behind each of many.

    `--prompt TEXT` and `--image FILE`, given as often as needed, are short for the entries of `parts`, in their order.
    With `--prompts FILE.jsonl` there are many, whose samples are written as they end; the same command goes on where it
    broke off. With `--memory DIR --retrieve N` the model reads documents of a memory first.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        out: folder for the samples and `results.json`; made where it is missing.
        parts: the prompt, as `[{text: a red apple}, {image: apple.png}]`.
        prompts: a JSONL file in place of `parts`: `{"prompt": "a red apple"}` or `{"parts": [{"text": ...}, {"image":
            "apple.png"}]}` a line, where a `key` may begin the names of its files (else the number of the line does),
            `seed` and `num` stand in for those below, and paths are relative to the file's folder.
        shard: `INDEX/COUNT` takes every COUNT-th of the prompts, as 0/4 to 3/4 do in four processes, which may share
            `out`; null takes all, and under a launcher what its RANK and WORLD_SIZE say.
        contact_sheet: draw the first 64 pictures with their prompts into `contact_sheet.png`, where there is more than
            one.
        output: `text`, `image`, or `mixed` for texts and pictures as the model likes.
        num: number of samples of a prompt.
        seed: equal seeds give equal samples.
        best_of: images drawn for each one that is kept, the one from which the model reads the prompt's text best.
        guidance_scale: how closely images follow the text: weight of classifier-free guidance; 1 is none, null is 2
            wherever a picture may follow a text.
        image_guidance_scale: how closely they follow the prompt's pictures, for editing; 1 is none.
        unconditional: how guidance does without: `mask` puts a mask in the place of text (CM3Leon), `drop` leaves it
            out (Chameleon).
        contrast_k: k of contrastive decoding CD-K in place of guidance (CM3Leon); 0 is none.
        contrast_alpha: its alpha: what share of the k-th likeliest code's probability a code must have.
        text_sampling: how text is drawn.
        image_sampling: how the codes of images are drawn.
        max_new_tokens: most tokens of a sample; null is as many as the model's context takes.
        batch_size: samples in one forward; they do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    out: Path
    parts: list[PromptPart] = field(default_factory=list)
    prompts: Path | None = None
    shard: str | None = None
    contact_sheet: bool = True
    output: Literal["text", "image", "mixed"] = "image"
    num: int = 1
    seed: int = 0
    best_of: int = 1
    guidance_scale: float | None = None
    image_guidance_scale: float = 1.0
    unconditional: Unconditional = "mask"
    contrast_k: int = 0
    contrast_alpha: float = 0.1
    text_sampling: TokenSampling = DEFAULT_SAMPLING["text"]
    image_sampling: TokenSampling = DEFAULT_SAMPLING["image"]
    max_new_tokens: int | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        build_guidance(self.guidance_options(), follows_text=self.output != "text")
        if self.prompts is not None and self.parts:
            raise ValueError("give either prompts, a file, or one prompt by --prompt, --image or --parts")
        if self.shard is not None:
            Shard.parse(self.shard)
            if self.prompts is None:
                raise ValueError(f"shard is {self.shard}, which can not act on one prompt; give --prompts FILE.jsonl")
        for modality, idle in (("text", "image"), ("image", "text")):
            if self.output == modality and getattr(self, f"{idle}_sampling") != DEFAULT_SAMPLING[idle]:
                raise ValueError(f"{idle}_sampling can not act where output is {modality}; leave it out")

    def guidance_options(self) -> SamplingOptions:
        """What steers pictures."""
        return {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "unconditional": self.unconditional,
            "contrast_k": self.contrast_k,
            "contrast_alpha": self.contrast_alpha,
        }

    def options(self) -> SamplingOptions:
        """How tokens are drawn, for `MixedModal.generate`."""
        chosen = {"text": self.text_sampling, "image": self.image_sampling}
        names = [one.name for one in fields(TokenSampling)]
        by_modality = {name: {modality: getattr(one, name) for modality, one in chosen.items()} for name in names}
        return cast(SamplingOptions, {**by_modality, **self.guidance_options()})

    def drawing_options(self) -> dict[str, Any]:
        """The settings of every sample, for the results and for `MixedModal.generate_each`."""
        return {**self.options(), "best_of": self.best_of, "max_new_tokens": self.max_new_tokens}

    def describe_prompt(self, prompt: NamedPrompt) -> dict[str, Any]:
        """What makes the samples of a prompt, as plain data."""
        return {
            "model": self.model,
            "prompt": prompt.described,
            "output": self.output,
            "seed": prompt.seed,
            "settings": self.drawing_options(),
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
            "settings": self.drawing_options(),
            **self.describe(),
        }

    def load(self) -> MixedModal:
        """The model, on this process's device where a launcher has started several, with its memory."""
        device = self.device
        if device == "auto" and is_launched() and torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        model = MixedModal.from_pretrained(self.model, device, DTYPES[self.dtype], self.batch_size)
        self.attach(model)
        return model

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        """Gathers `--prompt` and `--image` into `--parts`, because an ordinary option would lose their order.

        Raises:
            ValueError: for one of them without a value, or beside `--parts`.
        """
        rest, parts, waiting = [], [], list(argv)
        while waiting:
            argument = waiting.pop(0)
            name, _, value = argument.partition("=")
            if name not in ("--prompt", "--image"):
                rest.append(argument)
                continue
            if name == argument:
                if not waiting or waiting[0].startswith("--"):
                    raise ValueError(f"{name} needs a value; write {name}=VALUE for one that begins with --")
                value = waiting.pop(0)
            parts.append({"text" if name == "--prompt" else "image": value})
        if not parts:
            return rest
        if any(argument.partition("=")[0] == "--parts" for argument in rest):
            raise ValueError("give the prompt either by --prompt and --image or by --parts")
        return [*rest, f"--parts={json.dumps(parts)}"]
