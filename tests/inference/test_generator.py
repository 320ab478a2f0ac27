"""The batched sampler against plain loops: nothing around a sample changes it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, Mask, SequenceError, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling import generator as module
from mixmodal.sampling.generator import Decoder, SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.guidance import TokenSampling

LENGTH = 6
GREEDY = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}
SETTINGS = {"text": TokenSampling(temperature=0.8, top_p=0.9), "image": TokenSampling(top_k=9)}


def masked(form: SequenceFormat, count: int) -> list[np.ndarray]:
    return [form.spell_prompt(Document([Mask(0)]), "image")] * count


@pytest.mark.parametrize("output", ["text", "image", "mixed"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], image: Image, output: str
) -> None:
    generator = SequenceGenerator(model, form)
    if output != "image":
        prompts = [form.spell_prompt(Document(parts), "text") for parts in ([Text("abc")], [image], [])]
    seeds = list(range(len(prompts)))
    options = {"output": output, "sampling": SETTINGS, "max_new_tokens": 20}
    together = generator.generate(prompts, seeds, **options)
    backwards = generator.generate(prompts[::-1], seeds[::-1], **options)[::-1]
    for row, (prompt, seed) in enumerate(zip(prompts, seeds)):
        (alone,) = generator.generate([prompt], [seed], **options)
        assert alone.tolist() == together[row].tolist() == backwards[row].tolist()
        assert 0 < len(alone) <= 20


def test_a_guided_sample_does_not_depend_on_the_batch(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray]
) -> None:
    generator, guidance = SequenceGenerator(model, form), masked(form, len(prompts))
    options = {"output": "image", "guidance_scale": 3.0}
    together = generator.generate(prompts, [7, 8, 9, 10], guidance_prompts=guidance, **options)
    for row, seed in enumerate([7, 8, 9, 10]):
        (alone,) = generator.generate([prompts[row]], [seed], guidance_prompts=guidance[:1], **options)
        assert alone.tolist() == together[row].tolist()


def test_the_seed_decides_the_sample(form: SequenceFormat, model: Transformer, prompts: list[np.ndarray]) -> None:
    same = SequenceGenerator(model, form).generate([prompts[0]] * 20, [*range(19), 0], output="image")
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
    options: dict[str, object],
    scale: float,
) -> None:
    model, guidance = build_model(**options), masked(form, len(prompts))
    more = {"guidance_prompts": guidance, "guidance_scale": scale} if scale != 1 else {}
    found = SequenceGenerator(model, form).generate(prompts, [0] * 4, output="image", sampling=GREEDY, **more)
    codes = slice(*(getattr(form.vocabulary.ids("image"), end) for end in ("start", "stop")))
    for prompt, ids in zip(prompts, found):
        conditional, unconditional, expected = prompt, guidance[0], []
        for _ in range(LENGTH):
            with torch.no_grad():
                rows = [model(torch.from_numpy(one)[None])[0, -1] for one in (unconditional, conditional)]
            logits = rows[0] + scale * (rows[1] - rows[0])
            expected.append(int(logits[codes].argmax()) + codes.start)
            conditional = np.append(conditional, expected[-1])
            unconditional = np.append(unconditional, expected[-1])
        assert ids[:LENGTH].tolist() == expected


def test_greedy_text_equals_a_loop_without_cache(form: SequenceFormat, model: Transformer, image: Image) -> None:
    prompt = form.spell_prompt(Document([image]), "text")
    (found,) = SequenceGenerator(model, form).generate([prompt], [0], output="text", sampling=GREEDY, max_new_tokens=9)
    grammar = Grammar(form, "text", form.vocabulary.size)
    state, ids = grammar.start([prompt], [9]), prompt
    while grammar.live(state).any():
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None])[0, -1]
        token = logits.masked_fill(~grammar.legal(state)[0], -torch.inf).argmax()
        ids, state = np.append(ids, int(token)), grammar.advance(state, token[None])
    assert found.tolist() == ids[len(prompt) :].tolist()


def test_cached_hidden_states_equal_uncached(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray]
) -> None:
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(4, 20, (8, len(prompts))))
    decoder, live = Decoder(model, prompts, 8, pad=1), torch.ones(len(prompts), dtype=torch.bool)
    steps = [decoder.advance(None, live)] + [decoder.advance(token, live) for token in tokens]
    for row, prompt in enumerate(prompts):
        ids = torch.cat((torch.from_numpy(prompt), tokens[:, row]))[None]
        expected = model.hidden(ids)[0, len(prompt) - 1 :]
        found = torch.stack([step[row] for step in steps])
        torch.testing.assert_close(model.logits(found), model.logits(expected), atol=3e-5, rtol=0)  # worst seen 3e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_image_has_exactly_its_codes(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], temperature: float
) -> None:
    sampling = {"image": TokenSampling(temperature=temperature)}
    rows = SequenceGenerator(model, form).generate(prompts * 5, list(range(20)), output="image", sampling=sampling)
    for prompt, ids in zip(prompts * 5, rows):
        document = form.parse(np.concatenate([prompt, ids, [form.vocabulary.eos]]))
        assert isinstance(document.parts[-1], Image)


def test_mixed_samples_stay_in_the_context_and_parse(
    form: SequenceFormat, build_model: Callable[..., Transformer]
) -> None:
    model = build_model(max_seq_len=24, position="learned")
    prompts = [form.spell_prompt(Document(parts), None) for parts in ([Text("abcdefghij")], [], [Text("a")])] * 8
    modalities = []
    for prompt, ids in zip(prompts, SequenceGenerator(model, form).generate(prompts, list(range(24)))):
        assert len(prompt) + len(ids) <= 24
        end = [] if ids[-1] == form.vocabulary.eos else [form.vocabulary.eos]
        modalities += [part.modality for part in form.parse(np.concatenate([prompt, ids, end])).parts]
    assert {"text", "image"} == set(modalities)


def test_guidance_scale_one_equals_no_guidance(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, guidance = SequenceGenerator(model, form), masked(form, len(prompts))
    plain = generator.generate(prompts, [1, 2, 3, 4], output="image")
    almost = generator.generate(
        prompts, [1, 2, 3, 4], output="image", guidance_prompts=guidance, guidance_scale=1 + 1e-9
    )
    strong = generator.generate(prompts, [1, 2, 3, 4], output="image", guidance_prompts=guidance, guidance_scale=4.0)
    assert [ids.tolist() for ids in plain] == [ids.tolist() for ids in almost] != [ids.tolist() for ids in strong]
    monkeypatch.setattr(module, "guide", None)  # at scale 1 there is no second row to guide with
    generator.generate(prompts, [1, 2, 3, 4], output="image", guidance_prompts=guidance, guidance_scale=1.0)


def test_text_in_a_mixed_sample_is_not_guided(form: SequenceFormat, model: Transformer) -> None:
    prompt = form.spell_prompt(Document([Text("abc")]), None)
    guidance = form.spell_prompt(Document([Mask(0)]), None)
    options = {"output": "mixed", "sampling": GREEDY, "max_new_tokens": 5}  # no picture fits
    generator = SequenceGenerator(model, form)
    plain = generator.generate([prompt], [0], **options)
    guided = generator.generate([prompt], [0], guidance_prompts=[guidance], guidance_scale=9.0, **options)
    assert plain[0].tolist() == guided[0].tolist()


def test_only_the_codebook_is_computed_within_images(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, looks = [], []
    logits, stretch = model.logits, Grammar.stretch
    monkeypatch.setattr(model, "logits", lambda hidden, ids=None: seen.append(ids) or logits(hidden, ids))
    monkeypatch.setattr(Grammar, "stretch", lambda *state: looks.append(None) or stretch(*state))
    SequenceGenerator(model, form).generate(prompts, [0] * 4, output="image")
    codes = form.vocabulary.ids("image")
    closing = [] if form.blocks["image"].close_id is None else [None]
    assert seen == [slice(codes.start, codes.stop)] * LENGTH + closing
    assert len(looks) == 3 + len(closing)


def test_an_untrained_padding_row_leaves_the_other_rows_alone(form: SequenceFormat, model: Transformer) -> None:
    short, long = (form.spell_prompt(Document([Text(text)]), "text") for text in ("a", "abcdefghij" * 3))
    options = {"output": "text", "sampling": SETTINGS}
    rows = SequenceGenerator(model, form).generate([short, long], [0, 1], **options)
    (alone,) = SequenceGenerator(model, form).generate([short], [0], **options)
    assert rows[0].tolist() == alone.tolist()
    assert len(long) + len(rows[1]) <= model.config.max_seq_len


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0, "output": "text"}, "leave it at 1 for the output 'text'"),
        ({"guidance_scale": 2.0, "output": "image"}, "needs one guidance prompt for each prompt"),
        ({"sampling": {"sound": TokenSampling()}}, "settings for sound"),
        ({"output": "image", "max_new_tokens": 3}, "too few for the output 'image'"),
    ],
)
def test_settings_that_can_not_act_are_refused(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceGenerator(model, form).generate(prompts, [0] * 4, **options)


def test_a_prompt_as_long_as_the_context_is_refused(form: SequenceFormat, model: Transformer) -> None:
    model.config = replace(model.config, max_seq_len=4)
    with pytest.raises(SequenceError, match="has 4 tokens and 0 may follow it"):
        SequenceGenerator(model, form).generate(
            [form.spell_prompt(Document([Text("abc")]), "text")], [0], output="text"
        )


def test_the_row_of_guidance_must_fit_into_the_context_too(
    form: SequenceFormat, model: Transformer, prompts: list[np.ndarray], image: Image
) -> None:
    long = form.spell_prompt(Document([Mask(0), *[image] * 5, *[Mask(0)] * 5]), "image")
    assert len(prompts[0]) + LENGTH + 1 <= 48 < len(long) + LENGTH
    with pytest.raises(SequenceError, match="too few for the output 'image'"):
        SequenceGenerator(model, form).generate(
            prompts[:1], [0], output="image", guidance_prompts=[long], guidance_scale=2.0
        )
