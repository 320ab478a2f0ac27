"""Small tokenizer files with the token names of Chameleon's: fewer codes, sentinels and pieces, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Kind = Literal["byte_level", "metaspace"]
KINDS: list[Kind] = ["byte_level", "metaspace"]

WORDS = ("a", "an", "red", "green", "apple", "pear", "house", "the", "of", "and", "picture", "style", "image")
FIRST_RESERVED = 8706
"""Number in the name of the first reserved token, as in the true file: it is Chameleon's end of turn."""


def code_name(code: int) -> str:
    """`IMGIMG...Z` with the decimal digits of the code as letters, `A` for 0."""
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def control_names(num_codes: int, num_sentinels: int, num_reserved: int) -> list[str]:
    """Names by id, from 0 on."""
    return [
        *("<s>", "<pad>", "</s>", "<unk>"),
        *map(code_name, range(num_codes)),
        *("<eoss>", "<racm3:break>"),
        *(f"<sentinel:{index}>" for index in range(num_sentinels)),
        *(f"<reserved{FIRST_RESERVED + index:05}>" for index in range(num_reserved)),
    ]


def write_tokenizer(
    path: Path, num_codes: int = 40, num_sentinels: int = 8, num_reserved: int = 4, *, kind: Kind = "byte_level"
) -> dict[str, int]:
    """Writes a `tokenizers` JSON file of a few hundred text pieces behind the control tokens; ids by name."""
    names = control_names(num_codes, num_sentinels, num_reserved)
    pieces, merges = text_pieces(kind)
    vocabulary = {name: index for index, name in enumerate([*names, *pieces])}
    assert len(vocabulary) == len(names) + len(pieces)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tokenizer_json(kind, vocabulary, merges, names), indent=1), encoding="utf-8")
    return vocabulary


def text_pieces(kind: Kind) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges: single bytes, letters, and the words of `WORDS` with and without a space in front."""
    space = "\u0120" if kind == "byte_level" else "\u2581"
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    singles = byte_letters() if kind == "byte_level" else [*(f"<0x{byte:02X}>" for byte in range(256)), space, *letters]
    pieces, merges = dict.fromkeys(singles), {}
    for word in [*(space + word for word in WORDS), *WORDS]:
        for end in range(2, len(word) + 1):
            merges[(word[: end - 1], word[end - 1])] = None
            pieces[word[:end]] = None
    return list(pieces), list(merges)


def byte_letters() -> list[str]:
    """The letters that byte-level BPE writes the bytes 0 .. 255 with."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def tokenizer_json(
    kind: Kind, vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]
) -> dict[str, Any]:
    """The content of a file; every name of `special` is an added token, and a post-processor puts `<s>` in front."""
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    if kind == "byte_level":
        steps: dict[str, Any] = {
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        }
    else:
        model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
        steps = {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                ],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
        }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = vocabulary.get("<s>", 0)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[name], "content": name, **flags} for name in special],
        **steps,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        },
        "model": model,
    }
