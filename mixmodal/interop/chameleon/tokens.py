"""Our ids as a tokenizer and a processor that transformers loads for Chameleon (arXiv 2405.09818)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixmodal.records import write_json
from mixmodal.tokenization.control_tokens import (
    BEGIN_OF_IMAGE,
    BOS,
    END_OF_IMAGE,
    EOS,
    IMAGE_PLACEHOLDER,
    PAD,
    UNK,
    code_name,
    read_tokenizer_file,
    vocabulary_of,
    without_control_tokens,
)
from mixmodal.tokenization.json_text import JsonTextTokenizer
from mixmodal.tokenization.preprocessing import RESCALE_FACTOR, Preprocess
from mixmodal.tokenization.text import SPACE_MARK
from mixmodal.tokenization.text_files import load_text_tokenizer
from mixmodal.vocabulary import Vocabulary

FIRST_RESERVED = 8706
"""Number in the name of Chameleon's first reserved token, the end of turn."""
LANCZOS = 1
"""Of `PIL.Image.Resampling`."""


def token_names(vocabulary: Vocabulary) -> list[str]:
    """Chameleon's names of the control tokens and image codes in front of the text, by id.

    `<image>`, where transformers lets codes be put, is the second reserved token; with one alone, the end of turn,
    the last sentinel bears the name.

    Raises:
        ValueError: where the vocabulary has no codes of images in front, or not two tokens to name.
    """
    config = vocabulary.config
    if "image" not in config.codebook_sizes:
        raise ValueError("the vocabulary has no image codes; Chameleon's tokenizer needs them")
    names = [
        *(BOS, PAD, EOS, UNK),
        *map(code_name, range(config.codebook_sizes["image"])),
        *(END_OF_IMAGE, BEGIN_OF_IMAGE),
        *(f"<sentinel:{index}>" for index in range(config.num_sentinels)),
        *(f"<reserved{FIRST_RESERVED + index:05}>" for index in range(config.num_reserved)),
    ]
    placeholder = vocabulary.end_of_turn + 1 if config.num_reserved >= 2 else vocabulary.end_of_turn - 1
    names[placeholder] = IMAGE_PLACEHOLDER
    return names


def vocabulary_map(vocabulary: Vocabulary) -> dict[str, int]:
    """Ids by name for `ChameleonConfig.vocabulary_map`: control tokens and image codes, no text pieces."""
    return {name: index for index, name in enumerate(token_names(vocabulary))}


def write_processor(
    folder: Path | str,
    vocabulary: Vocabulary,
    text_tokenizer_path: Path | str,
    image_size: int,
    num_codes: int,
    preprocess: Preprocess = "transformers",
) -> None:
    """Writes the files from which transformers makes a `ChameleonProcessor` and its tokenizer.

    `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `preprocessor_config.json`,
    `processor_config.json`. Ids are those of `vocabulary`. A sentencepiece model becomes a BPE with merges that give
    the same pieces; a JSON file keeps its BPE, normaliser and decoder. The tokenizer puts `<s>` in front.

    What differs from our own: control tokens' names in a text become control tokens there (image codes' names stay
    text); bytes that are no UTF-8 decode to other numbers of U+FFFD; and two overlapping stretches that would become
    one and the same piece from different parts may be merged in another order than sentencepiece's, which no string
    of 190,000 has shown.
    Pictures are brought to [-1, 1], or for `preprocess: transformers` to its [-1, 0.989], as ours are. Its own resizing
    and cropping differ from those of `meta` by a pixel for odd sizes.

    Args:
        folder: created where needed; files of the same names are replaced.
        vocabulary: of the model.
        text_tokenizer_path: of the model, `.model` or `.json`.
        image_size: height and width of a picture, pixels.
        num_codes: codes of a picture.
        preprocess: of the image tokenizer.

    Raises:
        ValueError: where tokenizer and vocabulary do not belong together; see `token_names`.
    """
    tokenizer = build_tokenizer_json(vocabulary, text_tokenizer_path)
    turn = token_names(vocabulary)[vocabulary.end_of_turn]
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(turn),
        "special_tokens_map.json": special_tokens(turn),
        "preprocessor_config.json": preprocessor_config(image_size, preprocess),
        "processor_config.json": {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": num_codes,
            "image_token": IMAGE_PLACEHOLDER,
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        write_json(folder / name, file)


def build_tokenizer_json(vocabulary: Vocabulary, text_tokenizer_path: Path | str) -> dict[str, Any]:
    """The content of `tokenizer.json`, which Meta's download calls `text_tokenizer.json`; see `write_processor`.

    Raises:
        ValueError: where tokenizer and vocabulary do not belong together.
    """
    names = token_names(vocabulary)
    pieces = vocabulary.ids("text")
    tokenizer = load_text_tokenizer(text_tokenizer_path, len(pieces))
    if tokenizer.num_pieces != len(pieces):
        raise ValueError(
            f"{text_tokenizer_path} has {tokenizer.num_pieces} text pieces, the vocabulary {len(pieces)}; give the "
            "tokenizer that the model was trained with"
        )
    if isinstance(tokenizer, JsonTextTokenizer):
        image = {"image": vocabulary.config.codebook_sizes["image"]}
        own = replace(vocabulary.config, codebook_sizes=image)
        if tokenizer.control.num_codes and vocabulary_of(tokenizer.control, pieces.stop) != own:
            raise ValueError(f"{text_tokenizer_path}: its control tokens are not those of the vocabulary")
        content, texts = read_json(tokenizer, Path(text_tokenizer_path))
    else:
        content, texts = read_sentencepiece(Path(text_tokenizer_path))
    taken = set(names)
    for index, text in enumerate(texts):
        names.append(text if text is not None and text not in taken else f"<text:{index}>")
    names += further_names(vocabulary)
    if len(set(names)) != vocabulary.size:
        raise ValueError(f"{text_tokenizer_path}: two pieces are spelled alike, which a JSON file can not hold")
    control = [index for index in range(pieces.start) if index not in vocabulary.ids("image")]
    return finish_json(content, names, control)


def read_sentencepiece(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Steps of a JSON file without its vocabulary, and the texts of the pieces.

    Spaces are spelled as spaces, so that U+2581 is no piece and falls to its bytes, as in `TextTokenizer`.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts, scores = [], {}
    for index in range(processor.GetPieceSize()):
        text = processor.IdToPiece(index).replace(SPACE_MARK, " ")
        if processor.IsUnknown(index):
            texts.append(processor.DecodeIds([index]))  # no merge makes it
            continue
        texts.append(text)
        if not processor.IsByte(index):
            scores[text] = processor.GetScore(index)
    model = {"type": "BPE", "fuse_unk": False, "byte_fallback": True, "merges": [*find_merges(scores)]}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {"normalizer": None, "pre_tokenizer": None, "decoder": decoder, "model": model}, texts


def find_merges(scores: Mapping[str, float]) -> Iterator[list[str]]:
    """Pairs of pieces that make a piece, those of the highest score first, as sentencepiece merges.

    Pairs that make the same piece have one rank there, the left one first, and here one after the other.

    Raises:
        ValueError: for a piece with a character that is no piece: sentencepiece can merge it, and merges can not.
    """
    for piece in sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece]):
        for character in piece:
            if character not in scores:
                raise ValueError(f"the text piece {piece!r} has the character {character!r}, which is no piece")
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield [piece[:cut], piece[cut:]]


def read_json(tokenizer: JsonTextTokenizer, path: Path) -> tuple[dict[str, Any], list[str | None]]:
    """Steps of the file, with a BPE that makes no control token, and the texts of the pieces, None without one."""
    content = read_tokenizer_file(path)
    model = content["model"]
    stripped = json.loads(without_control_tokens(content, tokenizer.control))["model"]
    texts = {index: name for name, index in model["vocab"].items()} | dict(tokenizer.control.names)
    rows = range(tokenizer.first_piece, tokenizer.first_piece + tokenizer.num_pieces)
    model = {**model, "merges": stripped["merges"], "unk_token": None}
    return {**content, "model": model}, [texts.get(index) for index in rows]


def further_names(vocabulary: Vocabulary) -> list[str]:
    """Names of the codes behind the text."""
    behind = [name for name in vocabulary.modalities if name not in ("text", "image")]
    ids = sorted((identity, name) for name in behind for identity in vocabulary.ids(name))
    return [f"<{name}:{vocabulary.from_ids(name, identity)}>" for identity, name in ids]


def finish_json(content: Mapping[str, Any], names: Sequence[str], control: Sequence[int]) -> dict[str, Any]:
    """A whole `tokenizer.json`: ids by name, control tokens marked as special, `<s>` in front of every text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": names[index], **flags} for index in control],
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, *second],
            "special_tokens": {BOS: {"id": BOS, "ids": [Vocabulary.bos], "tokens": [BOS]}},
        },
        "decoder": content.get("decoder") or {"type": "Fuse"},
        "model": {**content["model"], "vocab": {name: index for index, name in enumerate(names)}},
    }


def special_tokens(end_of_turn: str) -> dict[str, str]:
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK, "sep_token": end_of_turn}


def tokenizer_config(end_of_turn: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "ChameleonProcessor",
        **special_tokens(end_of_turn),
        "extra_special_tokens": {
            "image_token": IMAGE_PLACEHOLDER,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
        },
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def preprocessor_config(image_size: int, preprocess: Preprocess) -> dict[str, Any]:
    """Of the image processor: short side to `image_size`, cropped in the middle, scaled, less 1."""
    return {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": LANCZOS,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": RESCALE_FACTOR if preprocess == "transformers" else 2 / 255,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }
