"""Text tokens of two-tower encoders: a byte-level BPE that is learned from captions, as transformers loads it.

Texts are brought to lower case and stretches of white space to one space, as for CLIP. Every text can be spelled, since
all bytes are tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmodal.models.two_tower import EncoderKind, TextIds, TwoTowerConfig, import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN = {"clip": "<|startoftext|>", "siglip": None}
END = {"clip": "<|endoftext|>", "siglip": "</s>"}
"""Ends a text and is the padding, too. CLIP's feature is that of the first one."""
SPACE = r"\s+"


def train_caption_tokenizer(
    captions: Iterable[str], kind: EncoderKind, vocab_size: int, until: str | None = None
) -> str:
    """Learns a tokenizer, the same from the same captions; `build_caption_tokenizer` makes it from what this returns.

    Args:
        captions: texts to learn from.
        kind: of the encoder, which decides on the special tokens.
        vocab_size: the most tokens.
        until: texts are read up to the first place where this stands behind something; None reads all of them.

    Returns:
        The contents of a `tokenizer.json`.

    Raises:
        ValueError: where transformers, of which tokenizers is a part, is not installed, or there is no caption.
    """
    import_transformers()
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = list(captions)
    if not any(text.strip() for text in texts):
        raise ValueError("there are no captions to learn text tokens from")
    begin, end = BEGIN[kind], END[kind]
    special = [token for token in (begin, end) if token]
    tokenizer = Tokenizer(models.BPE())
    # a word is spelled alike wherever it stands: the first one follows a space as well
    steps = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(SPACE), " ")]
    steps.append(normalizers.Strip())
    if until is not None:
        words = re.escape(re.sub(SPACE, " ", until.lower()))
        steps += [normalizers.Replace(Regex(f"(?<=.){words}.*"), ""), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(token for token in (begin, "$A", end) if token),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    return tokenizer.to_str()


def build_caption_tokenizer(contents: str, kind: EncoderKind, max_text_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers, which spells no special token out of a text of a user.

    Args:
        contents: of a `tokenizer.json`.
        kind: of the encoder.
        max_text_tokens: longest text in tokens.
    """
    transformers = import_transformers()
    from tokenizers import Tokenizer

    # SigLIP sees its padding, so it takes no attention mask
    inputs = ["input_ids", "attention_mask"] if kind == "clip" else ["input_ids"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(contents),
        bos_token=BEGIN[kind],
        eos_token=END[kind],
        pad_token=END[kind],
        model_max_length=max_text_tokens,
        model_input_names=inputs,
        padding_side="right",
        split_special_tokens=True,
    )


def text_ids(tokenizer: PreTrainedTokenizerFast) -> TextIds:
    """What a text tower has to know of the tokenizer."""
    begin = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.eos_token_id
    assert isinstance(begin, int)
    assert isinstance(end, int)
    assert end != 2  # transformers takes CLIP's feature elsewhere then, for old checkpoints
    return TextIds(len(tokenizer), begin, end)


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str], config: TwoTowerConfig) -> Tensor:
    """Ids, int64 `(B, T)`, cut and padded to `max_text_tokens`; a text that is cut keeps its end token."""
    found = tokenizer(captions, padding="max_length", truncation=True, max_length=config.max_text_tokens)
    return torch.tensor(found["input_ids"], dtype=torch.int64)
