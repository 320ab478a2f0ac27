"""Strings and pictures to documents and back: the two tokenizers of a model behind one door."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.document import Coded, Document, EndOfTurn, Image, Mask, Part, SequenceFormat, Text
from mixmodal.tokenization.preprocessing import open_picture, resize_and_crop, to_pictures, to_tensor

if TYPE_CHECKING:
    from mixmodal.tokenization.image import ImageTokenizer
    from mixmodal.tokenization.text import TextTokenizer

Content = str | Picture | Part
"""What a user may put into a document."""


class Codec:
    """Turns what users hold (`str`, PIL pictures) into documents of text and codes, and documents back.

    Args:
        text_tokenizer: its pieces fill the vocabulary's text range.
        image_tokenizer: gives the image size, the grid of codes and the codebook.
        format: the sequence format, with or without a text tokenizer of its own; `codec.format` has this one.

    Raises:
        ValueError: where a tokenizer and the vocabulary or the grid disagree.
    """

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        format: SequenceFormat,
        batch_size: int = 64,
    ) -> None:
        vocabulary, grid = format.vocabulary, tuple(image_tokenizer.grid)
        wanted = {
            "text pieces": (text_tokenizer.num_pieces, vocabulary.config.num_text_pieces),
            "image codes": (image_tokenizer.codebook_size, vocabulary.config.codebook_sizes.get("image")),
            "image grid": (grid, format.grids.get("image")),
        }
        for name, (given, expected) in wanted.items():
            if given != expected:
                raise ValueError(
                    f"tokenizer and vocabulary disagree: the tokenizer has {name} {given}, the vocabulary and the "
                    f"format hold {expected}; give the tokenizer that the model was trained with"
                )
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.format = type(format)(vocabulary, format.grids, text_tokenizer)
        self.batch_size = batch_size

    @property
    def device(self) -> torch.device:
        """Where the image tokenizer computes."""
        tensors = chain(self.image_tokenizer.parameters(), self.image_tokenizer.buffers())
        return next(tensors).device

    def to_document(self, parts: Sequence[Content]) -> Document:
        """The parts in order; pictures are resized, cropped and encoded.

        Raises:
            SequenceError: for an empty string.
            TypeError: for a part that is neither a string, a picture nor a `Part`.
        """
        return self.to_documents([parts])[0]

    def to_documents(self, documents: Sequence[Sequence[Content]]) -> list[Document]:
        """`to_document` for many; the pictures of all of them pass the encoder together, `batch_size` at a time."""
        pictures = [part for parts in documents for part in parts if isinstance(part, Picture)]
        images = iter(self.encode_pictures(pictures))
        found = []
        for parts in documents:
            found.append(Document(next(images) if isinstance(part, Picture) else _part(part) for part in parts))
        return found

    def from_document(self, document: Document) -> list[str | Picture | Mask | EndOfTurn]:
        """Strings and pictures in order; a mask stays a mask, an end of turn one."""
        return self.from_documents([document])[0]

    def from_documents(self, documents: Sequence[Document]) -> list[list[str | Picture | Mask | EndOfTurn]]:
        """`from_document` for many; their codes pass the decoder together."""
        coded = [part for document in documents for part in document.parts if isinstance(part, Coded)]
        pictures = iter(self.decode_images(coded))
        found: list[list[str | Picture | Mask | EndOfTurn]] = []
        for document in documents:
            found.append([])
            for part in document.parts:
                content = next(pictures) if isinstance(part, Coded) else part
                found[-1].append(content.text if isinstance(content, Text) else content)
        return found

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Picture]) -> list[Image]:
        """Pictures of any size and mode to their codes."""
        images: list[Image] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = self.to_images(pictures[start : start + self.batch_size], start)
            codes: Tensor = self.image_tokenizer.encode(batch)  # (B, h, w)
            images += [Image(one) for one in codes.cpu().numpy()]
        return images

    def to_images(self, pictures: Sequence[Picture], first: int = 0) -> Tensor:
        """Pictures of any size and mode as the tokenizer takes them, float32 `(B, 3, H, W)` on its device.

        Args:
            first: number of the first picture, for messages.
        """
        config, images = self.image_tokenizer.config, []
        for index, picture in enumerate(pictures, first):
            opened = open_picture(picture, f"picture {index}")
            images.append(to_tensor(resize_and_crop(opened, config.image_size, config.preprocess)))
        return torch.stack(images).to(self.device)

    @torch.inference_mode()
    def decode_images(self, images: Sequence[Coded]) -> list[Picture]:
        """Codes to pictures."""
        pictures: list[Picture] = []
        for start in range(0, len(images), self.batch_size):
            codes = [torch.from_numpy(image.codes) for image in images[start : start + self.batch_size]]
            pictures += to_pictures(self.image_tokenizer.decode(torch.stack(codes).to(self.device)).float().cpu())
        return pictures


def _part(part: object) -> Part:
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, (Text, Mask, EndOfTurn, Coded)):
        return part
    raise TypeError(f"a part must be a string, a PIL picture or a document part, not {type(part).__name__}")
