"""Regions of pictures and texts that masks stand for: what is read is what CM3 trains on, and what is known stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.document import Document, Image, Mask, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.objectives.causal_masked import _move
from mixmodal.pipeline.drawing import UNDRAWN
from mixmodal.pipeline.infilling import cells_of, fill_region, merge_region
from mixmodal.pipeline.masked_text import MaskedText
from mixmodal.sampling.engine import FREE
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import INFILL, Grammar
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling

CELLS = np.array([[False, True, True], [True, False, True]])
GREEDY = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}


@pytest.fixture
def loaded(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, device="cpu")


@pytest.fixture
def picture() -> PIL.Image:
    return PIL.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))


def last_logits(model: Transformer, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None])[0, -1]


def test_a_region_in_masks_is_the_document_that_cm3_trains_on(
    form: SequenceFormat, model: Transformer, image: Image
) -> None:
    generator, vocabulary = SequenceGenerator(model, form), form.vocabulary
    prompt = form.spell_prompt(Document([Text("abc")]), "image")
    (request,) = fill_region(form, [generator.request(prompt, 0, "image")], image, CELLS, "masks")
    assert request.known is not None
    ids = form.spell(Document([Text("abc"), image]))
    start = int(np.flatnonzero(np.asarray(vocabulary.contains("image", ids)))[0])
    spans = [(start + 1, start + 4), (start + 5, start + 6)]
    wanted = _move(ids, spans, [vocabulary.sentinel(0), vocabulary.sentinel(1)], vocabulary.end_of_span)
    drawn = request.known.copy()
    drawn[drawn == FREE] = np.concatenate([ids[first:last] for first, last in spans])
    end = [vocabulary.end_of_span, vocabulary.eos]
    assert np.concatenate([request.prompt, drawn, end]).tolist() == wanted.tolist()
    assert merge_region(form, image, CELLS, request, drawn).codes.tolist() == image.codes.tolist()


@pytest.mark.parametrize("order", ["masks", "raster"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_region_equals_a_loop_without_cache(
    form: SequenceFormat, model: Transformer, image: Image, order: str, scale: float
) -> None:
    generator, guidance = SequenceGenerator(model, form), Guidance(text_scale=scale)
    whole, less = (form.spell_prompt(Document([part]), "image") for part in (Text("abc"), Mask(0)))
    weight, streams = build_streams(guidance, whole, less, less)
    request = generator.request(whole, 0, "image", weight=weight, streams=streams)
    (request,) = fill_region(form, [request], image, CELLS, order)  # type: ignore[arg-type]
    assert request.known is not None
    (drawn,) = generator.generate([request], GREEDY, guidance)
    codes, rows = form.vocabulary.ids("image"), [request.prompt, *(one.prompt for one in request.streams)]
    weights = [request.weight, *(one.weight for one in request.streams)]
    for known, token in zip(request.known, drawn, strict=True):
        if known == FREE:
            logits = sum(factor * last_logits(model, row) for factor, row in zip(weights, rows, strict=True))
            assert isinstance(logits, torch.Tensor)
            known = codes.start + int(logits[codes.start : codes.stop].argmax())
        assert token == known
        rows = [np.append(row, token) for row in rows]
    found = merge_region(form, image, CELLS, request, drawn)
    assert found.codes[~CELLS].tolist() == image.codes[~CELLS].tolist()


def test_masks_of_a_region_are_others_than_those_of_guidance(form: SequenceFormat, model: Transformer) -> None:
    generator, guidance = SequenceGenerator(model, form), Guidance(text_scale=2.0)
    whole, less = (form.spell_prompt(Document([part]), "image") for part in (Text("abc"), Mask(0)))
    weight, streams = build_streams(guidance, whole, less, less)
    request = generator.request(whole, 0, "image", weight=weight, streams=streams)
    image = Image(np.zeros((2, 3), dtype=np.int64))
    (request,) = fill_region(form, [request], image, CELLS, "masks")
    assert request.prompt[-1] == form.vocabulary.sentinel(1)
    many = Image(np.zeros((2, 3), dtype=np.int64))
    form.vocabulary.config = form.vocabulary.config.__class__(**{**vars(form.vocabulary.config), "num_sentinels": 2})
    with pytest.raises(ValueError, match="the region has 2 stretches of codes, and the model 1 masks"):
        fill_region(form, [generator.request(whole, 0, "image", weight=weight, streams=streams)], many, CELLS, "masks")


def test_a_box_and_a_mask_touch_the_codes_that_they_cover(loaded: MixedModal) -> None:
    config, grid = loaded.codec.image_tokenizer.config, (4, 4)
    wide = (80, 40)  # its middle, 40 x 40, is what the tokenizer sees
    assert cells_of((20, 0, 60, 20), wide, config, grid).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    left = cells_of((0, 0, 30, 40), wide, config, grid)
    assert left.tolist() == [[True, False, False, False]] * 4
    mask = PIL.new("L", wide)
    mask.paste(255, (0, 0, 30, 40))
    assert cells_of(mask.convert("RGB"), wide, config, grid).tolist() == left.tolist()
    with pytest.raises(ValueError, match="the mask has 79x40 pixels, the picture 80x40"):
        cells_of(mask.crop((0, 0, 79, 40)), wide, config, grid)
    for box in ((0, 0, 81, 40), (-1, 0, 4, 4), (5, 5, 5, 9)):
        with pytest.raises(ValueError, match="does not lie in the picture of 80x40 pixels"):
            cells_of(box, wide, config, grid)
    for nothing in ((0, 0, 10, 40), PIL.new("L", wide)):
        with pytest.raises(ValueError, match="touches no code"):
            cells_of(nothing, wide, config, grid)


@pytest.mark.parametrize("order", ["masks", "raster"])
def test_a_picture_keeps_what_is_not_in_the_region(loaded: MixedModal, picture: PIL.Image, order: str) -> None:
    (image,) = loaded.codec.encode_pictures([picture])
    seen: list[Image] = []
    decode = loaded.codec.decode_images
    loaded.codec.decode_images = lambda images: seen.extend(images) or decode(images)  # type: ignore[method-assign]
    found = loaded.infill(picture, (10, 10, 30, 20), "pear", num=3, order=order, seed=2)  # type: ignore[arg-type]
    assert [one.size for one in found] == [decode([image])[0].size] * 3
    lower = np.arange(16).reshape(4, 4) >= 8
    assert all(one.codes[~lower].tolist() == image.codes[~lower].tolist() for one in seen)
    assert len({one.codes.tobytes() for one in seen}) == 3


@pytest.mark.parametrize("order", ["masks", "raster"])
@pytest.mark.parametrize("preview_every", [0, 3])
def test_pieces_of_a_region_end_as_the_pictures(
    loaded: MixedModal, picture: PIL.Image, order: str, preview_every: int
) -> None:
    options: Any = {"num": 3, "order": order, "seed": 2}
    wanted = loaded.infill(picture, (10, 10, 30, 20), "pear", **options)
    pieces = list(loaded.stream_infill(picture, (10, 10, 30, 20), "pear", preview_every=preview_every, **options))
    whole = {piece.sample: piece.part for piece in pieces if piece.whole}
    assert [whole[sample].tobytes() for sample in range(3)] == [one.tobytes() for one in wanted]  # type: ignore[union-attr]
    assert (len(pieces) > 3) is bool(preview_every)
    with pytest.raises(ValueError, match=r"preview_every is -1 \(at least 0\)"):
        next(loaded.stream_infill(picture, (10, 10, 30, 20), preview_every=-1))


@pytest.mark.parametrize("order", ["masks", "raster"])
def test_a_region_is_grey_until_it_is_drawn_and_the_rest_is_there(
    loaded: MixedModal, picture: PIL.Image, order: str
) -> None:
    box = (10, 5, 20, 15)  # of a picture of which the middle, 20 x 20, is seen: 2 x 2 codes of 4 x 4
    options: Any = {"order": order, "seed": 2, "preview_every": 1}
    shown = [np.asarray(piece.part) for piece in loaded.stream_infill(picture, box, "pear", **options)]
    side = loaded.codec.image_tokenizer.config.image_size // 4
    cells = [(row, column) for row in (1, 2) for column in (0, 1)]
    first = 0 if order == "raster" else 1  # with masks all that is known is read before the first code is drawn
    for count, one in enumerate(shown, first):
        grey = (one == UNDRAWN).all(axis=-1).reshape(4, side, 4, side).all(axis=(1, 3))
        assert [(int(row), int(column)) for row, column in np.argwhere(grey)] == cells[count:]
    assert len(shown) == 5 - first
    (image,) = loaded.codec.encode_pictures([picture])
    known = np.asarray(loaded.codec.decode_images([image])[0])
    if first == 0:
        rest = (shown[0] != UNDRAWN).any(axis=-1)
        assert np.array_equal(shown[0][rest], known[rest])


def test_nothing_is_drawn_behind_a_region_in_raster_order(form: SequenceFormat, model: Transformer) -> None:
    generator, image = SequenceGenerator(model, form), Image(np.arange(6).reshape(2, 3))
    prompt = form.spell_prompt(Document([Text("abc")]), "image")
    cells = np.array([[False, True, False], [False, False, False]])
    (request,) = fill_region(form, [generator.request(prompt, 0, "image")], image, cells, "raster")
    (drawn,) = generator.generate([request])
    assert len(drawn) == 2
    assert merge_region(form, image, cells, request, drawn).codes[~cells].tolist() == image.codes[~cells].tolist()


def test_a_mask_in_text_equals_a_loop_without_cache(form: SequenceFormat, model: Transformer, image: Image) -> None:
    body = form.spell(Document([Text("ab"), Mask(0), Text("c"), image]))[:-1]
    prompt = np.append(body, form.vocabulary.sentinel(0))
    generator = SequenceGenerator(model, form)
    (found,) = generator.generate([generator.request(prompt, 0, INFILL, max_new_tokens=7)], GREEDY)
    legal = [*form.vocabulary.ids("text"), form.vocabulary.end_of_span]
    ids = prompt
    for token in found:
        assert token == legal[int(last_logits(model, ids)[legal].argmax())]
        ids = np.append(ids, token)
    assert found[-1] == form.vocabulary.end_of_span or len(found) == 7
    assert Grammar(form, INFILL, form.vocabulary.size).legal(
        Grammar(form, INFILL, form.vocabulary.size).start([prompt], [3])
    )[0].sum() == len(legal)


def test_masks_are_filled_in_turn(loaded: MixedModal, picture: PIL.Image) -> None:
    prompt = ["a red ", Mask(0), ", ", Mask(3), picture]
    texts = loaded.fill_masks(prompt, num=3, seed=1, max_new_tokens=5)
    assert [len(one) for one in texts] == [2] * 3
    assert all(isinstance(text, str) for one in texts for text in one)
    assert len({tuple(one) for one in texts}) > 1
    assert loaded.fill_masks(prompt, num=1, seed=1, max_new_tokens=5) == texts[:1]
    with pytest.raises(ValueError, match=r"needs masks in its texts, each another one; it has \[\]"):
        loaded.fill_masks(["a red apple", picture])
    with pytest.raises(ValueError, match=r"it has \[1, 1\]"):
        loaded.fill_masks([Mask(1), Mask(1)])
    with pytest.raises(ValueError, match="guidance acts on pictures alone"):
        loaded.fill_masks(prompt, guidance_scale=2.0)


def test_a_text_leaves_room_for_the_masks_behind_it(loaded: MixedModal) -> None:
    texts = loaded.fill_masks(["a", Mask(0), "b", Mask(2), "c", Mask(1)], num=4)
    assert [len(one) for one in texts] == [3] * 4
    assert max(len(one[0]) for one in texts) > 40  # it would take all of the context


def test_a_mask_is_read_behind_the_texts_of_those_before_it(loaded: MixedModal, picture: PIL.Image) -> None:
    vocabulary, document = loaded.format.vocabulary, loaded.codec.to_document(["a", Mask(3), "b", picture, Mask(1)])
    sample, body = MaskedText(loaded.generator, loaded.codec, document, 0, 0), loaded.format.spell(document)[:-1]
    written = vocabulary.to_ids("text", np.array(loaded.codec.text_tokenizer.encode("red")))
    assert sample.request().prompt.tolist() == [*body, vocabulary.sentinel(3)]
    assert sample.take(np.append(written, vocabulary.end_of_span)) is None
    behind = [vocabulary.sentinel(3), *written, vocabulary.end_of_span, vocabulary.sentinel(1)]
    assert sample.request().prompt.tolist() == [*body, *behind]
    assert sample.take(written[:0]) == ("aredb", {3: "red", 1: ""})
