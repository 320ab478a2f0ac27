"""A trained network that pretraining starts from, and the shape that a network has by config, base model and data."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.export import (
    IMAGE_TOKENIZER,
    fill_transformer,
    find_text_tokenizer,
    read_transformer_config,
    read_vocabulary,
)
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.tokenization.text_files import load_text_tokenizer

KEPT = ("dropout",)
"""What is not of the shape: training's own choice, whatever the base model was trained with."""


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
        """Whether token shards have the ids of this model, and were made with its tokenizers, where it has them.

        Raises:
            ValueError: naming both sides and what differs.
        """
        vocabulary, own = shards.vocabulary, self.vocabulary
        if own is not None and own.digest != vocabulary.digest:
            raise ValueError(
                f"init_from {self.folder} has the vocabulary {own.digest[:12]}... ({own.to_dict()}), but the token "
                f"shards {shards.manifest_path} have {vocabulary.digest[:12]}... ({vocabulary.to_dict()}): their ids "
                "mean other tokens; pretokenize with the vocabulary of the folder"
            )
        if self.config.vocab_size < vocabulary.size:
            raise ValueError(
                f"init_from {self.folder} has {self.config.vocab_size} rows, but the vocabulary of "
                f"{shards.manifest_path} {vocabulary.size} ids; give a folder with rows for all of them"
            )
        text, image = find_text_tokenizer(self.folder), self.folder / IMAGE_TOKENIZER
        if text.is_file():
            shards.check(text_tokenizer_sha256=load_text_tokenizer(text).sha256)
        if image.is_dir():
            from mixmodal.tokenization.image import ImageTokenizer

            shards.check(image_tokenizer_sha256=ImageTokenizer.sha256(image))

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
