"""Which sequence formats there are, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixmodal.document.formats import FormatName, SequenceFormat
from mixmodal.document.lumina import LuminaFormat
from mixmodal.document.parts import TextCodec
from mixmodal.document.spellings import ChameleonFormat, CM3LeonFormat
from mixmodal.vocabulary import Vocabulary

FORMATS: dict[FormatName, type[SequenceFormat]] = {
    "cm3leon": CM3LeonFormat,
    "chameleon": ChameleonFormat,
    "lumina": LuminaFormat,
}


def build_format(
    name: FormatName,
    vocabulary: Vocabulary,
    grids: Mapping[str, Sequence[int]],
    text_tokenizer: TextCodec | None = None,
    codes_per_unit: int | None = None,
) -> SequenceFormat:
    """The format by name; `build_format(vocabulary=vocabulary, **format.settings)` is the same again.

    Args:
        codes_per_unit: of `lumina` alone, see `LuminaFormat`.

    Raises:
        ValueError: for an unknown name, grids that do not match the vocabulary's codebooks, or `codes_per_unit` where
            it can not act or is missing.
    """
    if name not in FORMATS:
        *others, last = FORMATS
        raise ValueError(f"sequence format {name!r} is unknown; choose {', '.join(others)} or {last}")
    if (codes_per_unit is None) == (name == "lumina"):
        raise ValueError(f"sequence format {name}: codes_per_unit is {codes_per_unit}; lumina has it, and no other")
    if codes_per_unit is None:
        return FORMATS[name](vocabulary, grids, text_tokenizer)
    return LuminaFormat(vocabulary, grids, text_tokenizer, codes_per_unit=codes_per_unit)
