"""A queue of requests of all kinds: what is drawn does not depend on who is drawn beside, before or where."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, Mask, SequenceError, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.engine import FREE, Engine, Progress, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6  # codes of a picture
SETTINGS = {
    "text": TokenSampling(temperature=1.5, top_p=0.95, repetition_penalty=1.3),
    "image": TokenSampling(top_k=12, min_p=0.01, repetition_penalty=0.8),
}


@pytest.fixture
def queue(form: SequenceFormat, model: Transformer, image: Image) -> list[Request]:
    """Text, pictures, mixed samples and a filled mask, with one, two or three rows, behind unequal prompts."""
    generator = SequenceGenerator(model, form)

    def ask(
        parts: list, output: str, guidance: Guidance | None = None, room: int | None = None, **options: Any
    ) -> Request:
        following = output if output in ("text", "image") else None
        documents = [parts, [part for part in parts if isinstance(part, Image)], [Mask(0)]]
        prompts = [form.spell_prompt(Document(some), following) for some in documents]
        if guidance is not None:
            options["weight"], options["streams"] = build_streams(guidance, *prompts)
        return generator.request(prompts[0], len(asked), output, max_new_tokens=room, **options)

    other, code = Image(np.full((2, 3), 9)), form.vocabulary.ids("image").start
    known = np.array([code + 5, FREE, FREE, code, FREE, form.vocabulary.break_, FREE, FREE])
    before = form.prefix([form.spell(Document([Text("hi"), other]))])
    asked: list[Request] = []
    asked += [ask([image], "text", room=7)]
    asked += [ask([Text("abc")], "image", Guidance(text_scale=3.0))]
    asked += [ask([], "mixed", room=14)]
    asked += [ask([Text("ab"), image, Text("cdefg")], "image", Guidance(text_scale=3.0, image_scale=1.2))]
    asked += [ask([Text("j")], "image", known=known)]
    asked += [ask([Text("hi"), image], "mixed", Guidance(text_scale=2.0, image_scale=3.0), room=16)]
    asked += [ask([Text("abc")], "text", room=3)]
    asked += [ask([Text("ab")], "image", before=before)]
    asked += [ask([Text("c")], "mixed", Guidance(text_scale=2.0), room=17)]
    asked += [ask([Text("j")], "image", Guidance(text_scale=-1.0))]
    asked += [ask([Text("ab"), Mask(0), Text("c"), Mask(0)], "infill", room=9)]
    return asked


def count_rows(request: Request) -> int:
    return 1 + len(request.streams)


def test_the_queue_has_samples_of_every_kind(form: SequenceFormat, model: Transformer, queue: list[Request]) -> None:
    rows = SequenceGenerator(model, form).generate(queue, SETTINGS)
    assert {count_rows(request) for request in queue} == {1, 2, 3}
    assert len({len(request.prompt) for request in queue}) > 4
    assert len({len(ids) for ids in rows}) > 4
    mixed = [ids for request, ids in zip(queue, rows) if request.output == "mixed"]
    assert any(form.vocabulary.contains("image", ids).any() for ids in mixed)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_a_queue_equals_plain_loops_whatever_is_drawn_at_a_time(
    form: SequenceFormat, model: Transformer, queue: list[Request], sample_plainly: Callable, batch_size: int
) -> None:
    expected = [sample_plainly(request, SETTINGS) for request in queue]
    generator = SequenceGenerator(model, form, batch_size)
    assert [ids.tolist() for ids in generator.generate(queue, SETTINGS)] == expected
    assert [ids.tolist() for ids in generator.generate(queue[::-1], SETTINGS)] == expected[::-1]


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_pieces_together_are_the_samples_and_the_last_of_each_is_marked(
    form: SequenceFormat, model: Transformer, queue: list[Request], batch_size: int, chunk: int
) -> None:
    generator = SequenceGenerator(model, form, batch_size)
    pieces: list[list[np.ndarray]] = [[] for _ in queue]
    finished: list[int] = []
    for progress in generator.stream(queue, SETTINGS, chunk=chunk):
        assert progress.number not in finished
        assert 1 <= len(progress.ids) <= chunk
        pieces[progress.number].append(progress.ids)
        finished += [progress.number] * progress.finished
    assert sorted(finished) == list(range(len(queue)))
    expected = [ids.tolist() for ids in generator.generate(queue, SETTINGS)]
    assert [np.concatenate(some).tolist() for some in pieces] == expected


def test_a_picture_comes_whole_where_no_chunk_is_asked_for(form: SequenceFormat, model: Transformer) -> None:
    generator = SequenceGenerator(model, form)
    request = generator.request(form.spell_prompt(Document([Text("abc")]), "image"), 0, "image")
    sizes = [len(progress.ids) for progress in generator.stream([request])]
    assert sizes == [1, LENGTH - 1] + [1] * (form.blocks["image"].close_id is not None)


def record_steps(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Rows of every forward of the network: where prompts are read, and where a step is taken."""
    read, stepped, hidden = [], [], model.hidden

    def record(tokens: torch.Tensor, positions: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        (read if positions is None else stepped).append(len(tokens))
        return hidden(tokens, positions, **options)

    monkeypatch.setattr(model, "hidden", record)
    return read, stepped


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_no_row_of_an_empty_slot_is_computed(
    form: SequenceFormat,
    model: Transformer,
    queue: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    _, stepped = record_steps(model, monkeypatch)
    found = SequenceGenerator(model, form, batch_size).generate(queue, SETTINGS)
    assert sum(stepped) == sum(len(ids) * count_rows(request) for ids, request in zip(found, queue))
    if batch_size == 1:
        assert stepped == [count_rows(request) for ids, request in zip(found, queue) for _ in ids]
    if batch_size == 64:  # all begin together, and one after the other ends
        assert stepped == sorted(stepped, reverse=True)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_where_a_sample_ends_the_next_begins(
    form: SequenceFormat,
    model: Transformer,
    queue: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    left, busy, advance = [len(queue)], [], Engine.advance

    def record(engine: Engine) -> list[Progress]:
        busy.append((len(engine), min(batch_size, left[-1])))
        progress = advance(engine)
        left.append(left[-1] - sum(one.finished for one in progress))
        return progress

    monkeypatch.setattr(Engine, "advance", record)
    SequenceGenerator(model, form, batch_size).generate(queue, SETTINGS)
    assert [drawn for drawn, _ in busy] == [expected for _, expected in busy]
    assert left[-1] == 0


def test_equal_prompts_are_read_once(
    form: SequenceFormat, model: Transformer, monkeypatch: pytest.MonkeyPatch, sample_plainly: Callable
) -> None:
    prompts = [form.spell_prompt(Document([Text(text)]), "image") for text in ("abc", "j")]
    masked = form.spell_prompt(Document([Mask(0)]), "image")
    generator, requests = SequenceGenerator(model, form), []
    for seed in range(8):
        weight, streams = build_streams(Guidance(text_scale=2.0), prompts[seed % 2], masked, masked)
        requests.append(generator.request(prompts[seed % 2], seed, "image", weight=weight, streams=streams))
    with monkeypatch.context() as patch:
        read, _ = record_steps(model, patch)
        found = generator.generate(requests)
    assert read == [3]
    assert [ids.tolist() for ids in found] == [sample_plainly(request, {}) for request in requests]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_within_pictures_only_the_codebook_is_computed_also_beside_text(
    form: SequenceFormat,
    model: Transformer,
    queue: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    computed, logits, codes = Counter(), model.logits, form.vocabulary.ids("image")

    def record(hidden: torch.Tensor, ids: slice | None = None) -> torch.Tensor:
        computed[None if ids in (None, slice(0, None)) else (ids.start, ids.stop)] += len(hidden)
        return logits(hidden, ids)

    monkeypatch.setattr(model, "logits", record)
    found = SequenceGenerator(model, form, batch_size).generate(queue, SETTINGS)
    modalities = [find_modalities(form, *pair) for pair in zip(queue, found)]
    of_codes = [count_rows(request) * some.count("image") for request, some in zip(queue, modalities)]
    assert computed[codes.start, codes.stop] == sum(of_codes)  # with all rows of the guidance
    assert computed[None] == sum(some.count(None) for some in modalities)  # with the whole prompt alone
    assert len(computed) == 2


def find_modalities(form: SequenceFormat, request: Request, drawn: np.ndarray) -> list[str | None]:
    """Of which modality each token had to be; None where there was a choice."""
    if request.known is not None:
        return [request.output] * len(drawn)
    grammar, found = Grammar(form, request.output, form.vocabulary.size), []
    state = grammar.start([request.prompt], [request.room])
    for token in drawn:
        found.append(grammar.modality_at(int(state.nodes)))
        state = grammar.advance(state, torch.tensor([token]))
    return found


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_pictures_is_looked_at_where_they_begin_and_end(
    form: SequenceFormat, model: Transformer, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    looks, look = [], Engine._look
    monkeypatch.setattr(Engine, "_look", lambda engine: looks.append(len(engine)) or look(engine))
    generator = SequenceGenerator(model, form)
    prompts = [form.spell_prompt(Document([Text("abcde"[: row + 1])]), "image") for row in range(count)]
    generator.generate([generator.request(prompt, 0, "image") for prompt in prompts])
    assert looks == [count] * (2 + (form.blocks["image"].close_id is not None))


def test_nothing_is_drawn_where_one_of_a_queue_can_not_be(
    form: SequenceFormat, model: Transformer, queue: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, stepped = record_steps(model, monkeypatch)
    generator = SequenceGenerator(model, form, 2)
    short = generator.request(form.spell_prompt(Document([Text("abc")]), "image"), 0, "image", max_new_tokens=3)
    with pytest.raises(SequenceError, match=r"prompt 4 has .* too few for the output 'image'"):
        generator.generate([*queue[:4], short])
    assert read == stepped == []
