"""Pictures of several sizes: what may follow, and samples that do not depend on cache, batch or columns."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mixmodal.document import Document, EndOfTurn, Image, LuminaFormat, Mask, SequenceError, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling import engine as module
from mixmodal.sampling.engine import FREE, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.rules import TokenSampling
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SETTINGS = {"text": TokenSampling(temperature=0.8, top_p=0.9), "image": TokenSampling(top_k=9)}
GREEDY = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}
Ask = Callable[..., list[Request]]


class Letters:
    """A text tokenizer of ten letters."""

    def encode(self, text: str) -> list[int]:
        return ["abcdefghij".index(letter) for letter in text]

    def decode(self, pieces: list[int]) -> str:
        return "".join("abcdefghij"[piece] for piece in pieces)


@pytest.fixture
def form() -> LuminaFormat:
    """Six grids, of 1 to 4 codes with 2 to 6 newlines and sizes."""
    reserved = Vocabulary.reserved_for_sizes(4)
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=10, num_sentinels=6, num_reserved=reserved)
    return LuminaFormat(Vocabulary(sizes), {"image": (2, 2)}, Letters(), codes_per_unit=1)


@pytest.fixture
def image() -> Image:
    return Image(np.arange(4).reshape(1, 4))


@pytest.fixture
def prompts(form: LuminaFormat, image: Image) -> list[np.ndarray]:
    """Unequal prompts that are open for an image, some of which say its size."""
    asked = [([Text("abc")], None), ([], (4, 1)), ([Text("j"), EndOfTurn()], (1, 2)), ([Text("ab"), image], (2, 2))]
    return [form.spell_prompt(Document(parts), "image", grid) for parts, grid in asked]


def legal(form: LuminaFormat, prompt: np.ndarray, room: int, output: str = "mixed") -> set[int]:
    """What may follow a prompt."""
    grammar = Grammar(form, output, form.vocabulary.size)
    return set(grammar.legal(grammar.start([prompt], [room]))[0].nonzero()[:, 0].tolist())


Walk = Callable[..., list[np.ndarray]]


@pytest.mark.parametrize("seed", range(12))
def test_every_drawn_document_parses_whatever_room_it_has(
    form: LuminaFormat, prompts: list[np.ndarray], seed: int, walk: Walk
) -> None:
    rng, least = np.random.default_rng(seed), [5, 9, 4, 7]
    open_prompts = [*prompts, form.spell_prompt(Document([Text("abc")]), None), np.array([0])]
    rooms = [*(room + int(rng.integers(0, 20)) for room in least), *rng.integers(1, 30, 2).tolist()]
    for prompt, room, ids in zip(open_prompts, rooms, walk(form, "mixed", open_prompts, rooms, seed)):
        assert len(ids) <= room
        end = [] if ids[-1] == form.vocabulary.eos else [form.vocabulary.eos]
        form.parse(np.concatenate([prompt, ids, end]))


def test_every_size_is_drawn_and_an_image_is_all_there_is(form: LuminaFormat, walk: Walk) -> None:
    prompt, seen = form.spell_prompt(Document([Text("abc")]), "image"), set()
    for seed in range(60):
        (ids,) = walk(form, "image", [prompt], [11], seed)
        assert ids[-1] == form.vocabulary.end_of_span
        parts = form.parse(np.concatenate([prompt, ids, [2]])).parts
        assert [part.modality for part in parts] == ["text", "image"]
        seen.add(parts[1].codes.shape)
    assert seen == set(form.allowed_grids("image"))


@pytest.mark.parametrize("output", ["image", "mixed"])
def test_a_size_is_legal_as_long_as_its_whole_block_fits(form: LuminaFormat, output: str) -> None:
    size, opened = form.vocabulary.size_token, form.spell_prompt(Document([Text("abc")]), "image")
    # with its sizes and end-image a grid of h rows of w takes 3 + h (w + 1) tokens
    for room in range(5, 13):
        heights = {h for h, w in form.allowed_grids("image") if 3 + h * (w + 1) <= room}
        assert legal(form, opened, room, output) == {size(height) for height in heights}
        for height in heights:
            widths = {w for h, w in form.allowed_grids("image") if h == height and 3 + h * (w + 1) <= room}
            assert legal(form, np.append(opened, size(height)), room - 1, output) == {size(width) for width in widths}
    closed = form.spell_prompt(Document([Text("abc")]), None)
    assert [form.vocabulary.break_ in legal(form, closed, room) for room in (5, 6)] == [False, True]
    with pytest.raises(SequenceError, match="too few for the output 'image'"):
        legal(form, opened, 4, "image")
    with pytest.raises(SequenceError, match="too few for the output 'image'"):
        legal(form, form.spell_prompt(Document([]), "image", (4, 1)), 8, "image")  # 4 rows of 2, and end-image


def test_sizes_and_newlines_follow_nowhere_else(form: LuminaFormat) -> None:
    size, newline = form.vocabulary.size_token, form.vocabulary.newline
    for output in ("text", "mixed"):
        for parts in ([Text("abc")], [], [Image(np.zeros((2, 2), int))]):
            found = legal(form, form.spell_prompt(Document(parts), None), 30, output)
            assert not found & {newline, *map(size, range(1, 5))}


def test_within_an_image_codes_and_newlines_alternate(form: LuminaFormat, prompts: list[np.ndarray]) -> None:
    grammar, codes = Grammar(form, "image", form.vocabulary.size), set(form.vocabulary.ids("image"))
    state = grammar.start(prompts[1:], [20] * 3)
    lengths, periods = (8, 3, 6), (2, 3, 3)
    assert state.codes_left.tolist() == list(lengths)
    for step in range(8):
        legal, settled = grammar.legal(state), grammar.settle(state, torch.full((3,), 5))
        for row in (row for row in range(3) if step < lengths[row]):
            is_newline = step % periods[row] == periods[row] - 1
            assert grammar.modality_at(int(state.nodes[row])) == "image"
            assert set(legal[row].nonzero()[:, 0].tolist()) == ({form.vocabulary.newline} if is_newline else codes)
            assert int(settled[row]) == (form.vocabulary.newline if is_newline else 5)
        state = grammar.advance(state, settled)


def test_what_no_document_begins_with_is_refused(form: LuminaFormat) -> None:
    size, newline, open_id = form.vocabulary.size_token, form.vocabulary.newline, form.vocabulary.break_
    for ids, name in (([size(1)], "size:1"), ([open_id, newline], "newline"), ([open_id, size(4), size(2)], "size:2")):
        with pytest.raises(SequenceError, match=f"<{name}> can not stand at position {len(ids)}"):
            Grammar(form, "mixed", form.vocabulary.size).start([np.array([0, *ids])], [30])
    with pytest.raises(SequenceError, match="can not stand at position 5"):  # no newline behind the first row
        Grammar(form, "mixed", form.vocabulary.size).start([np.array([0, open_id, size(2), size(1), 4, 5])], [30])


# samples


def test_a_batch_of_unequal_sizes_equals_one_by_one_and_a_loop_without_cache(
    form: LuminaFormat,
    model: Transformer,
    prompts: list[np.ndarray],
    ask: Ask,
    sample_plainly: Callable[..., list[int]],
) -> None:
    generator = SequenceGenerator(model, form)
    requests = ask(generator, prompts)
    together, seen = generator.generate(requests, SETTINGS), set()
    for row, request in enumerate(requests):
        (alone,) = generator.generate([request], SETTINGS)
        assert alone.tolist() == together[row].tolist() == sample_plainly(request, SETTINGS)
        part = form.parse(np.concatenate([request.prompt, alone, [2]])).parts[-1]
        assert isinstance(part, Image)
        seen.add(part.codes.shape)
    assert {(4, 1), (1, 2), (2, 2)} <= seen


def test_guided_samples_of_unequal_sizes_equal_one_by_one_and_a_loop_without_cache(
    form: LuminaFormat,
    model: Transformer,
    prompts: list[np.ndarray],
    ask: Ask,
    sample_plainly: Callable[..., list[int]],
) -> None:
    generator = SequenceGenerator(model, form)
    # a prompt without a size leaves it to the model, and all rows follow what it draws
    requests = ask(generator, [prompts[0]] * 4, seeds=range(4), scale=3.0)
    together = generator.generate(requests, SETTINGS)
    plain = generator.generate(ask(generator, [prompts[0]] * 4, seeds=range(4)), SETTINGS)
    assert [ids[:2].tolist() for ids in plain] == [ids[:2].tolist() for ids in together]  # sizes are not guided
    assert [ids.tolist() for ids in plain] != [ids.tolist() for ids in together]
    for row, request in enumerate(requests):
        (alone,) = generator.generate([request], SETTINGS)
        assert alone.tolist() == together[row].tolist() == sample_plainly(request, SETTINGS)


def test_mixed_samples_stay_in_the_context_and_parse(form: LuminaFormat, model: Transformer, ask: Ask) -> None:
    generator, modalities = SequenceGenerator(model, form), []
    prompts = [form.spell_prompt(Document(parts), None) for parts in ([Text("abcdefghij")], [], [Text("a")])] * 6
    for prompt, ids in zip(prompts, generator.generate(ask(generator, prompts, "mixed"))):
        assert len(prompt) + len(ids) <= 48
        end = [] if ids[-1] == form.vocabulary.eos else [form.vocabulary.eos]
        modalities += [part.modality for part in form.parse(np.concatenate([prompt, ids, end])).parts]
    assert {"text", "image"} == set(modalities)


def test_a_picture_takes_one_look_at_the_device(
    form: LuminaFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], module.Engine._look

    def count(engine: module.Engine) -> object:
        looks.append(engine)
        return look(engine)

    monkeypatch.setattr(module.Engine, "_look", count)
    generator = SequenceGenerator(model, form)
    generator.generate(ask(generator, prompts[1:2]))
    assert len(looks) == 2  # before the first code, and before end-image


def test_only_columns_of_codes_are_computed_within_pictures(
    form: LuminaFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, logits = [], model.logits

    def record(hidden: torch.Tensor, ids: slice | None = None) -> torch.Tensor:
        found = logits(hidden) if ids is None else logits(hidden, ids=ids)
        widths.append(found.shape[-1])
        return found

    monkeypatch.setattr(model, "logits", record)
    generator = SequenceGenerator(model, form)
    generator.generate(ask(generator, prompts[1:2]))
    assert widths == [16] * 8 + [form.vocabulary.size]


def test_known_codes_and_newlines_are_kept_and_the_others_drawn(form: LuminaFormat, model: Transformer) -> None:
    generator, newline = SequenceGenerator(model, form), form.vocabulary.newline
    known = np.array([4, 5, newline, FREE, 7, newline])
    request = generator.request(form.spell_prompt(Document([Mask(0)]), "image", (2, 2)), 0, "image", known=known)
    (ids,) = generator.generate([request])
    assert np.array_equal(ids[known != FREE], known[known != FREE])
    assert form.vocabulary.contains("image", ids[3])
