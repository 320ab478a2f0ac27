"""What users draw with a model of pictures of several sizes: sizes, regions, streams, memories, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.config import UsageError, parse
from mixmodal.document import Document, EndOfTurn, Image, LuminaFormat, Mask
from mixmodal.interop.export import save_export
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline.generate import GenerateConfig, PromptPart, generate
from mixmodal.pipeline.holes import PartialPicture
from mixmodal.pipeline.prompts import output_room, spell_prompts, spell_streams
from mixmodal.pipeline.queue import Ask, Drawn, Failed
from mixmodal.sampling.engine import Request
from mixmodal.sampling.guidance import Guidance, Stream
from mixmodal.sampling.rules import TokenSampling
from mixmodal.serve.conversation import Conversation
from mixmodal.serve.settings import Settings
from mixmodal.serve.studio import Studio
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SIZES = [(64, 64), (128, 32), (32, 128), (64, 32), (32, 32)]


@pytest.fixture(scope="module")
def exported(lumina_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported random model."""
    pieces = TextTokenizer.load(lumina_tokenizers / "text.model").num_pieces
    sizes = {"codebook_sizes": {"image": 75}, "num_text_pieces": pieces, "num_sentinels": 8}
    vocabulary = Vocabulary(VocabularyConfig(**sizes, num_reserved=Vocabulary.reserved_for_sizes(4)))  # type: ignore[arg-type]
    form = LuminaFormat(vocabulary, {"image": (2, 2)}, codes_per_unit=1)
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 128, "init_std": 0.3}
    model = Transformer(TransformerConfig(vocab_size=vocabulary.size, **shape))
    folder = tmp_path_factory.mktemp("lumina") / "run" / "export"
    tokenizers = lumina_tokenizers / "text.model", lumina_tokenizers / "image"
    save_export(folder, model, form, *tokenizers, {"title": "A test"})
    return folder


@pytest.fixture(scope="module")
def model(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, "cpu")


@pytest.fixture
def wide() -> PIL.Image:
    return PIL.fromarray(np.random.default_rng(0).integers(0, 256, (20, 80, 3), dtype=np.uint8))


def same(first: PIL.Image, second: PIL.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_has_the_size_that_is_asked_for(model: MixedModal, wide: PIL.Image, size: tuple[int, int]) -> None:
    for prompt in ("a red apple", [wide, "a pear", EndOfTurn()]):
        (picture,) = model.generate(prompt, size=size, guidance_scale=3.0, unconditional="drop")
        assert picture.size == size


def test_without_a_size_the_model_draws_it(model: MixedModal) -> None:
    assert len({picture.size for picture in model.generate("a red apple", num=24)}) > 3
    parts = model.generate("a red apple", "mixed", num=12)
    assert {type(part) for sample in parts for part in sample} == {str, PIL.Image}


def test_samples_do_not_depend_on_batch_or_queue(exported: Path, model: MixedModal) -> None:
    prompts: list[Any] = [["a red apple"], ["pear"], ["a green apple, flat style"]]
    together = model.generate_batch(prompts, num=2, seed=3)
    small = MixedModal.from_pretrained(exported, "cpu", batch_size=1)
    queued = list(model.generate_each(Ask(str(n), p, 2, 3) for n, p in enumerate(prompts)))
    assert all(isinstance(one, Drawn) for one in queued)
    found = {(one.key, one.number): one.sample for one in queued if isinstance(one, Drawn)}
    for number, prompt in enumerate(prompts):
        for sample, alone in enumerate(small.generate(prompt, num=2, seed=3)):
            assert alone.size == together[number][sample].size
            assert same(alone, found[str(number), sample])


def test_a_streamed_picture_grows_in_its_size(model: MixedModal) -> None:
    for options in ({"size": (128, 32)}, {}):
        pieces = list(model.stream("a red apple", "image", preview_every=1, seed=1, **options))
        (wanted,) = model.generate("a red apple", seed=1, **options)
        assert [piece.whole for piece in pieces].count(True) == 1
        assert same(pieces[-1].part, wanted)
        assert len(pieces) >= (4 if options else 2)
        assert {piece.part.size for piece in pieces} == {wanted.size}
    mixed = list(model.stream("a red apple", "mixed", preview_every=1, num=6))
    for number, sample in enumerate(model.generate("a red apple", "mixed", num=6)):
        whole = [piece.part for piece in mixed if piece.sample == number and piece.whole]
        assert [type(part) for part in whole] == [type(part) for part in sample]


def test_sizes_that_can_not_be_drawn_are_named(model: MixedModal) -> None:
    with pytest.raises(ValueError, match=r"size is 100x64, which is none of the 8 .* the nearest is 64x64"):
        model.generate("a red apple", size=(100, 64))
    with pytest.raises(ValueError, match="size can not act on the output mixed"):
        model.generate("a red apple", "mixed", size=(64, 64))
    with pytest.raises(ValueError, match="size can not act on a region"):
        model.infill(PIL.new("RGB", (8, 8)), (0, 0, 8, 4), size=(64, 64))
    with pytest.raises(ValueError, match="size can not act on masks"):
        model.fill_masks(["a", Mask(0)], size=(64, 64))
    for output in ("infill", "text"):
        with pytest.raises(ValueError, match="size can not act on"):
            next(model.generate_each([Ask("a", "a")], output, size=(64, 64)))


def test_a_format_of_one_size_refuses_another(
    model: MixedModal, tokenizers: Path, tmp_path: Path, lumina_tokenizers: Path
) -> None:
    from mixmodal.document import build_format
    from mixmodal.tokenization.codec import Codec

    form = build_format("chameleon", model.format.vocabulary, {"image": (2, 2)})
    codec = Codec(model.codec.text_tokenizer, model.codec.image_tokenizer, form)
    square = MixedModal(model.model, codec)
    assert square.generate("a", size=(64, 64))[0].size == (64, 64)
    with pytest.raises(ValueError, match="all pictures of this model have 64x64 pixels; leave it out"):
        square.generate("a", size=(128, 32))


# guidance


def test_a_row_without_prompt_begins_with_the_picture(model: MixedModal) -> None:
    (prompt,) = spell_prompts(model.codec, [["a red apple", EndOfTurn()]], "image", (1, 2))
    opened, sizes = model.format.vocabulary.break_, model.format.size_lead("image", (1, 2))
    for unconditional, bare in (("drop", True), ("mask", False)):
        guidance = Guidance(text_scale=4.0, unconditional=unconditional)  # type: ignore[arg-type]
        weight, (stream,) = spell_streams(model.format, prompt, guidance, "image")
        assert (weight, stream.weight, stream.bare) == (4.0, -3.0, bare)
        request = model.generator.request(prompt.ids, 0, "image", weight=weight, streams=(stream,))
        row = request.rows[1].tolist()
        assert row == ([opened, *sizes] if bare else stream.prompt.tolist())
    behind = model.format.prefix([model.format.spell(Document([Image(np.zeros((2, 2), int))]))])
    stream = Stream(np.array([0, opened]), 1.0, True)
    request = Request(prompt.ids, 0, "image", 9, behind, streams=(stream,))
    assert request.rows[1].tolist() == [*behind.tolist(), opened]  # what is read before reaches every row


def test_greedy_codes_with_a_row_of_the_picture_alone_equal_a_loop_without_cache(model: MixedModal) -> None:
    (prompt,) = spell_prompts(model.codec, [["a red apple"]], "image")
    guidance, codes = Guidance(text_scale=4.0, unconditional="drop"), model.format.vocabulary.ids("image")
    weight, streams = spell_streams(model.format, prompt, guidance, "image")
    request = model.generator.request(prompt.ids, 0, "image", weight=weight, streams=streams)
    greedy = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}
    (drawn,) = model.generator.generate([request], greedy, guidance)
    f, u, compared = prompt.ids, prompt.ids[-1:], 0
    for token in drawn.tolist():
        if token in codes:
            with torch.no_grad():
                whole, bare = (model.model(torch.from_numpy(row)[None])[0, -1] for row in (f, u))
            logits = (bare + 4.0 * (whole - bare))[codes.start : codes.stop]
            assert token == codes.start + int(logits.argmax())
            compared += 1
        f, u = np.append(f, token), np.append(u, token)
    assert compared


# regions, memories, classes


@pytest.mark.parametrize("order", ["raster", "masks"])
def test_a_region_is_drawn_into_a_picture_of_its_own_size(model: MixedModal, wide: PIL.Image, order: str) -> None:
    (image,) = model.codec.encode_pictures([wide])
    known = np.asarray(model.codec.decode_images([image])[0])
    changed = 0
    for seed in range(4):
        (picture,) = model.infill(wide, (20, 0, 60, 20), "a red apple", seed=seed, order=order)  # type: ignore[arg-type]
        assert picture.size == (128, 32)
        (again,) = model.codec.encode_pictures([picture])
        changed += int(not np.array_equal(np.asarray(picture), known))
        assert again.codes.shape == (1, 4)
    assert changed
    queued = list(
        model.generate_each([Ask("a", ["a red apple", PartialPicture(wide, (20, 0, 60, 20))])], "infill", order=order)  # type: ignore[arg-type]
    )
    (picture,) = model.infill(wide, (20, 0, 60, 20), "a red apple", order=order)  # type: ignore[arg-type]
    assert not isinstance(queued[0], Failed)
    assert same(queued[0].sample, picture)


@pytest.mark.parametrize("order", ["raster", "masks"])
def test_codes_outside_a_region_stay(model: MixedModal, order: str) -> None:
    from mixmodal.pipeline.infilling import fill_region, merge_region

    image, cells = Image(np.arange(4).reshape(2, 2)), np.array([[False, True], [True, False]])
    (prompt,) = spell_prompts(model.codec, [["a"]], "image", (2, 2))
    request = model.generator.request(prompt.ids, 0, "image")
    (filled,) = fill_region(model.format, [request], image, cells, order)  # type: ignore[arg-type]
    newline = model.format.vocabulary.newline
    assert filled.known is not None
    assert (newline in filled.known) == (order == "raster")
    assert np.count_nonzero(filled.prompt == newline) == (0 if order == "raster" else 2)
    (drawn,) = model.generator.generate([filled])
    merged = merge_region(model.format, image, cells, filled, drawn)
    assert np.array_equal(merged.codes[~cells], image.codes[~cells])
    assert merged.codes.shape == (2, 2)


def test_documents_of_other_sizes_are_read_before_a_prompt(model: MixedModal, wide: PIL.Image) -> None:
    square = PIL.new("RGB", (9, 9), "red")
    pictures = [model.generate("a pear", before=before, seed=1)[0] for before in ([], [["a", wide], ["b", square]])]
    assert all(picture.size in {(32 * w, 32 * h) for w in range(1, 5) for h in range(1, 5)} for picture in pictures)
    guided = model.generate("a pear", before=[["a", wide]], guidance_scale=3.0, unconditional="drop", size=(64, 32))
    assert guided[0].size == (64, 32)
    assert output_room(model.format, "image", None) == 2 + 4 * 2 + 1 + 1  # of the tallest, with </s>
    assert output_room(model.format, "image", None, (1, 2)) == 3 + 1 + 1


def test_pictures_of_several_sizes_are_classified_and_scored(model: MixedModal, wide: PIL.Image) -> None:
    square = PIL.new("RGB", (9, 9), "red")
    for method in ("image_given_text", "text_given_image"):
        both = model.score_classes([wide, square], ["a red apple", "pear"], method).scores
        for row, picture in enumerate((wide, square)):
            alone = model.score_classes([picture], ["a red apple", "pear"], method).scores
            np.testing.assert_allclose(alone[0], both[row], rtol=1e-4)
    assert model.log_likelihood(["a"], [wide]).count == 4
    assert model.generate("a red apple", best_of=3)[0].size[0] >= 32


def test_a_text_behind_pictures_of_all_sizes(model: MixedModal, wide: PIL.Image) -> None:
    (text,) = model.generate([wide, "a", PIL.new("RGB", (9, 9)), EndOfTurn()], "text", max_new_tokens=5)
    assert isinstance(text, str)


def test_the_page_draws_reads_and_edits_pictures_of_all_sizes(
    model: MixedModal, wide: PIL.Image, tmp_path: Path
) -> None:
    wide.save(tmp_path / "wide.png")
    studio, talk = Studio(model, interval_s=0.0), Conversation()
    *_, turn = studio.answer(talk, "a red apple", [str(tmp_path / "wide.png")], Settings(num=2))
    assert (turn.error, turn.state) == ("", "done")
    assert turn.prompt[0].size == (128, 32)
    assert len(list(turn.pictures())) == 2
    *_, turn = studio.answer(talk, "and", [], Settings(output="mixed", remember=1))
    assert turn.error == ""
    layer = PIL.new("RGBA", wide.size)
    layer.paste("black", (20, 0, 60, 20))
    *_, turn = studio.redraw(talk, {"background": wide, "layers": [layer]}, "a pear", Settings())
    assert turn.error == ""
    assert [picture.size for picture in turn.pictures()] == [(128, 32)]


def test_masks_beside_pictures_of_all_sizes_are_filled(model: MixedModal, wide: PIL.Image) -> None:
    ((first, second),) = model.fill_masks(["a ", Mask(0), wide, "and ", Mask(1), EndOfTurn()], max_new_tokens=4)
    assert isinstance(first, str)
    assert isinstance(second, str)


# the command


def test_the_command_draws_a_size_behind_a_template(exported: Path, model: MixedModal, tmp_path: Path) -> None:
    options = {"model": str(exported), "device": "cpu", "parts": [PromptPart(text="a {width} pear")]}
    config = GenerateConfig(
        **options, out=tmp_path, size="128x32", template="{width}x{height}: {prompt}!", end_turn=True
    )
    generate(config)
    (wanted,) = model.generate(["128x32: a {width} pear!", EndOfTurn()], size=(128, 32))
    assert same(PIL.open(tmp_path / "0000.png"), wanted)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["size"] == [128, 32]
    assert (results["template"], results["end_turn"]) == (config.template, True)
    assert results["prompt"] == [{"text": "a {width} pear"}]
    assert config.frame(["a", EndOfTurn()]) == ["128x32: a!", EndOfTurn()]  # no second one
    generate(replace(config, out=tmp_path / "b", size=None, template=None, end_turn=False))
    assert not {"template", "end_turn"} & set(json.loads((tmp_path / "b" / "results.json").read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "128"], "size is '128'; it must be WIDTHxHEIGHT"),
        (["--size", "0x64"], "it must be WIDTHxHEIGHT"),
        (["--size", "64x64", "--output", "mixed"], "size can not act where output is mixed"),
        (["--template", "draw"], "it must have {prompt}"),
        (["--template", "{width} {prompt}"], "names a size; give --size"),
        (["--template", "{prompt}", "--output", "infill"], "template and end_turn can not act where output is infill"),
        (["--end_turn", "true", "--output", "infill"], "template and end_turn can not act where output is infill"),
    ],
)
def test_options_that_can_not_act_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(GenerateConfig, ["--model", "m", "--out", "o", "--prompt", "a", *arguments])


def test_a_template_is_for_one_text(exported: Path, tmp_path: Path) -> None:
    parts = [PromptPart(text="a"), PromptPart(end_of_turn=True), PromptPart(text="b")]
    with pytest.raises(ValueError, match="the template is for a prompt of one text, and there are 2"):
        generate(GenerateConfig(model=str(exported), out=tmp_path, parts=parts, template="draw {prompt}"))
