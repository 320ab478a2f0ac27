"""What may follow is what the sequence format can spell, in every mode and near every limit."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixmodal.document import (
    PART_TYPES,
    Coded,
    Document,
    Image,
    Mask,
    SequenceError,
    SequenceFormat,
    Text,
    build_format,
)
from mixmodal.sampling.grammar import Grammar
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

LENGTH = 6


Walk = Callable[..., list[np.ndarray]]


def whole(form: SequenceFormat, *ids: np.ndarray) -> Document:
    together = np.concatenate(ids)
    return form.parse(together if together[-1] == form.vocabulary.eos else np.append(together, form.vocabulary.eos))


@pytest.mark.parametrize("seed", range(8))
def test_every_drawn_document_parses_whatever_room_it_has(
    form: SequenceFormat, prompts: list[np.ndarray], seed: int, walk: Walk
) -> None:
    open_prompts = [*prompts, form.spell_prompt(Document([Text("abc")]), None), form.spell_prompt(Document([]), None)]
    rooms = np.random.default_rng(seed).integers(LENGTH + 1, 30, len(open_prompts)).tolist()
    for prompt, room, ids in zip(open_prompts, rooms, walk(form, "mixed", open_prompts, rooms, seed)):
        assert len(ids) <= room
        whole(form, prompt, ids)


def test_mixed_output_reaches_text_images_and_the_end(form: SequenceFormat, walk: Walk) -> None:
    seen = set()
    for seed in range(40):
        (ids,) = walk(form, "mixed", [np.array([0])], [40], seed)
        parts = [part.modality for part in whole(form, np.array([0]), ids).parts]
        seen |= set(pairwise(parts))
    assert {("text", "image"), ("image", "text"), ("image", "image")} <= seen


def test_image_output_is_exactly_one_image(form: SequenceFormat, prompts: list[np.ndarray], walk: Walk) -> None:
    close = form.blocks["image"].close_id
    closed = form.spell_prompt(Document([Text("abc")]), None)
    for prompt, ids in zip(prompts, walk(form, "image", prompts, [LENGTH + 2] * 4, 0)):
        assert form.vocabulary.contains("image", ids[:LENGTH]).all()
        assert ids[LENGTH:].tolist() == ([] if close is None else [close])
        assert whole(form, prompt, ids).parts[-1].modality == "image"
    (ids,) = walk(form, "image", [closed], [LENGTH + 2], 0)
    assert ids[0] == form.blocks["image"].open_id
    assert len(ids) == 1 + LENGTH + (close is not None)


def test_text_output_is_text_up_to_the_end_or_to_where_a_picture_would_open(
    form: SequenceFormat, image: Image, walk: Walk
) -> None:
    prompt = form.spell_prompt(Document([image]), "text")
    ends = {form.vocabulary.eos, form.blocks["image"].open_id}
    seen = set()
    for seed in range(60):
        (ids,) = walk(form, "text", [prompt], [12], seed)
        body = ids[:-1] if ids[-1] in ends else ids
        assert form.vocabulary.contains("text", body).all()
        assert len(ids) == 12 or ids[-1] in ends
        seen |= {int(ids[-1])} & ends
    assert seen == ends


def test_a_picture_that_does_not_fit_still_ends_a_text(form: SequenceFormat) -> None:
    grammar = Grammar(form, "text", form.vocabulary.size)
    open_id = form.blocks["image"].open_id
    state = grammar.start([form.spell_prompt(Document([Text("abc")]), "text")], [1])
    assert grammar.legal(state)[0, open_id]
    assert not grammar.live(grammar.advance(state, torch.tensor([open_id])))


def test_control_ids_that_no_document_has_are_never_legal(form: SequenceFormat, prompts: list[np.ndarray]) -> None:
    grammar = Grammar(form, "mixed", form.vocabulary.size + 3)
    never = [form.vocabulary.bos, form.vocabulary.pad, form.vocabulary.unk, form.vocabulary.end_of_turn]
    never += [*form.vocabulary.ids("sentinel"), *form.vocabulary.ids("reserved")]
    never += range(form.vocabulary.size, form.vocabulary.size + 3)
    for following in ("image", "text", None):
        state = grammar.start([form.spell_prompt(Document([Text("abc")]), following)], [20])
        assert not grammar.legal(state)[:, never].any()


def test_break_is_legal_as_long_as_the_picture_fits(form: SequenceFormat) -> None:
    block = form.blocks["image"]
    needed = 1 + LENGTH + (block.close_id is not None)
    prompt = form.spell_prompt(Document([Text("abc")]), None)
    grammar = Grammar(form, "mixed", form.vocabulary.size)
    fits, short = grammar.start([prompt], [needed]), grammar.start([prompt], [needed - 1])
    assert grammar.legal(fits)[0, block.open_id]
    assert not grammar.legal(short)[0, block.open_id]
    assert grammar.legal(short)[0, form.vocabulary.eos]


def test_a_second_break_needs_room_for_text_or_a_picture(form: SequenceFormat, image: Image) -> None:
    prompt = form.spell_prompt(Document([image]), None)
    grammar = Grammar(form, "mixed", form.vocabulary.size)
    legal = [bool(grammar.legal(grammar.start([prompt], [room]))[0, form.vocabulary.break_]) for room in range(1, 9)]
    # in cm3leon the token also leads to text, which one more token is enough for
    assert legal == ([False] + [True] * 7 if form.text_after_open else [False] * 7 + [True])


def test_a_prompt_may_end_inside_an_image(form: SequenceFormat, image: Image, walk: Walk) -> None:
    prompt = form.spell_prompt(Document([Text("abc"), image]), None)
    cut = prompt[: len(prompt) - 3 - (form.blocks["image"].close_id is not None)]
    (ids,) = walk(form, "image", [cut], [8], 0)
    assert form.vocabulary.contains("image", ids[:3]).all()
    assert whole(form, cut, ids).parts[-1].modality == "image"


def test_masks_are_read_and_never_written(form: SequenceFormat, walk: Walk) -> None:
    (ids,) = walk(form, "image", [form.spell_prompt(Document([Mask(0)]), "image")], [8], 0)
    assert len(ids) >= LENGTH


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5], "begin with <s>"), ([0, 2], "</s> can not stand at position 1"), ([0, 30, 1], "<pad> can not stand")],
)
def test_a_prompt_that_no_document_begins_with_is_refused(form: SequenceFormat, ids: list[int], message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        Grammar(form, "mixed", form.vocabulary.size).start([np.array(ids)], [9])


def test_a_prompt_without_room_is_refused(form: SequenceFormat, prompts: list[np.ndarray]) -> None:
    with pytest.raises(SequenceError, match=r"prompt 0 has .* 5 may follow it: too few for the output 'image'"):
        Grammar(form, "image", form.vocabulary.size).start(prompts[:1], [5])


def test_the_message_counts_from_the_first_prompt_of_a_queue(form: SequenceFormat, prompts: list[np.ndarray]) -> None:
    grammar = Grammar(form, "image", form.vocabulary.size)
    with pytest.raises(SequenceError, match="prompt 5 has"):
        grammar.start(prompts[:2], [8, 5], first=4)
    with pytest.raises(SequenceError, match="prompt 4 does not begin with <s>"):
        grammar.start([prompts[0][1:]], [8], first=4)


def test_a_prompt_that_is_open_for_something_else_is_refused(form: SequenceFormat, prompts: list[np.ndarray]) -> None:
    with pytest.raises(SequenceError, match="prompt 0 is open for another part than the output 'text'"):
        Grammar(form, "text", form.vocabulary.size).start(prompts[:1], [9])


def test_an_unknown_output_names_the_choices(form: SequenceFormat) -> None:
    with pytest.raises(ValueError, match="'picture' is unknown; choose text, image, mixed"):
        Grammar(form, "picture", form.vocabulary.size)


def test_within_an_image_only_its_codes_may_follow(form: SequenceFormat, prompts: list[np.ndarray]) -> None:
    grammar = Grammar(form, "image", form.vocabulary.size)
    state = grammar.start(prompts, [8] * 4)
    for left in range(LENGTH, 0, -1):
        assert [grammar.modality_at(node) for node in state.nodes.tolist()] == ["image"] * 4
        assert state.codes_left.tolist() == [0 if left == LENGTH else left] * 4  # none is open before the first
        state = grammar.advance(state, torch.full((4,), form.vocabulary.ids("image").start))
    assert [grammar.modality_at(node) for node in state.nodes.tolist()] == [None] * 4
    assert grammar.live(state).any() == (form.blocks["image"].close_id is not None)


@pytest.mark.parametrize("output", ["text", "image", "mixed"])
def test_the_modality_at_a_node_is_that_of_all_that_may_follow(form: SequenceFormat, output: str, walk: Walk) -> None:
    grammar, codes = Grammar(form, output, form.vocabulary.size), set(form.vocabulary.ids("image"))
    seen, prompt = set(), form.spell_prompt(Document([Text("abc")]), "text")
    for seed in range(20):
        (ids,) = walk(form, output, [prompt], [40], seed)
        for stop in range(len(ids)):
            state = grammar.start([np.concatenate([prompt, ids[:stop]])], [40 - stop])
            modality, legal = (
                grammar.modality_at(int(state.nodes)),
                set(grammar.legal(state)[0].nonzero()[:, 0].tolist()),
            )
            assert legal == codes if modality == "image" else modality is None and not legal <= codes
            seen.add(modality)
    assert seen == ({None} if output == "text" else {None, "image"})


class Sound(Coded):
    modality = "sound"


def test_a_further_coded_modality_needs_no_code_here(monkeypatch: pytest.MonkeyPatch, walk: Walk) -> None:
    monkeypatch.setitem(PART_TYPES, "sound", Sound)
    sizes = VocabularyConfig(codebook_sizes={"image": 8, "sound": 5}, num_text_pieces=4, num_sentinels=2)
    form = build_format("cm3leon", Vocabulary(sizes), {"image": (2, 2), "sound": (3,)})
    prompt = np.array([0, form.vocabulary.ids("text").start, form.vocabulary.break_])
    for seed in range(5):
        (ids,) = walk(form, "sound", [prompt], [9], seed)
        assert len(ids) == 3
        assert form.vocabulary.contains("sound", ids).all()
    seen = set()
    for seed in range(40):
        (ids,) = walk(form, "mixed", [np.array([0])], [30], seed)
        ids = ids if ids[-1] == form.vocabulary.eos else np.append(ids, form.vocabulary.eos)
        seen |= {run.modality for run in form.split(np.append([0], ids))}
    assert seen == {"text", "image", "sound"}
