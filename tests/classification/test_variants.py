"""Documents of a picture are the codes of its crops, mirror images and perturbed latents, whatever stands beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps
from PIL.Image import Image as Picture

from mixmodal.classification.variants import VariantsConfig, encode_variants
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.document import Coded, Document, build_format
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

KEYS = ["a/0.png", "a/1.png", "b/0.png"]


@pytest.fixture
def codec(tokenizers: Path) -> Codec:
    text, image = TextTokenizer.load(tokenizers / "text.model"), ImageTokenizer.load(tokenizers / "image")
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=text.num_pieces, num_sentinels=2)
    return Codec(text, image, build_format("cm3leon", Vocabulary(sizes), {"image": (4, 4)}), batch_size=4)


@pytest.fixture
def pictures() -> list[Picture]:
    return [pair.picture for pair in synthetic_pairs(3, 40)]


def codes(documents: list[Document]) -> np.ndarray:
    found = []
    for document in documents:
        (part,) = document.parts
        assert isinstance(part, Coded)
        found.append(part.codes)
    return np.stack(found)


def test_without_options_a_picture_is_its_own_codes(codec: Codec, pictures: list[Picture]) -> None:
    found = encode_variants(codec, pictures, KEYS, VariantsConfig())
    assert found == [[Document([image])] for image in codec.encode_pictures(pictures)]


def test_crops_are_the_middle_and_the_corners_each_with_its_mirror_image(codec: Codec, pictures: list[Picture]) -> None:
    config = VariantsConfig(crop_share=0.8, flip=True)
    (found,) = encode_variants(codec, pictures[:1], KEYS[:1], config)
    corners = [(4, 4), (0, 0), (8, 0), (0, 8), (8, 8)]
    crops = [pictures[0].crop((x, y, x + 32, y + 32)) for x, y in corners]
    wanted = codec.encode_pictures([view for crop in crops for view in (crop, ImageOps.mirror(crop))])
    assert found == [Document([image]) for image in wanted]
    assert len(found) == config.number == 10
    assert len(np.unique(codes(found), axis=0)) > 5


def test_noise_is_of_the_key_and_the_seed_alone(codec: Codec, pictures: list[Picture]) -> None:
    config = VariantsConfig(num_samples=3, noise=1.0, seed=1)
    together = encode_variants(codec, pictures, KEYS, config)
    alone = [encode_variants(codec, [one], [key], config)[0] for one, key in zip(pictures, KEYS)]
    assert together == alone
    assert [len(row) for row in together] == [3, 3, 3]
    for row in together:
        assert len(np.unique(codes(row), axis=0)) == 3
    (other,) = encode_variants(codec, pictures[:1], KEYS[1:2], config)
    (later,) = encode_variants(codec, pictures[:1], KEYS[:1], VariantsConfig(num_samples=3, noise=1.0, seed=2))
    assert other != together[0]
    assert later != together[0]


def test_noise_has_the_given_size_before_the_quantizer(
    codec: Codec, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    code = codec.image_tokenizer.quantizer.latents_to_codes
    monkeypatch.setattr(
        codec.image_tokenizer.quantizer, "latents_to_codes", lambda latents: seen.append(latents) or code(latents)
    )
    encode_variants(codec, pictures[:1], KEYS[:1], VariantsConfig(num_samples=200, noise=0.25))
    latents = codec.image_tokenizer.encode_to_latents(codec.to_images(pictures[:1]))
    noise = torch.cat(seen) - latents
    assert noise.shape == (200, 3, 4, 4)
    assert float(noise.std()) == pytest.approx(0.25, rel=0.05)
    assert float(noise.mean(dim=0).abs().max()) < 0.25 * 5 / 200**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_share": 0.0}, "crop_share is 0.0; it must be above 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"seed": 1}, "seed is 1, but without noise nothing is drawn"),
        ({"num_samples": 2}, "without noise they are all the same"),
    ],
)
def test_what_can_not_act_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariantsConfig(**options)
