"""Tokens that are given: they stand in the sample, and codes are drawn between them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mixmodal.document import Document, SequenceError, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.engine import FREE
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6


@pytest.fixture
def prompt(form: SequenceFormat) -> np.ndarray:
    return form.spell_prompt(Document([Text("abc")]), "image")


def give(form: SequenceFormat, places: list[int], code: int = 7) -> np.ndarray:
    known = np.full(LENGTH, FREE)
    known[places] = form.vocabulary.ids("image").start + code
    return known


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("places", [[0], [5], [1, 2, 4], [0, 1, 2, 3, 4, 5], []])
def test_given_codes_stand_in_the_sample_and_the_others_are_drawn_between_them(
    form: SequenceFormat,
    model: Transformer,
    prompt: np.ndarray,
    sample_plainly: Callable,
    places: list[int],
    temperature: float,
) -> None:
    generator, sampling = SequenceGenerator(model, form), {"image": TokenSampling(temperature=temperature)}
    known, empty = give(form, places), form.spell_prompt(Document([]), "image")
    weight, streams = build_streams(Guidance(text_scale=2.0), prompt, empty, empty)
    requests = [
        generator.request(prompt, 3, "image", known=known),
        generator.request(prompt, 3, "image", known=known, weight=weight, streams=streams),
    ]
    for request, ids in zip(requests, generator.generate(requests, sampling)):
        assert len(ids) == LENGTH
        assert ids[places].tolist() == known[places].tolist()
        assert form.vocabulary.contains("image", ids).all()
        assert ids.tolist() == sample_plainly(request, sampling)


def test_what_is_given_may_be_of_any_kind_behind_any_prompt(
    form: SequenceFormat, model: Transformer, sample_plainly: Callable
) -> None:
    codes, words, vocabulary = form.vocabulary.ids("image"), form.vocabulary.ids("text"), form.vocabulary
    prompt = np.array([0, vocabulary.break_, codes[3], vocabulary.sentinel(0), codes[4], codes[5], vocabulary.eos])
    mask, end = vocabulary.sentinel(0), vocabulary.eos
    known = np.array([mask, FREE, FREE, words[2], vocabulary.break_, FREE, codes[9], FREE, end])
    generator = SequenceGenerator(model, form)
    request = generator.request(prompt, 5, "image", known=known)
    (found,) = generator.generate([request])
    assert found[known != FREE].tolist() == known[known != FREE].tolist()
    assert vocabulary.contains("image", found[known == FREE]).all()
    assert found.tolist() == sample_plainly(request, {})


def test_a_picture_of_which_nothing_is_given_is_the_picture_that_is_drawn_anyway(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray
) -> None:
    generator = SequenceGenerator(model, form)
    free, plain = generator.generate(
        [generator.request(prompt, 0, "image", known=give(form, [])), generator.request(prompt, 0, "image")]
    )
    assert free.tolist() == plain[:LENGTH].tolist()


def test_given_codes_change_what_is_drawn_behind_them_alone(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray
) -> None:
    generator = SequenceGenerator(model, form)
    codes = [give(form, [2], code) for code in range(16)]
    (free,) = generator.generate([generator.request(prompt, 0, "image")])
    found = generator.generate([generator.request(prompt, 0, "image", known=known) for known in codes])
    assert all(ids[:2].tolist() == free[:2].tolist() for ids in found)
    assert len({tuple(ids[3:]) for ids in found}) > 3


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_requests_beside_and_behind_are_unchanged(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray, batch_size: int
) -> None:
    generator = SequenceGenerator(model, form, batch_size)
    plain = [generator.request(prompt, seed, "image") for seed in range(4)]
    plain += [generator.request(form.spell_prompt(Document([]), None), 4, "mixed", max_new_tokens=12)]
    filled = generator.request(prompt, 9, "image", known=give(form, [0, 2, 3]))
    other = generator.request(prompt, 9, "image", known=give(form, [1]))
    expected = [ids.tolist() for ids in generator.generate(plain)]
    found = [ids.tolist() for ids in generator.generate([filled, *plain[:2], other, filled, *plain[2:]])]
    assert [*found[1:3], *found[5:]] == expected
    assert found[0] == found[4]
    assert found[3] == generator.generate([other])[0].tolist()


def test_the_network_is_looked_at_once_for_each_given_sample(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray
) -> None:
    generator = SequenceGenerator(model, form)
    requests = [generator.request(prompt, seed, "image", known=give(form, [1])) for seed in range(3)]
    assert [len(progress.ids) for progress in generator.stream(requests)] == [LENGTH] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "text", "known": np.full(6, FREE)}, "6 tokens are known; .* not 'text'"),
        ({"output": "mixed", "known": np.full(6, FREE)}, "6 tokens are known; .* not 'mixed'"),
        ({"output": "image", "known": np.array([], dtype=np.int64)}, "0 tokens are known"),
    ],
)
def test_tokens_without_a_block_are_refused(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceGenerator(model, form).request(prompt, 0, **options)


def test_tokens_that_do_not_fit_into_the_context_are_refused(
    form: SequenceFormat, model: Transformer, prompt: np.ndarray
) -> None:
    generator, room = SequenceGenerator(model, form), model.config.max_seq_len - len(prompt)
    fits, long = (generator.request(prompt, 0, "image", known=np.full(count, FREE)) for count in (room, room + 1))
    assert len(generator.generate([fits])[0]) == room
    with pytest.raises(SequenceError, match=f"prompt 1: {room + 1} tokens follow it, and {room} fit"):
        generator.generate([fits, long])
