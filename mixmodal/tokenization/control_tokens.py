"""Control tokens of a `tokenizers` JSON file, Chameleon's (arXiv 2405.09818) and Llama's, by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmodal.files import read_object
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
END_OF_IMAGE, BEGIN_OF_IMAGE = "<eoss>", "<racm3:break>"
END_OF_TURN, IMAGE_PLACEHOLDER = "<reserved08706>", "<image>"
CODE = re.compile(r"IMGIMG([A-J]+)Z")
# What never is text, whether a file marks it as special or not.
CONTROL = re.compile(r"<reserved\d+>|<image>|<sentinel:(\d+)>|<racm3:break>|<eoss>|IMGIMG[A-J]+Z")
NO_PIECE = "<no piece for it>"
DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")
LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


def code_name(code: int) -> str:
    """Chameleon's name of an image code: its decimal digits as letters, 53 is `IMGIMGFDZ`."""
    return f"IMGIMG{str(code).translate(DIGITS)}Z"


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """Ids of a tokenizer file that are no text; None for a token that the file does not have.

    Args:
        bos: `<s>`.
        pad: `<pad>`.
        eos: `</s>`.
        unk: `<unk>`.
        first_code: image code 0, where the file has codes; code c is `first_code + c`.
        num_codes: image codes; 0 for a file of text alone, as Llama's.
        end_of_image: `<eoss>`.
        begin_of_image: `<racm3:break>`.
        end_of_turn: `<reserved08706>`, or the sep_token where there is none of that name.
        image_placeholder: `<image>`, which transformers puts where codes will stand.
        first_piece: first id of text: behind `end_of_turn` and the control tokens that follow it without a gap; 0
            where there are no codes.
        num_rows: rows that the ids lie in.
        names: every control token's name by its id, those among the text pieces as well.
    """

    bos: int | None
    pad: int | None
    eos: int | None
    unk: int | None
    first_code: int | None = None
    num_codes: int = 0
    end_of_image: int | None = None
    begin_of_image: int | None = None
    end_of_turn: int | None = None
    image_placeholder: int | None = None
    first_piece: int = 0
    num_rows: int
    names: Mapping[int, str] = field(repr=False)


def read_control_tokens(path: Path | str, vocab_size: int | None = None) -> ControlTokens:
    """The control tokens of a `tokenizers` JSON file.

    Control is every token that the file marks as special, and every `<s> <pad> </s> <unk>`, `IMGIMG...Z`, `<eoss>`,
    `<racm3:break>`, `<sentinel:N>`, `<reservedN>` and `<image>`, marked or not, unless it is of a file without codes:
    there only what is marked. A sep_token is read from `tokenizer_config.json` or `special_tokens_map.json` beside
    the file.

    Args:
        vocab_size: rows of the model's embedding; ids behind it are ignored. By default the ids of the BPE
            vocabulary, and for a file without image codes those of the added tokens, too: behind Chameleon's rows,
            added tokens are placeholders without a row (Lumina-mGPT's `<|image|>`).

    Raises:
        ValueError: naming file and token, for a file of another kind, codes that do not stand one behind the other
            in their order, or codes without the tokens that enclose them.
    """
    path = Path(path)
    return find_control_tokens(read_tokenizer_file(path), path, vocab_size)


def read_tokenizer_file(path: Path) -> dict[str, Any]:
    """The content of a `tokenizers` JSON file with a BPE model.

    Raises:
        ValueError: naming the file, where it is none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no text tokenizer there")
    content = read_object(path)
    model = content.get("model")
    model = model if isinstance(model, dict) and "merges" in model else {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(
            f"{path}: not a tokenizer file of the `tokenizers` library with a BPE model, the kind read here"
        )
    return content


def find_control_tokens(content: Mapping[str, Any], path: Path, vocab_size: int | None) -> ControlTokens:
    """`read_control_tokens` for the content of a file that is read; `path` is for messages and the files beside it."""
    own: dict[str, int] = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    marked = {token["content"] for token in content.get("added_tokens") or [] if token.get("special")}
    codes = sorted((identity, name) for name, identity in own.items() if CODE.fullmatch(name))
    if vocab_size is None:
        num_rows = 1 + max([*own.values(), *(() if codes else added.values())], default=-1)
    else:
        num_rows = vocab_size
    ids = {name: identity for name, identity in {**own, **added}.items() if identity < num_rows}
    special = {BOS: ids.get(BOS), PAD: ids.get(PAD), EOS: ids.get(EOS), UNK: ids.get(UNK)}
    if not codes:
        names = {identity: name for name, identity in ids.items() if name in marked}
        return ControlTokens(
            bos=special[BOS], pad=special[PAD], eos=special[EOS], unk=special[UNK], num_rows=num_rows, names=names
        )
    _check_codes(codes, path)
    turn = END_OF_TURN if END_OF_TURN in ids else _read_sep_token(path)
    for name in (END_OF_IMAGE, BEGIN_OF_IMAGE, turn):
        if name is None or name not in ids:
            raise ValueError(
                f"{path}: has image codes and no {name or f'{END_OF_TURN}, nor a sep_token in tokenizer_config.json'}"
            )
    assert turn is not None
    own_names = {*marked, *special, turn}
    names = {identity: name for name, identity in ids.items() if name in own_names or CONTROL.fullmatch(name)}
    first_piece = ids[turn] + 1
    while first_piece in names:
        first_piece += 1
    return ControlTokens(
        bos=special[BOS],
        pad=special[PAD],
        eos=special[EOS],
        unk=special[UNK],
        first_code=codes[0][0],
        num_codes=len(codes),
        end_of_image=ids[END_OF_IMAGE],
        begin_of_image=ids[BEGIN_OF_IMAGE],
        end_of_turn=ids[turn],
        image_placeholder=ids.get(IMAGE_PLACEHOLDER),
        first_piece=first_piece,
        num_rows=num_rows,
        names=names,
    )


def _check_codes(codes: list[tuple[int, str]], path: Path) -> None:
    for code, (identity, name) in enumerate(codes):
        if name != code_name(code) or identity != codes[0][0] + code:
            raise ValueError(
                f"{path}: {name} has the id {identity}; the {len(codes)} image codes must stand one behind the other, "
                f"and {code_name(code)} at {codes[0][0] + code}"
            )


def _read_sep_token(path: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path.parent / name).is_file():
            token = read_object(path.parent / name).get("sep_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def vocabulary_of(control: ControlTokens, vocab_size: int) -> VocabularyConfig:
    """Sizes with which `Vocabulary` gives every control token in front of the text exactly its id of the file.

    Sentinels are what stands between `<racm3:break>` and the end of turn, reserved ones from there to the text.

    Args:
        vocab_size: rows of the model's embedding; text pieces fill it to its end.

    Raises:
        ValueError: where the file has no image codes, or its order is not ours: names the first token that differs,
            with both ids.
    """
    if control.first_code is None or control.begin_of_image is None or control.end_of_turn is None:
        raise ValueError("the tokenizer has no image codes, so that its vocabulary is not Chameleon's")
    wanted, ids = list(_expected(control)), {name: identity for identity, name in control.names.items()}
    for expected, name in wanted:
        found = ids.get(name)
        if found != expected:
            there = "is not in the tokenizer file" if found is None else f"has the id {found} in the tokenizer file"
            raise ValueError(f"{name} {there} and {expected} in this vocabulary; the order of the ids must be the same")
    for expected in range(control.begin_of_image + 1, control.first_piece):
        name = control.names.get(expected)
        if name is None:
            raise ValueError(f"id {expected} is text in the tokenizer file and a control token in this vocabulary")
        sentinel = re.fullmatch(r"<sentinel:(\d+)>", name)
        place = None if sentinel is None else control.begin_of_image + 1 + int(sentinel[1])
        if place not in (None, expected):
            raise ValueError(f"{name} has the id {expected} in the tokenizer file and {place} in this vocabulary")
    config = VocabularyConfig(
        codebook_sizes={"image": control.num_codes},
        num_text_pieces=vocab_size - control.first_piece,
        num_sentinels=control.end_of_turn - control.begin_of_image - 1,
        num_reserved=control.first_piece - control.end_of_turn,
    )
    assert Vocabulary(config).size == vocab_size
    return config


def _expected(control: ControlTokens) -> Iterator[tuple[int, str]]:
    """Ids and names up to `<racm3:break>` in the order of `Vocabulary`."""
    yield from ((Vocabulary.bos, BOS), (Vocabulary.pad, PAD), (Vocabulary.eos, EOS), (Vocabulary.unk, UNK))
    first = Vocabulary.unk + 1
    yield from ((first + code, code_name(code)) for code in range(control.num_codes))
    yield (first + control.num_codes, END_OF_IMAGE)
    yield (first + control.num_codes + 1, BEGIN_OF_IMAGE)


def without_control_tokens(content: Mapping[str, Any], control: ControlTokens) -> str:
    """The file as JSON for the library, such that no text can become a control token and nothing is added to it.

    Added tokens, the post-processor, truncation and padding go, and so do control tokens from the vocabulary of the
    BPE and the merges that would make them.
    """
    model = content["model"]
    names = set(control.names.values())
    vocabulary = {name: index for name, index in model["vocab"].items() if index not in control.names}
    vocabulary = {name: index for name, index in vocabulary.items() if control.first_piece <= index < control.num_rows}
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not {left, right, left + right} & names and {left, right, left + right} <= vocabulary.keys():
            merges.append([left, right])
    # An unknown token out of the vocabulary: the library then raises where it would drop a character.
    model = {**model, "vocab": vocabulary, "merges": merges, "unk_token": NO_PIECE}
    nothing = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    joined = content.get("decoder") or {"type": "Fuse"}  # the library would join pieces with spaces
    return json.dumps({**content, **nothing, "decoder": joined, "model": model})
