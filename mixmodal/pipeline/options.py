"""How tokens are drawn, as users say it: one value for all modalities, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mixmodal.sampling.guidance import TokenSampling

# Chameleon's settings for text and Anole's for images (arXiv 2405.09818 and 2407.06135, released code)
DEFAULT_SAMPLING = {
    "text": TokenSampling(temperature=0.7, top_p=0.9),
    "image": TokenSampling(temperature=1.0, top_p=0.9),
}

Value = TypeVar("Value", int, float)
PerModality = Value | Mapping[str, Value] | None
"""One value for all modalities, one by modality, or None for the default."""


def build_sampling(
    modalities: Sequence[str],
    temperature: PerModality[float],
    top_k: PerModality[int],
    top_p: PerModality[float],
) -> dict[str, TokenSampling]:
    """The settings of each modality, with defaults for what is not given.

    Raises:
        ValueError: for a value out of range, or of a modality that there is not.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings: dict[str, dict[str, Any]] = {name: {} for name in modalities}
    for option, values in given.items():
        values = dict.fromkeys(modalities, values) if not isinstance(values, Mapping) else values
        for modality, value in values.items():
            if modality not in settings:
                raise ValueError(f"{option} for {modality!r}; the model has {', '.join(modalities)}")
            if value is not None:
                settings[modality][option] = value
    defaults = {name: DEFAULT_SAMPLING.get(name, TokenSampling()) for name in modalities}
    return {name: TokenSampling(**{**vars(defaults[name]), **settings[name]}) for name in modalities}
