"""The batched sampler against plain loops: nothing around a sample changes it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, Mask, SequenceError, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling import engine as module
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.guidance import Stream
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6
GREEDY = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}
SETTINGS = {"text": TokenSampling(temperature=0.8, top_p=0.9), "image": TokenSampling(top_k=9)}
Ask = Callable[..., list[Request]]


@pytest.mark.parametrize("output", ["text", "image", "mixed"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], image: Image, ask: Ask, output: str
) -> None:
    generator = SequenceGenerator(model, form)
    if output != "image":
        prompts = [form.spell_prompt(Document(parts), "text") for parts in ([Text("abc")], [image], [])]
    requests = ask(generator, prompts, output, max_new_tokens=20)
    together = generator.generate(requests, SETTINGS)
    backwards = generator.generate(requests[::-1], SETTINGS)[::-1]
    for row, request in enumerate(requests):
        (alone,) = generator.generate([request], SETTINGS)
        assert alone.tolist() == together[row].tolist() == backwards[row].tolist()
        assert 0 < len(alone) <= 20


def test_a_guided_sample_does_not_depend_on_the_batch(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask
) -> None:
    generator = SequenceGenerator(model, form)
    requests = ask(generator, prompts, seeds=[7, 8, 9, 10], scale=3.0)
    together = generator.generate(requests)
    for row, request in enumerate(requests):
        (alone,) = generator.generate([request])
        assert alone.tolist() == together[row].tolist()


def test_the_seed_decides_the_sample(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask
) -> None:
    generator = SequenceGenerator(model, form)
    same = generator.generate(ask(generator, [prompts[0]] * 20, seeds=[*range(19), 0]))
    assert same[0].tolist() == same[-1].tolist()
    assert len({tuple(ids) for ids in same}) > 15


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "norm_placement": "post_sublayer"}, {"position": "learned"}]
)
def test_greedy_output_equals_a_loop_without_cache(
    form: SequenceFormat,
    build_model: Callable[..., Transformer],
    prompts: list[np.ndarray],
    ask: Ask,
    options: dict[str, object],
    scale: float,
) -> None:
    model, masked = build_model(**options), form.spell_prompt(Document([Mask(0)]), "image")
    generator = SequenceGenerator(model, form)
    found = generator.generate(ask(generator, prompts, scale=scale), GREEDY)
    codes = slice(*(getattr(form.vocabulary.ids("image"), end) for end in ("start", "stop")))
    for prompt, ids in zip(prompts, found):
        conditional, unconditional, expected = prompt, masked, []
        for _ in range(LENGTH):
            with torch.no_grad():
                rows = [model(torch.from_numpy(one)[None])[0, -1] for one in (unconditional, conditional)]
            logits = rows[0] + scale * (rows[1] - rows[0])
            expected.append(int(logits[codes].argmax()) + codes.start)
            conditional = np.append(conditional, expected[-1])
            unconditional = np.append(unconditional, expected[-1])
        assert ids[:LENGTH].tolist() == expected


def test_greedy_text_equals_a_loop_without_cache(
    form: SequenceFormat, model: Transformer, last_logits: Callable[[np.ndarray], torch.Tensor], image: Image, ask: Ask
) -> None:
    prompt, generator = form.spell_prompt(Document([image]), "text"), SequenceGenerator(model, form)
    (found,) = generator.generate(ask(generator, [prompt], "text", max_new_tokens=9), GREEDY)
    grammar = Grammar(form, "text", form.vocabulary.size)
    state, ids = grammar.start([prompt], [9]), prompt
    while grammar.live(state).any():
        token = last_logits(ids).masked_fill(~grammar.legal(state)[0], -torch.inf).argmax()
        ids, state = np.append(ids, int(token)), grammar.advance(state, token[None])
    assert found.tolist() == ids[len(prompt) :].tolist()


def test_cached_hidden_states_equal_uncached(
    form: SequenceFormat,
    model: Transformer,
    prompts: list[np.ndarray],
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, hidden = [], model.hidden

    def record(tokens: torch.Tensor, positions: torch.Tensor | None = None, **options: object) -> torch.Tensor:
        found = hidden(tokens, positions, **options)
        if positions is not None:  # a step; prompts are read without
            steps.append(found[:, 0])
        return found

    generator = SequenceGenerator(model, form)
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", record)
        rows = generator.generate(ask(generator, prompts))
    for row, (prompt, drawn) in enumerate(zip(prompts, rows)):
        assert len(steps) == len(drawn)
        ids = torch.from_numpy(np.concatenate([prompt, drawn[:-1]]))[None]
        expected = model.hidden(ids)[0, len(prompt) - 1 :]
        found = torch.stack([step[row] for step in steps])
        torch.testing.assert_close(model.logits(found), model.logits(expected), atol=3e-5, rtol=0)  # worst seen 3e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_image_has_exactly_its_codes(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask, temperature: float
) -> None:
    sampling, generator = {"image": TokenSampling(temperature=temperature)}, SequenceGenerator(model, form)
    rows = generator.generate(ask(generator, prompts * 5), sampling)
    for prompt, ids in zip(prompts * 5, rows):
        document = form.parse(np.concatenate([prompt, ids, [form.vocabulary.eos]]))
        assert isinstance(document.parts[-1], Image)


def test_mixed_samples_stay_in_the_context_and_parse(
    form: SequenceFormat, build_model: Callable[..., Transformer], ask: Ask
) -> None:
    generator = SequenceGenerator(build_model(max_seq_len=24, position="learned"), form)
    prompts = [form.spell_prompt(Document(parts), None) for parts in ([Text("abcdefghij")], [], [Text("a")])] * 8
    modalities = []
    for prompt, ids in zip(prompts, generator.generate(ask(generator, prompts, "mixed"))):
        assert len(prompt) + len(ids) <= 24
        end = [] if ids[-1] == form.vocabulary.eos else [form.vocabulary.eos]
        modalities += [part.modality for part in form.parse(np.concatenate([prompt, ids, end])).parts]
    assert {"text", "image"} == set(modalities)


def test_guidance_scale_one_equals_no_guidance(
    form: SequenceFormat,
    model: Transformer,
    prompts: list[np.ndarray],
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = SequenceGenerator(model, form)
    plain, almost, strong = (generator.generate(ask(generator, prompts, scale=scale)) for scale in (1.0, 1 + 1e-9, 4.0))
    assert [ids.tolist() for ids in plain] == [ids.tolist() for ids in almost] != [ids.tolist() for ids in strong]
    assert all(len(request.streams) == 1 for request in ask(generator, prompts, scale=1 + 1e-9))
    monkeypatch.setattr(module, "steer", None)  # at scale 1 there is no second row to guide with
    generator.generate(ask(generator, prompts, scale=1.0))


def test_text_in_a_mixed_sample_is_not_guided(form: SequenceFormat, model: Transformer, ask: Ask) -> None:
    prompt, generator = form.spell_prompt(Document([Text("abc")]), None), SequenceGenerator(model, form)
    plain, guided = (  # no picture fits
        generator.generate(ask(generator, [prompt], "mixed", scale=scale, max_new_tokens=5), GREEDY)
        for scale in (1.0, 9.0)
    )
    assert plain[0].tolist() == guided[0].tolist()


def test_a_long_row_leaves_a_short_one_alone(form: SequenceFormat, model: Transformer, ask: Ask) -> None:
    short, long = (form.spell_prompt(Document([Text(text)]), "text") for text in ("a", "abcdefghij" * 3))
    generator = SequenceGenerator(model, form)
    requests = ask(generator, [short, long], "text")
    rows = generator.generate(requests, SETTINGS)
    (alone,) = generator.generate(requests[:1], SETTINGS)
    assert rows[0].tolist() == alone.tolist()
    assert len(long) + len(rows[1]) <= model.config.max_seq_len


def test_no_requests_give_no_samples(form: SequenceFormat, model: Transformer) -> None:
    assert SequenceGenerator(model, form).generate([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "text", "streams": [Stream(np.array([0]), 1.0)]}, "leave it out for the output 'text'"),
        ({"output": "image", "max_new_tokens": 3}, "too few for the output 'image'"),
        ({"output": "picture"}, "'picture' is unknown; choose text, image, mixed"),
    ],
)
def test_requests_that_can_not_be_drawn_are_refused(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], options: dict, message: str
) -> None:
    generator = SequenceGenerator(model, form)
    with pytest.raises(ValueError, match=message):
        generator.generate([generator.request(prompts[0], 0, **options)])


def test_settings_of_an_unknown_modality_are_refused(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], ask: Ask
) -> None:
    generator = SequenceGenerator(model, form)
    with pytest.raises(ValueError, match="settings for sound; the model has text, image"):
        generator.generate(ask(generator, prompts), {"sound": TokenSampling()})


def test_a_prompt_as_long_as_the_context_is_refused(form: SequenceFormat, model: Transformer, ask: Ask) -> None:
    model.config, generator = replace(model.config, max_seq_len=4), SequenceGenerator(model, form)
    with pytest.raises(SequenceError, match="has 4 tokens and 0 may follow it"):
        generator.generate(ask(generator, [form.spell_prompt(Document([Text("abc")]), "text")], "text"))


def test_the_rows_of_guidance_must_fit_into_the_context_too(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], image: Image
) -> None:
    long = form.spell_prompt(Document([Mask(0), *[image] * 5, *[Mask(0)] * 5]), "image")
    assert len(prompts[0]) + LENGTH + 1 <= 48 < len(long) + LENGTH
    generator = SequenceGenerator(model, form)
    generator.generate([generator.request(prompts[0], 0, "image")])
    with pytest.raises(SequenceError, match="too few for the output 'image'"):
        generator.generate([generator.request(prompts[0], 0, "image", streams=[Stream(long, 1.0)])])
