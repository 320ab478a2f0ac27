"""Sample sheets: what a model draws for a few held-out captions while it is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL.Image import Image as Picture
from torch import nn

from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Coded, Document, Image, Text
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


class SampleSheet:
    """Held-out pairs and the tokenizers that show them.

    Args:
        held_out: documents, of which those with one text and one picture are taken.
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

    def _choose(self, held_out: TokenShards, count: int, max_len: int) -> list[tuple[Text, Image]]:
        order = np.random.default_rng(0).permutation(len(held_out))
        chosen: dict[str, tuple[Text, Image]] = {}
        for index in order:
            if len(held_out[index]) > max_len:
                continue
            parts = sorted(self.codec.format.parse(held_out[index]).parts, key=lambda part: part.modality, reverse=True)
            if len(parts) == 2 and isinstance(parts[0], Text) and isinstance(parts[1], Image):
                chosen.setdefault(parts[0].text, (parts[0], parts[1]))
            if len(chosen) == count:
                break
        return list(chosen.values())

    def draw(self, model: nn.Module) -> Picture:
        """For each caption the held-out picture, as its codes give it back, above the one that `model` draws."""
        form = self.codec.format
        prompts = [form.spell_prompt(Document([text]), Image.modality) for text, _ in self.pairs]
        assert isinstance(model, Transformer)
        with uncompiled():
            generator = SequenceGenerator(model, form)
            requests = [generator.request(prompt, (0, number), "image") for number, prompt in enumerate(prompts)]
            found = generator.generate(requests, {"image": SAMPLING})
        drawn: list[Coded] = []
        for prompt, ids in zip(prompts, found):
            document = form.parse_continuation(np.concatenate([prompt, ids, [form.vocabulary.eos]]), len(prompt))
            drawn += [part for part in document.parts if isinstance(part, Coded)]
        pictures = self.codec.decode_images([*(image for _, image in self.pairs), *drawn])
        return draw_captioned([text.text for text, _ in self.pairs], pictures[: len(drawn)], pictures[len(drawn) :])
