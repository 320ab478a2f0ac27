"""Sample sheets: what a model draws for a few held-out captions while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image as Picture
from torch import nn

from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Coded, Document, EndOfTurn, Image, Part, Text
from mixmodal.evaluation.sheet import draw_captioned
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.text_files import load_text_tokenizer
from mixmodal.training.uncompiled import uncompiled

SAMPLING = TokenSampling(temperature=1.0, top_p=0.9)
"""How codes are drawn; seeds are fixed, so that sheets of one run differ by the weights alone."""


class Pair(NamedTuple):
    """A text, its picture, and the prompt that asks for it: the text, with an end of turn where it is a human's."""

    text: Text
    image: Image
    prompt: Document


class SampleSheet:
    """Held-out pairs and the tokenizers that show them.

    Args:
        held_out: documents, of which those with one text and one picture are taken, also where the picture is the
            answer to the text.
        text_tokenizer: model file.
        image_tokenizer: folder. Pictures are decoded on the CPU.
        count: captions, spread over all pairs that fit.
        max_len: longest document in tokens that is taken.

    Raises:
        ValueError: where there are fewer pairs.
    """

    def __init__(
        self, held_out: TokenShards, text_tokenizer: Path, image_tokenizer: Path, count: int, max_len: int
    ) -> None:
        text = load_text_tokenizer(text_tokenizer, held_out.vocabulary.config.num_text_pieces)
        images = ImageTokenizer.load(image_tokenizer).eval()
        self.codec = Codec(text, images, held_out.build_format(text))
        self.pairs = self._choose(held_out, count, max_len)
        if len(self.pairs) < count:
            raise ValueError(
                f"num_samples is {count}, but {held_out.folder} holds {len(self.pairs)} pairs of one text and one "
                f"picture in at most {max_len} tokens; lower it, or set sample_every to 0"
            )

    def _choose(self, held_out: TokenShards, count: int, max_len: int) -> list[Pair]:
        order = np.random.default_rng(0).permutation(len(held_out))
        chosen: dict[str, Pair] = {}
        for index in order:
            if len(held_out[index]) > max_len:
                continue
            pair = find_pair(self.codec.format.parse(held_out[index]).parts)
            if pair:
                chosen.setdefault(pair.text.text, pair)
            if len(chosen) == count:
                break
        return list(chosen.values())

    def draw(self, model: nn.Module) -> Picture:
        """For each caption the held-out picture, as its codes give it back, above the one that `model` draws."""
        form = self.codec.format
        prompts = [form.spell_prompt(pair.prompt, Image.modality) for pair in self.pairs]
        assert isinstance(model, Transformer)
        with uncompiled():
            generator = SequenceGenerator(model, form)
            requests = [generator.request(prompt, (0, number), "image") for number, prompt in enumerate(prompts)]
            found = generator.generate(requests, {"image": SAMPLING})
        drawn: list[Coded] = []
        for prompt, ids in zip(prompts, found):
            document = form.parse_continuation(np.concatenate([prompt, ids, [form.vocabulary.eos]]), len(prompt))
            drawn += [part for part in document.parts if isinstance(part, Coded)]
        pictures = self.codec.decode_images([*(pair.image for pair in self.pairs), *drawn])
        return draw_captioned([pair.text.text for pair in self.pairs], pictures[: len(drawn)], pictures[len(drawn) :])


def find_pair(parts: Sequence[Part]) -> Pair | None:
    """The pair that a document is: a text and a picture in either order, or a text that a picture answers."""
    match [*parts]:
        case [Text() as text, Image() as image] | [Image() as image, Text() as text]:
            return Pair(text, image, Document([text]))
        case [Text() as text, EndOfTurn() as end, Image() as image, EndOfTurn()]:
            return Pair(text, image, Document([text, end]))
    return None
