"""Whole documents before a prompt: what a sampler and a scorer make of them equals plain loops over the whole chain."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mixmodal.classification.autoregressive import AutoregressiveClassifier
from mixmodal.classification.likelihoods import ScoredSequence, SequenceScorer
from mixmodal.document import Document, Image, Mask, SequenceError, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6
GREEDY = {"text": TokenSampling(temperature=0), "image": TokenSampling(temperature=0)}
Ask = Callable[..., list[Request]]


@pytest.fixture
def before(form: SequenceFormat, image: Image) -> list[np.ndarray]:
    """For four prompts: two documents, none, one, and one of another order."""
    other = Image(np.full((2, 3), 9))
    pairs = [[Text("hi"), other], [Text("dabei"), image]]
    documents = [form.spell(Document(pair)) for pair in pairs]
    turned = form.spell(Document(pairs[1][::-1]))
    return [form.prefix(some) for some in (documents, [], documents[:1], [turned])]


def short(form: SequenceFormat, image: Image) -> list[np.ndarray]:
    documents = [[Text("abc")], [], [Text("j")], [Text("ab")]]
    return [form.spell_prompt(Document(parts), "image") for parts in documents]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("options", [{}, {"position": "learned", "num_kv_heads": 2}])
def test_greedy_output_equals_a_loop_over_the_whole_chain(
    form: SequenceFormat,
    build_model: Callable[..., Transformer],
    before: list[np.ndarray],
    image: Image,
    ask: Ask,
    scale: float,
    options: dict,
) -> None:
    model, prompts = build_model(**options), short(form, image)
    masked, generator = form.spell_prompt(Document([Mask(0)]), "image"), SequenceGenerator(model, form)
    found = generator.generate(ask(generator, prompts, scale=scale, before=before), GREEDY)
    codes = form.vocabulary.ids("image")
    for prompt, prefix, ids in zip(prompts, before, found):
        conditional, unconditional = (np.concatenate([prefix, row[1:]]) for row in (prompt, masked))
        for token in ids[:LENGTH]:
            with torch.no_grad():
                f, u = (model(torch.from_numpy(row)[None])[0, -1] for row in (conditional, unconditional))
            guided = u + scale * (f - u)
            assert token == codes.start + int(guided[codes.start : codes.stop].argmax())
            conditional, unconditional = np.append(conditional, token), np.append(unconditional, token)
    plain = generator.generate(ask(generator, prompts, scale=scale), GREEDY)
    assert found[1].tolist() == plain[1].tolist()
    assert [ids.tolist() for ids in found] != [ids.tolist() for ids in plain]


def test_greedy_text_equals_a_loop_over_the_whole_chain(
    form: SequenceFormat,
    model: Transformer,
    last_logits: Callable[[np.ndarray], torch.Tensor],
    before: list[np.ndarray],
    image: Image,
    ask: Ask,
) -> None:
    prompt, generator = form.spell_prompt(Document([image]), "text"), SequenceGenerator(model, form)
    (found,) = generator.generate(ask(generator, [prompt], "text", max_new_tokens=9, before=before[3:]), GREEDY)
    grammar = Grammar(form, "text", form.vocabulary.size)
    state, ids = grammar.start([prompt], [9]), np.concatenate([before[3], prompt[1:]])
    start = len(ids)
    while grammar.live(state).any():
        logits = last_logits(ids).masked_fill(~grammar.legal(state)[0], -torch.inf)
        ids, state = np.append(ids, int(logits.argmax())), grammar.advance(state, logits.argmax()[None])
    assert found.tolist() == ids[start:].tolist()


@pytest.mark.parametrize("output", ["image", "mixed"])
def test_a_sample_does_not_depend_on_what_others_have_before_them(
    form: SequenceFormat, model: Transformer, before: list[np.ndarray], image: Image, ask: Ask, output: str
) -> None:
    generator, prompts = SequenceGenerator(model, form), short(form, image)
    if output == "mixed":
        prompts = [form.spell_prompt(Document(parts), None) for parts in ([Text("a")], [], [image], [Text("bc")])]
    requests = ask(generator, prompts, output, before=before)
    together, backwards = generator.generate(requests), generator.generate(requests[::-1])[::-1]
    for row, request in enumerate(requests):
        (alone,) = generator.generate([request])
        assert alone.tolist() == together[row].tolist() == backwards[row].tolist()
        assert len(before[row]) + len(prompts[row]) - 1 + len(alone) <= model.config.max_seq_len
    bare = generator.generate(ask(generator, prompts, output, before=[form.prefix([])] * 4))
    plain = generator.generate(ask(generator, prompts, output))
    assert [ids.tolist() for ids in plain] == [ids.tolist() for ids in bare] != [ids.tolist() for ids in together]


def test_what_does_not_fit_or_is_no_prefix_is_refused(
    form: SequenceFormat, model: Transformer, before: list[np.ndarray], image: Image
) -> None:
    generator, prompt = SequenceGenerator(model, form), short(form, image)[0]
    document = form.spell(Document([Text("abcdefghija"), image]))
    long = form.prefix([document, document])
    assert len(long) + len(prompt) - 1 < 48 < len(long) + len(prompt) - 1 + LENGTH
    message = rf"prompt 0 has {len(prompt)} tokens behind {len(long) - 1} of other documents and \d may follow it"
    with pytest.raises(SequenceError, match=message):
        generator.generate([generator.request(prompt, 0, "image", before=long)])
    for wrong in (document[:-1], document[1:], np.array([], dtype=np.int64)):
        with pytest.raises(SequenceError, match="before a prompt is not what the format's `prefix` gives"):
            generator.request(prompt, 0, "image", before=wrong)


def chain_score(form: SequenceFormat, model: Transformer, ids: np.ndarray, scored: np.ndarray) -> float:
    """The sum over scored tokens from the logits of one plain forward; each token among those of its kind."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None])[0].double()
    total = 0.0
    for place in np.flatnonzero(scored):
        codes = form.vocabulary.ids("image")
        legal = [*codes] if int(ids[place]) in codes else [*form.vocabulary.ids("text"), form.vocabulary.eos]
        row = logits[place - 1]
        total += float(row[int(ids[place])] - row[legal].logsumexp(0))
    return total


def test_a_likelihood_behind_documents_is_that_of_the_whole_chain(
    form: SequenceFormat, model: Transformer, before: list[np.ndarray], image: Image
) -> None:
    pairs = [(Document([Text("abc")]), Document([image])), (Document([image]), Document([Text("cab")]))]
    for prefix in before:
        sequences = [ScoredSequence(*form.spell_continuation(*pair)) for pair in pairs]
        found = SequenceScorer(model, form).score([one.behind(prefix) for one in sequences])
        for place, (ids, scored) in enumerate(sequences):
            chain = np.concatenate([prefix, ids[1:]])
            counted = np.concatenate([np.zeros(len(prefix), bool), scored[1:]])
            assert found.totals[place] == pytest.approx(chain_score(form, model, chain, counted), abs=2e-5)  # seen 2e-6
            assert found.counts[place] == scored.sum()


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_classes_behind_documents_are_scored_as_whole_chains(
    form: SequenceFormat, model: Transformer, before: list[np.ndarray], method: str, batch_size: int
) -> None:
    rng = np.random.default_rng(0)
    images = [Document([Image(rng.integers(0, 16, (2, 3)))]) for _ in range(4)]
    classes = [Document([Text(caption)]) for caption in ("a", "bcd", "ef")]
    scorer = SequenceScorer(model, form, batch_size)
    found = AutoregressiveClassifier(scorer, classes, method).score(images, before).log_likelihoods
    for row, (one, prefix) in enumerate(zip(images, before)):
        for column, text in enumerate(classes):
            pair = (text, one) if method == "image_given_text" else (one, text)
            ids, scored = form.spell_continuation(*pair)
            chain = np.concatenate([prefix, ids[1:]])
            counted = np.concatenate([np.zeros(len(prefix), bool), scored[1:]])
            expected = chain_score(form, model, chain, counted)
            assert found.totals[row, column] == pytest.approx(expected, abs=5e-5)  # worst seen 5e-6
            assert found.counts[row, column] == scored.sum()
    with pytest.raises(ValueError, match="4 pictures need as many sequences before them, not 3"):
        AutoregressiveClassifier(scorer, classes, method).score(images, before[:3])
