"""Documents of text and coded parts, and the one place that spells them as ids and parses them back."""

from mixmodal.document.formats import (
    Block,
    FormatName,
    Run,
    SequenceFormat,
    count_fitting,
)
from mixmodal.document.parts import (
    PART_TYPES,
    Coded,
    Document,
    EndOfTurn,
    Image,
    Mask,
    Part,
    SequenceError,
    Text,
    TextCodec,
)
from mixmodal.document.spellings import FORMATS, ChameleonFormat, CM3LeonFormat, build_format

__all__ = [
    "FORMATS",
    "PART_TYPES",
    "Block",
    "CM3LeonFormat",
    "ChameleonFormat",
    "Coded",
    "Document",
    "EndOfTurn",
    "FormatName",
    "Image",
    "Mask",
    "Part",
    "Run",
    "SequenceError",
    "SequenceFormat",
    "Text",
    "TextCodec",
    "build_format",
    "count_fitting",
]
