"""Documents of text and coded parts, and the one place that spells them as ids and parses them back."""

from mixmodal.document.formats import (
    FORMATS,
    Block,
    ChameleonFormat,
    CM3LeonFormat,
    FormatName,
    Run,
    SequenceFormat,
    build_format,
    count_fitting,
    group_texts,
)
from mixmodal.document.parts import (
    PART_TYPES,
    Coded,
    Document,
    Image,
    Mask,
    Part,
    SequenceError,
    Text,
    TextCodec,
)

__all__ = [
    "FORMATS",
    "PART_TYPES",
    "Block",
    "CM3LeonFormat",
    "ChameleonFormat",
    "Coded",
    "Document",
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
    "group_texts",
]
