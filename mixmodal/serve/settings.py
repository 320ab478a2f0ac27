"""What a visitor has chosen, and what of it acts on a prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from PIL.Image import Image as Picture

from mixmodal.pipeline.options import DEFAULT_SAMPLING, DEFAULT_SCALE, SamplingOptions

Output = Literal["image", "text", "mixed"]
OUTPUTS: tuple[str, ...] = get_args(Output)
MAX_SEED = 2**31 - 1
NEW_SEEDS = 1_000_000
"""New seeds are below this: short enough to be read out."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices beside the prompt.

    Args:
        output: what the model answers with.
        temperature, top_p: how tokens are drawn, texts and pictures alike.
        guidance_scale: how closely pictures follow the text; 1 is none.
        image_guidance_scale: how closely they follow the prompt's pictures; 1 is none.
        num: samples.
        seed: 0 .. `MAX_SEED`; equal seeds give equal samples.
        retrieve: documents of the memory that are read first.
        remember: earlier turns that are read first.

    Raises:
        ValueError: for what no control of the page gives; the sampler checks the rest.
    """

    output: str = "image"
    temperature: float = DEFAULT_SAMPLING["image"].temperature
    top_p: float = DEFAULT_SAMPLING["image"].top_p
    guidance_scale: float = DEFAULT_SCALE
    image_guidance_scale: float = 1.0
    num: int = 1
    seed: int = 0
    retrieve: int = 0
    remember: int = 0

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}; choose {', '.join(OUTPUTS)}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"the seed is {self.seed}; it must lie in 0 .. {MAX_SEED}")
        if min(self.retrieve, self.remember) < 0:
            raise ValueError(f"retrieve is {self.retrieve} and remember is {self.remember}; both must be 0 or more")

    def options(self, prompt: Sequence[str | Picture]) -> tuple[SamplingOptions, list[str]]:
        """Options for `MixedModal`, with no guidance that can not act on this prompt.

        Beside them notes, which say so where the visitor has asked for it.
        """
        options: SamplingOptions = {"temperature": self.temperature, "top_p": self.top_p}
        notes: list[str] = []
        idle = self._idle(any(isinstance(part, str) for part in prompt), "no text")
        options["guidance_scale"] = 1.0 if idle else self.guidance_scale
        if idle and self.guidance_scale not in (1, DEFAULT_SCALE):
            notes.append(f"guidance not used: {idle}")
        idle = self._idle(any(isinstance(part, Picture) for part in prompt), "no picture")
        options["image_guidance_scale"] = 1.0 if idle else self.image_guidance_scale
        if idle and self.image_guidance_scale != 1:
            notes.append(f"image guidance not used: {idle}")
        return options, notes

    def _idle(self, is_given: bool, missing: str) -> str:
        """Why guidance can not act; empty where it can."""
        if self.output == "text":
            return "it acts on pictures only"
        return "" if is_given else f"the prompt has {missing}"

    def describe(self, prompt: Sequence[str | Picture]) -> str:
        """One line for the page: what acts on this prompt."""
        parts = [f"seed {self.seed}", f"temperature {self.temperature:g}", f"top-p {self.top_p:g}"]
        options, _ = self.options(prompt)
        scales = {"guidance": options.get("guidance_scale"), "image guidance": options.get("image_guidance_scale")}
        parts += [f"{name} {scale:g}" for name, scale in scales.items() if scale is not None and scale != 1]
        return " \N{MIDDLE DOT} ".join(parts)


def choose_seed(seed: float | None, is_random: bool) -> int:
    """The seed of the field, or a new one; an empty field is 0."""
    return random.SystemRandom().randrange(NEW_SEEDS) if is_random else int(seed or 0)


def default_sampling(output: str) -> tuple[float, float]:
    """Temperature and top-p that an output starts with."""
    sampling = DEFAULT_SAMPLING["text" if output == "text" else "image"]
    return sampling.temperature, sampling.top_p
