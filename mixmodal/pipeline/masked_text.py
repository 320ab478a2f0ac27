"""The texts that the masks of a document stand for, drawn one mask after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixmodal.document import Document, Mask, Text
from mixmodal.pipeline.prompts import sample_seed
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import INFILL
from mixmodal.tokenization.codec import Codec

LEAST_ROOM = 3
"""Tokens that each later mask takes at least: the `<eoss>` before it, it, and one of its text."""


class FilledText(NamedTuple):
    """What has been written for the masks of a document.

    Args:
        text: the whole text with it; texts that a picture divides stand on lines of their own.
        masks: what each mask stands for, by its number, in the order of the document.
    """

    text: str
    masks: dict[int, str]


class MaskedText:
    """One sample of the texts that masks stand for; each is drawn behind the document and the texts of those before it.

    Args:
        generator: draws.
        codec: decodes.
        document: a whole one, with masks in its texts.
        seed, number: of the sample.
        max_new_tokens: most tokens of each text; None is as many as the model's context takes beside the later masks.

    Raises:
        ValueError: where the document has no mask, or the same one twice.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        codec: Codec,
        document: Document,
        seed: int,
        number: int,
        max_new_tokens: int | None = None,
    ) -> None:
        masks = [part.index for part in document.parts if isinstance(part, Mask)]
        if not masks or len(set(masks)) < len(masks):
            raise ValueError(f"a prompt for infill needs masks in its texts, each another one; it has {masks}")
        self.generator, self.codec, self.document, self.max_new_tokens = generator, codec, document, max_new_tokens
        self.texts: dict[int, str] = {}
        self._masks, self._ids = masks, codec.format.spell(document)[:-1]
        self._seed = sample_seed(seed, number, self._ids)

    def request(self) -> Request:
        """For the text of the next mask."""
        mask = self.codec.format.vocabulary.sentinel(self._masks[len(self.texts)])
        later = len(self._masks) - len(self.texts) - 1
        ids, seed = np.append(self._ids, mask), [*self._seed, len(self.texts)]
        request = self.generator.request(ids, seed, INFILL, max_new_tokens=self.max_new_tokens)
        room = self.generator.model.config.max_seq_len - len(ids) - LEAST_ROOM * later
        return request._replace(room=max(0, min(request.room, room)))

    def take(self, drawn: np.ndarray) -> FilledText | None:
        """Reads what was drawn for the last request; gives the whole text behind the last mask, else None."""
        vocabulary, mask = self.codec.format.vocabulary, self._masks[len(self.texts)]
        written = drawn[np.asarray(vocabulary.contains("text", drawn))]
        self.texts[mask] = self.codec.text_tokenizer.decode(vocabulary.from_ids("text", written).tolist())
        closed = [vocabulary.sentinel(mask)], written, [vocabulary.end_of_span]
        self._ids = np.concatenate([self._ids, *closed]).astype(np.int64)
        return self._filled() if len(self.texts) == len(self._masks) else None

    def _filled(self) -> FilledText:
        lines = [""]
        for part in self.document.parts:
            if isinstance(part, Text):
                lines[-1] += part.text
            elif isinstance(part, Mask):
                lines[-1] += self.texts[part.index]
            else:
                lines.append("")
        return FilledText("\n".join(line for line in lines if line), self.texts)
