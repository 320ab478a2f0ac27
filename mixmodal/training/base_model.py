"""A trained network that pretraining starts from, and the shape that a network has by config, base model and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.card import read_section
from mixmodal.interop.export import (
    CARD,
    CARD_SECTIONS,
    IMAGE_TOKENIZER,
    NOT_STATED,
    fill_transformer,
    find_text_tokenizer,
    read_conversations,
    read_format_name,
    read_transformer_config,
    read_vocabulary,
)
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.tokenization.text_files import load_text_tokenizer

KEPT = ("dropout",)
"""What is not of the shape: training's own choice, whatever the base model was trained with."""
SET = ("num_text_pieces", "num_sentinels")
"""What `mixmodal prepare` can be told of a vocabulary."""
INHERITED = ("attribution", "limits")
"""Sections of a model card that hold for what is made of the model, too."""


class BaseModel:
    """An exported or imported folder: `config.json` and weights, and where it has them, vocabulary and tokenizers.

    Args:
        folder: of it.

    Raises:
        ExportError: naming folder and file, where the config is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_transformer_config(folder)
        self.vocabulary = read_vocabulary(folder)
        self.conversations = read_conversations(folder)

    def shape(self, own: TransformerConfig) -> TransformerConfig:
        """The folder's shape with the dropout of `own`.

        Args:
            own: at its defaults, or the same shape; its `vocab_size` may be 0.

        Raises:
            ValueError: naming each key that differs, with both values.
        """
        kept = {name: getattr(own, name) for name in KEPT}
        shape = replace(self.config, **kept)
        if own == TransformerConfig(**kept):
            return shape
        found, wanted = (_resolved(config) for config in (own, shape))
        if not own.vocab_size:
            found["vocab_size"] = wanted["vocab_size"]
        differing = [f"{name} is {found[name]}, not {wanted[name]}" for name in found if found[name] != wanted[name]]
        if differing:
            raise ValueError(
                f"model: {', '.join(differing)} as in init_from {self.folder}; leave the section model out, but for "
                f"{', '.join(KEPT)}, to take the shape from there"
            )
        return shape

    def check(self, shards: TokenShards) -> None:
        """Whether token shards have the ids of this model and spell documents as it does, with its tokenizers, where it
        has them.

        Raises:
            ValueError: naming both sides and what differs.
        """
        vocabulary, own = shards.vocabulary, self.vocabulary
        if own is not None and own.digest != vocabulary.digest:
            theirs = vocabulary.to_dict()
            differing = [f"tokens.{name} {own.to_dict()[name]}" for name in SET if own.to_dict()[name] != theirs[name]]
            raise ValueError(
                f"init_from {self.folder} has the vocabulary {own.digest[:12]}... ({own.to_dict()}), but the token "
                f"shards {shards.manifest_path} have {vocabulary.digest[:12]}... ({vocabulary.to_dict()}): their ids "
                f"mean other tokens; prepare them with {' and '.join(['tokenizers of the folder', *differing])}"
            )
        if self.config.vocab_size < vocabulary.size:
            raise ValueError(
                f"init_from {self.folder} has {self.config.vocab_size} rows, but the vocabulary of "
                f"{shards.manifest_path} {vocabulary.size} ids; give a folder with rows for all of them"
            )
        spelled, wanted = shards.manifest["sequence_format"]["name"], read_format_name(self.folder)
        if wanted not in (None, spelled):
            raise ValueError(
                f"init_from {self.folder} spells documents as {wanted}, and the token shards {shards.manifest_path} as "
                f"{spelled}; prepare them with tokens.sequence_format {wanted}"
            )
        text, image = find_text_tokenizer(self.folder), self.folder / IMAGE_TOKENIZER
        if text.is_file():
            shards.check(text_tokenizer_sha256=load_text_tokenizer(text).sha256)
        if image.is_dir():
            from mixmodal.tokenization.image import ImageTokenizer

            shards.check(image_tokenizer_sha256=ImageTokenizer.sha256(image))

    @property
    def tokenizers(self) -> tuple[Path, Path] | None:
        """The text tokenizer's file and the image tokenizer's folder; None where one of them is missing."""
        text, image = find_text_tokenizer(self.folder), self.folder / IMAGE_TOKENIZER
        return (text, image) if text.is_file() and image.is_dir() else None

    @property
    def name(self) -> str:
        """The folder's own, or that of the run whose export it is."""
        folder = self.folder.absolute()
        return folder.parent.name if folder.name == "export" else folder.name

    def extend_card(self, own: Mapping[str, str]) -> dict[str, str]:
        """The sections `attribution` and `limits` of a card of what is made of this model.

        They are what `own` says, and then what the card of this model says. The former names it in any case.
        """
        path = self.folder / CARD
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = {}
        for key in INHERITED:
            theirs = read_section(card, CARD_SECTIONS[key])
            if theirs not in ("", NOT_STATED):
                theirs = f"Of the model {self.name}, which it is made from:\n\n{theirs}"
            else:
                theirs = f"Made from the model {self.name}, whose card names nobody." if key == "attribution" else ""
            found[key] = "\n\n".join(filter(None, [own.get(key), theirs]))
        return found

    def build(self, config: TransformerConfig) -> Transformer:
        """The network of `config`, float32 on the CPU, with the folder's weights in whatever type they are stored.

        Nothing is drawn, and one tensor is read at a time.

        Raises:
            ExportError: naming the file, where it is missing, broken or of other shapes.
        """
        with torch.device("meta"):
            model = Transformer(config)
        fill_transformer(model, self.folder, dtype=torch.float32)
        return model


def _resolved(config: TransformerConfig) -> dict[str, object]:
    return {**asdict(config), **config.attention_sizes}


def build_shape(own: TransformerConfig, base: BaseModel | None, vocab_size: int, seq_len: int) -> TransformerConfig:
    """The shape of the network that is trained.

    Raises:
        ValueError: see `BaseModel.shape` and `fit_to_data`.
    """
    return fit_to_data(own if base is None else base.shape(own), vocab_size, seq_len)


def fit_to_data(config: TransformerConfig, vocab_size: int, seq_len: int) -> TransformerConfig:
    """The model's config with the vocabulary's size filled in.

    Raises:
        ValueError: for a vocabulary or rows that the model is too small for.
    """
    if config.vocab_size == 0:
        config = replace(config, vocab_size=vocab_size)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.vocab_size}, but the data's vocabulary has {vocab_size} ids; set it to 0"
        )
    if config.max_seq_len < seq_len:
        raise ValueError(f"model.max_seq_len is {config.max_seq_len}, below data.seq_len {seq_len}; raise it")
    return config
