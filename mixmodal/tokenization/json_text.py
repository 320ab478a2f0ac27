"""Text tokenizers of foreign models: `tokenizers` JSON files, byte-level BPE and sentencepiece-style."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mixmodal.extras import import_extra
from mixmodal.files import write_whole
from mixmodal.tokenization.control_tokens import find_control_tokens, read_tokenizer_file, without_control_tokens
from mixmodal.tokenization.text import SPACE_MARK, check_surrogates

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class JsonTextTokenizer:
    """Strings to piece indices and back with the BPE of a `tokenizers` JSON file. The index of a piece is its id in
    the file less `first_piece`.

    No string becomes a control token: what a user types stays text, `</s>` as well as `IMGIMGAZ`. Nothing is put in
    front or behind. Control tokens among the pieces, and rows without a name, are pieces that `encode` never gives
    and that decode to nothing, of 0 bytes.

    `decode(encode(text)) == text` for byte-level files without a normaliser. What is not exact:

    - A file that puts a space in front of every text (Llama's) does so for every part of a document, and its decoder
      takes one away: pieces from the middle of a text lose a space in front, and `piece_bytes` of a text add up to
      one more than its bytes. Newer files (the step `Metaspace`) put none where a text begins with one: that one is
      lost.
    - A file that writes spaces as U+2581 gives that character back as a space.
    - A file with a normaliser gives the normalised text back.
    - Added tokens that are not special, such as runs of spaces, are spelled with the pieces of the BPE.

    Args:
        path: the file.
        vocab_size: rows of the model's embedding; see `read_control_tokens`.

    Raises:
        ValueError: naming file and token, for a file of another kind or with control tokens in no order; or where the
            library `tokenizers` is not installed.
    """

    suffix: ClassVar[str] = ".json"

    def __init__(self, path: Path | str, vocab_size: int | None = None) -> None:
        library = import_extra("tokenizers", "finetune", f"{path}: a text tokenizer in JSON needs")
        path = Path(path)
        content = read_tokenizer_file(path)
        self._path, self._file = path, path.read_bytes()
        self.control = find_control_tokens(content, path, vocab_size)
        text = without_control_tokens(content, self.control)
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # what the library raises
            raise ValueError(f"{path}: the `tokenizers` library can not read it: {error}") from error
        self._pieces: dict[int, str] = {index: name for name, index in json.loads(text)["model"]["vocab"].items()}
        steps = [*_steps(content.get("decoder")), *_steps(content.get("pre_tokenizer"))]
        self._is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        marks = json.dumps([content.get("normalizer"), *steps], ensure_ascii=False)
        self._has_space_mark = SPACE_MARK in marks or any(step.get("type") == "Metaspace" for step in steps)

    @classmethod
    def load(cls, path: Path | str, vocab_size: int | None = None) -> JsonTextTokenizer:
        """Reads a file; see the class."""
        return cls(path, vocab_size)

    def save(self, path: Path | str) -> None:
        """Writes the file as it was read, byte for byte, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self._file)

    @property
    def first_piece(self) -> int:
        """Id of piece 0 in the file."""
        return self.control.first_piece

    @property
    def num_pieces(self) -> int:
        """Number of pieces, the rows from `first_piece` on; indices are 0 .. num_pieces - 1."""
        return self.control.num_rows - self.first_piece

    @cached_property
    def piece_bytes(self) -> list[int]:
        """Bytes that each piece stands for in UTF-8, 0 for those that decode to nothing."""
        return [self._count_bytes(self._pieces.get(self.first_piece + index, "")) for index in range(self.num_pieces)]

    def _count_bytes(self, piece: str) -> int:
        if self._is_byte_level:
            return len(piece)  # a letter a byte
        if BYTE_PIECE.fullmatch(piece):
            return 1
        return len((piece.replace(SPACE_MARK, " ") if self._has_space_mark else piece).encode())

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file: equal hashes mean equal pieces."""
        return hashlib.sha256(self._file).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Piece indices of a string.

        Raises:
            ValueError: for a lone surrogate, or a character that the file has neither a piece nor bytes for.
        """
        check_surrogates(text)
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the unknown token is no piece
            raise ValueError(f"{self._path}: a character of {text[:80]!r} has no piece and no bytes") from error
        return [identity - self.first_piece for identity in ids]

    def decode(self, pieces: Sequence[int]) -> str:
        """The string of piece indices; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: for an index outside 0 .. num_pieces - 1.
        """
        ids = [int(piece) + self.first_piece for piece in pieces]
        if ids and (min(ids) < self.first_piece or max(ids) >= self.control.num_rows):
            raise ValueError(f"text pieces must lie in 0 .. {self.num_pieces - 1}")
        return self._tokenizer.decode(ids)  # those that are not in its vocabulary give nothing


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The parts of a pipeline of the file, however deep."""
    if isinstance(step, dict):
        yield step
        for key in ("decoders", "pretokenizers"):
            for inner in step.get(key) or []:
                yield from _steps(inner)
