"""Documents of text and coded parts, and the one place that spells them as ids and parses them back."""

from mixmodal.document.building import FORMATS, build_format
from mixmodal.document.formats import (
    Block,
    FormatName,
    Grid,
    Lines,
    Piece,
    Run,
    SequenceFormat,
    count_fitting,
)
from mixmodal.document.lumina import UNIT_PIXELS, LuminaFormat
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
from mixmodal.document.spellings import ChameleonFormat, CM3LeonFormat
from mixmodal.document.turns import Turn, spell_turns

__all__ = [
    "FORMATS",
    "PART_TYPES",
    "UNIT_PIXELS",
    "Block",
    "CM3LeonFormat",
    "ChameleonFormat",
    "Coded",
    "Document",
    "EndOfTurn",
    "FormatName",
    "Grid",
    "Image",
    "Lines",
    "LuminaFormat",
    "Mask",
    "Part",
    "Piece",
    "Run",
    "SequenceError",
    "SequenceFormat",
    "Text",
    "TextCodec",
    "Turn",
    "build_format",
    "count_fitting",
    "spell_turns",
]
