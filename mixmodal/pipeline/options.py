"""How samples are drawn, as users say it: one value for all modalities or one for each, and what steers pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, TypeVar, cast

from mixmodal.sampling.guidance import NO_GUIDANCE, Guidance, Unconditional
from mixmodal.sampling.rules import TokenSampling

# Chameleon's settings for text and Anole's for images (arXiv 2405.09818 and 2407.06135, released code), but for
# Chameleon's repetition penalty of 1.2, which would keep a text from saying what its prompt says
DEFAULT_SAMPLING = {
    "text": TokenSampling(temperature=0.7, top_p=0.9),
    "image": TokenSampling(temperature=1.0, top_p=0.9),
}

DEFAULT_SCALE = 2.0
"""Of guidance: the best on the demo pictures (docs/results.md)."""

Value = TypeVar("Value", int, float)
PerModality = Value | Mapping[str, Value] | None
"""One value for all modalities, one by modality, or None for the default."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn; what is left out has its default.

    Args:
        temperature, top_k, top_p, min_p, repetition_penalty: see `TokenSampling`; for all modalities, or by modality as
            `{"text": 0.7, "image": 1.0}`.
        guidance_scale: weight of classifier-free guidance of pictures: how closely they follow the text; 1 is none, and
            None `DEFAULT_SCALE` wherever a picture may follow a text.
        image_guidance_scale: the same for the prompt's pictures: `text_scale` and `image_scale` of `Guidance`.
        unconditional, contrast_k, contrast_alpha: see `Guidance`.
        size: width and height in pixels of the pictures to draw, for models of pictures of several sizes; None leaves
            them to the model.
    """

    temperature: PerModality[float]
    top_k: PerModality[int]
    top_p: PerModality[float]
    min_p: PerModality[float]
    repetition_penalty: PerModality[float]
    guidance_scale: float | None
    image_guidance_scale: float
    unconditional: Unconditional
    contrast_k: int
    contrast_alpha: float
    size: tuple[int, int] | None


def sampling_options(samplings: Mapping[str, TokenSampling]) -> SamplingOptions:
    """How the tokens of these modalities are drawn, all of it."""
    names = [one.name for one in fields(TokenSampling)]
    found = {name: {modality: getattr(one, name) for modality, one in samplings.items()} for name in names}
    return cast(SamplingOptions, found)


GUIDANCE = {
    "guidance_scale": "text_scale",
    "image_guidance_scale": "image_scale",
    "unconditional": "unconditional",
    "contrast_k": "contrast_k",
    "contrast_alpha": "contrast_alpha",
}
"""Options by what `Guidance` calls them."""


def build_guidance(options: SamplingOptions, follows_text: bool = False) -> Guidance:
    """What steers pictures.

    Args:
        follows_text: whether a picture may follow a text, so that there is guidance where none is asked for.

    Raises:
        ValueError: for settings that can not act.
    """
    given = {name: options[option] for option, name in GUIDANCE.items() if options.get(option) is not None}
    if follows_text and "text_scale" not in given and not given.get("contrast_k"):
        given["text_scale"] = DEFAULT_SCALE
    return Guidance(**given)


def is_guided(options: SamplingOptions) -> bool:
    """Whether anything is asked for that steers pictures."""
    return any(options.get(option) not in (None, getattr(NO_GUIDANCE, name)) for option, name in GUIDANCE.items())


def refuse_size(options: SamplingOptions, what: str) -> None:
    """Whether a size is asked for where none can act.

    Raises:
        ValueError: where it is.
    """
    if options.get("size") is not None:
        raise ValueError(f"size can not act on {what}; leave it out")


def build_sampling(modalities: Sequence[str], options: SamplingOptions) -> dict[str, TokenSampling]:
    """The settings of each modality, with defaults for what is not given.

    Raises:
        ValueError: for a value out of range, of a modality that there is not, or an option that there is not.
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in modalities}
    for option, values in options.items():
        if option in GUIDANCE or option == "size":
            continue
        if option not in SamplingOptions.__annotations__:
            raise ValueError(f"there is no option {option!r}; choose {', '.join(SamplingOptions.__annotations__)}")
        values = dict.fromkeys(modalities, values) if not isinstance(values, Mapping) else values
        for modality, value in values.items():
            if modality not in settings:
                raise ValueError(f"{option} for {modality!r}; the model has {', '.join(modalities)}")
            if value is not None:
                settings[modality][option] = value
    defaults = {name: DEFAULT_SAMPLING.get(name, TokenSampling()) for name in modalities}
    return {name: TokenSampling(**{**vars(defaults[name]), **settings[name]}) for name in modalities}
