"""The text tokenizer: sentencepiece BPE with byte fallback that gives every string back as it was."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import sentencepiece

from mixmodal.files import write_whole

# sentencepiece writes a space as this character, so that it can not tell the two apart; it is spelled in bytes instead.
SPACE_MARK = "\u2581"
# The 256 byte pieces and the unknown piece, which sentencepiece insists on and byte fallback never produces.
NUM_FIXED_PIECES = 257
# sentencepiece drops training texts above its limit, so longer ones are cut into stretches of this many characters.
MAX_STRETCH = 8192
RETRAIN = "train one with `mixmodal train-text-tokenizer`"
# Characters that sentencepiece's trainer keeps for itself; a training text that holds one would be dropped whole.
RESERVED = re.compile("[\u2581\u2585]+")


class TextTokenizer:
    """Strings to piece indices and back: `decode(encode(text)) == text` for every string that UTF-8 can hold.

    No piece is a control token: what a user types stays text, `</s>` as well as `<mask:0>`.

    Args:
        model: the bytes of a sentencepiece model that `train_text_tokenizer` wrote.
        name: where the model came from, for messages.

    Raises:
        ValueError: where the bytes are no model, or one that changes text (no byte fallback, a normalisation rule,
            a dummy prefix, control tokens).
    """

    suffix: ClassVar[str] = ".model"

    def __init__(self, model: bytes, name: str = "the text tokenizer") -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name}: not a sentencepiece model; {RETRAIN}") from error
        byte_pieces = [index for index in range(self.num_pieces) if self._processor.IsByte(index)]
        if len(byte_pieces) != 256 or any(self._processor.IsControl(index) for index in range(self.num_pieces)):
            raise ValueError(f"{name}: the model needs byte fallback and no control tokens; {RETRAIN}")
        self._space_mark = [byte_pieces[byte] for byte in SPACE_MARK.encode()]
        if self.decode(self.encode(" \ufb01 ")) != " \ufb01 ":
            raise ValueError(f"{name}: the model changes white space or normalises text; {RETRAIN}")

    @classmethod
    def load(cls, path: Path | str) -> TextTokenizer:
        """Reads a model file.

        Raises:
            ValueError: where there is no such file, or it is not a model that keeps text as it is.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no text tokenizer there; {RETRAIN}")
        return cls(path.read_bytes(), str(path))

    def save(self, path: Path | str) -> None:
        """Writes the model file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self._model)

    @property
    def num_pieces(self) -> int:
        """Number of pieces; indices are 0 .. num_pieces - 1."""
        return self._processor.GetPieceSize()

    @cached_property
    def piece_bytes(self) -> list[int]:
        """Bytes that each piece stands for in UTF-8: those of the pieces of a text add up to the text's."""
        pieces = map(self._processor.IdToPiece, range(self.num_pieces))
        is_byte = map(self._processor.IsByte, range(self.num_pieces))
        return [1 if one else len(piece.replace(SPACE_MARK, " ").encode()) for piece, one in zip(pieces, is_byte)]

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the model file: equal hashes mean equal pieces."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Piece indices of a string.

        Raises:
            ValueError: for a lone surrogate, which UTF-8 can not hold.
        """
        check_surrogates(text)
        first, *rest = text.split(SPACE_MARK)
        pieces = self._processor.EncodeAsIds(first)
        for stretch in rest:
            pieces += self._space_mark + self._processor.EncodeAsIds(stretch)
        return pieces

    def decode(self, pieces: Sequence[int]) -> str:
        """The string of piece indices; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: for an index outside 0 .. num_pieces - 1.
        """
        pieces = [int(piece) for piece in pieces]
        if pieces and (min(pieces) < 0 or max(pieces) >= self.num_pieces):
            raise ValueError(f"text pieces must lie in 0 .. {self.num_pieces - 1}")
        return self._processor.DecodeIds(pieces)


def check_surrogates(text: str) -> None:
    """
    Raises:
        ValueError: for a lone surrogate, which UTF-8 can not hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}, which UTF-8 can not hold") from error


def train_text_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, *, character_coverage: float = 0.9995
) -> TextTokenizer:
    """Trains a BPE tokenizer (sentencepiece, arXiv 1808.06226) and saves it.

    Args:
        texts: what to learn from; read once.
        path: the model file to write.
        vocab_size: the most pieces; few or short texts give fewer.
        character_coverage: share of the characters of the texts that get a piece of their own; the rest is bytes.

    Raises:
        ValueError: where there is no text, or `vocab_size` does not hold the bytes and the characters.
    """
    if vocab_size <= NUM_FIXED_PIECES:
        raise ValueError(f"vocab_size is {vocab_size}; it must exceed {NUM_FIXED_PIECES}, the number of byte pieces")
    model = io.BytesIO()
    failures: list[Exception] = []
    stretches = _noting(_stretches(texts), failures)
    first = next(stretches, None)
    if first is None:
        raise ValueError(f"{path}: there is no text to train the tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain([first], stretches),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            required_chars=SPACE_MARK,  # without a piece of its own a space would come back as this character
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * MAX_STRETCH,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise ValueError(f"{path}: can not be trained with vocab_size {vocab_size}: {error}") from error
    tokenizer = TextTokenizer(model.getvalue(), str(path))
    tokenizer.save(path)
    return tokenizer


def _noting(texts: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """The texts; what they raise is noted, because sentencepiece makes a RuntimeError of it."""
    try:
        yield from texts
    except Exception as error:
        failures.append(error)
        raise


def _stretches(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that sentencepiece's trainer takes."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"training text {number} has a lone surrogate at character {error.start}") from error
        for stretch in RESERVED.split(text):
            for start in range(0, len(stretch), MAX_STRETCH):
                yield stretch[start : start + MAX_STRETCH]
