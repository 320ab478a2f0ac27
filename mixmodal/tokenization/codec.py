"""Strings and pictures to documents and back: the two tokenizers of a model behind one door."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.document import (
    UNIT_PIXELS,
    Coded,
    Document,
    EndOfTurn,
    Grid,
    Image,
    LuminaFormat,
    Mask,
    Part,
    SequenceFormat,
    Text,
)
from mixmodal.tokenization.preprocessing import open_picture, resize_and_crop, resize_and_pad, to_pictures, to_tensor

if TYPE_CHECKING:
    from mixmodal.tokenization.image import ImageTokenizer
    from mixmodal.tokenization.text_files import PieceTokenizer

Item = TypeVar("Item")
Found = TypeVar("Found")
Content = str | Picture | Part
"""What a user may put into a document."""


class Codec:
    """Turns what users hold (`str`, PIL pictures) into documents of text and codes, and documents back.

    Args:
        text_tokenizer: its pieces fill the vocabulary's text range.
        image_tokenizer: gives the image size, the grid of codes and the codebook.
        format: the sequence format, with or without a text tokenizer of its own; `codec.format` has this one.
        batch_size: pictures that pass the image tokenizer together.
        conversations: whether the model was tuned on conversations. Pictures of the human's turns are then kept as a
            whole, between borders, as they were in its training; all others are cropped to their centre.

    Raises:
        ValueError: where a tokenizer and the vocabulary or the grid disagree.
    """

    def __init__(
        self,
        text_tokenizer: PieceTokenizer,
        image_tokenizer: ImageTokenizer,
        format: SequenceFormat,
        batch_size: int = 64,
        conversations: bool = False,
    ) -> None:
        vocabulary, grid = format.vocabulary, tuple(image_tokenizer.grid)
        wanted = {
            "text pieces": (text_tokenizer.num_pieces, vocabulary.config.num_text_pieces),
            "image codes": (image_tokenizer.codebook_size, vocabulary.config.codebook_sizes.get("image")),
            "image grid": (grid, format.grids.get("image")),
        }
        if isinstance(format, LuminaFormat):
            wanted["codes of 32 pixels"] = (image_tokenizer.codes_along(UNIT_PIXELS), format.codes_per_unit)
        for name, (given, expected) in wanted.items():
            if given != expected:
                raise ValueError(
                    f"tokenizer and vocabulary disagree: the tokenizer has {name} {given}, the vocabulary and the "
                    f"format hold {expected}; give the tokenizer that the model was trained with"
                )
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.format = format.with_text_tokenizer(text_tokenizer)
        self.batch_size, self.conversations = batch_size, conversations

    @property
    def device(self) -> torch.device:
        """Where the image tokenizer computes."""
        tensors = chain(self.image_tokenizer.parameters(), self.image_tokenizer.buffers())
        return next(tensors).device

    def to_document(self, parts: Sequence[Content]) -> Document:
        """The parts in order; pictures are resized, cropped (or padded, see `conversations`) and encoded.

        Raises:
            SequenceError: for an empty string.
            TypeError: for a part that is neither a string, a picture nor a `Part`.
        """
        return self.to_documents([parts])[0]

    def to_documents(self, documents: Sequence[Sequence[Content]]) -> list[Document]:
        """`to_document` for many; the pictures of all of them pass the encoder together, `batch_size` at a time."""
        pictures: list[Picture] = []
        padded: list[bool] = []
        for parts in documents:
            for part, asked in zip(parts, self._are_asked(parts), strict=True):
                if isinstance(part, Picture):
                    pictures.append(part)
                    padded.append(asked)
        images = iter(self.encode_pictures(pictures, padded))
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

    def _are_asked(self, parts: Sequence[Content]) -> list[bool]:
        """Whether each part belongs to a turn of the human in a conversation, in which human and model take turns."""
        turn, asked = 0, []
        for part in parts:
            asked.append(turn % 2 == 0)
            turn += isinstance(part, EndOfTurn)
        return asked if turn and self.conversations else [False] * len(asked)

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Picture], padded: Sequence[bool] = ()) -> list[Image]:
        """Pictures of any size and mode to their codes; those of one grid pass the encoder together.

        Args:
            padded: of each, whether it is kept as a whole, see `fit`; by default none is.
        """
        images: list[Image] = []
        padded = padded or [False] * len(pictures)
        for start in range(0, len(pictures), self.batch_size):
            chunk = range(start, min(start + self.batch_size, len(pictures)))
            fitted = [self.fit(pictures[index], f"picture {index}", padded=padded[index]) for index in chunk]
            images += map_alike(fitted, [picture.size for picture in fitted], self._encode)
        return images

    def _encode(self, fitted: Sequence[Picture]) -> list[Image]:
        codes: Tensor = self.image_tokenizer.encode(torch.stack([*map(to_tensor, fitted)]).to(self.device))  # (B, h, w)
        return [Image(one) for one in codes.cpu().numpy()]

    def fit(
        self, picture: Picture, name: str = "the picture", *, square: bool = False, padded: bool = False
    ) -> Picture:
        """A picture of any size and mode as the encoder sees it: RGB, resized and cropped to the centre.

        It gets the sides of the grid that fits it, see `SequenceFormat.fitting_grid`.

        Args:
            name: for messages.
            square: whether it gets the sides `image_size` in every format.
            padded: whether it is kept as a whole, between borders, as pictures of prompts are in conversations.
        """
        opened, config = open_picture(picture, name), self.image_tokenizer.config
        grid = self.format.grids["image"] if square else self.format.fitting_grid("image", opened.height, opened.width)
        return (resize_and_pad if padded else resize_and_crop)(opened, config.size_of(grid), config.preprocess)

    def grid_of_size(self, size: tuple[int, int]) -> Grid:
        """The grid of codes of a picture of this width and height in pixels.

        Raises:
            ValueError: where pictures of the format have no such size; it names the nearest that they have.
        """
        config, allowed = self.image_tokenizer.config, self.format.allowed_grids("image")
        sizes = {config.size_of(grid): grid for grid in allowed}
        if size in sizes:
            return sizes[size]
        if len(sizes) == 1:
            ((width, height),) = sizes
            raise ValueError(f"size can not act: all pictures of this model have {width}x{height} pixels; leave it out")
        width, height = min(sizes, key=lambda one: abs(one[0] - size[0]) + abs(one[1] - size[1]))
        raise ValueError(
            f"size is {size[0]}x{size[1]}, which is none of the {len(sizes)} that pictures of this model have; the "
            f"nearest is {width}x{height}"
        )

    def to_images(self, pictures: Sequence[Picture], first: int = 0) -> Tensor:
        """Pictures of any size and mode as squares of `image_size`, float32 `(B, 3, H, W)` on the tokenizer's device.

        Args:
            first: number of the first picture, for messages.
        """
        fitted = [self.fit(picture, f"picture {index}", square=True) for index, picture in enumerate(pictures, first)]
        return torch.stack([*map(to_tensor, fitted)]).to(self.device)

    @torch.inference_mode()
    def decode_images(self, images: Sequence[Coded]) -> list[Picture]:
        """Codes to pictures; those of one grid pass the decoder together."""
        pictures: list[Picture] = []
        for start in range(0, len(images), self.batch_size):
            codes = [image.codes for image in images[start : start + self.batch_size]]
            pictures += map_alike(codes, [one.shape for one in codes], self._decode)
        return pictures

    def _decode(self, codes: Sequence[np.ndarray]) -> list[Picture]:
        stack = torch.from_numpy(np.stack(codes)).to(self.device)
        return to_pictures(self.image_tokenizer.decode(stack).float().cpu())


def map_alike(
    items: Sequence[Item], kinds: Sequence[Hashable], call: Callable[[list[Item]], list[Found]]
) -> list[Found]:
    """What `call` finds for items of the same kind together, in the order of the items."""
    found: dict[int, Found] = {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, one in enumerate(kinds) if one == kind]
        found |= dict(zip(places, call([items[place] for place in places]), strict=True))
    return [found[place] for place in range(len(items))]


def _part(part: object) -> Part:
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, (Text, Mask, EndOfTurn, Coded)):
        return part
    raise TypeError(f"a part must be a string, a PIL picture or a document part, not {type(part).__name__}")
