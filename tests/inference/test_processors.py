"""What is drawn from at each step, against plain functions that follow Chameleon's released code, and the penalty."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6  # codes of a picture
PENALTY, TEMPERATURE, TOP_P, TEXT_SCALE, IMAGE_SCALE = 1.2, 0.7, 0.9, 3.0, 1.2  # of Chameleon's `Options`
SAMPLING = {
    "text": TokenSampling(temperature=TEMPERATURE, top_p=TOP_P, repetition_penalty=PENALTY),
    "image": TokenSampling(temperature=TEMPERATURE, top_p=TOP_P),
}
GUIDANCE = Guidance(text_scale=TEXT_SCALE, image_scale=IMAGE_SCALE, unconditional="drop")
LastLogits = Callable[[np.ndarray], torch.Tensor]
chameleon_alone = pytest.mark.parametrize("form", ["chameleon"], indirect=True)


@pytest.fixture
def model(model: Transformer) -> Transformer:
    """A network that is less sure, so that a text does not end at once."""
    with torch.no_grad():
        model.output.weight *= 0.4
    return model


def draw_plainly(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Temperature and top-p among allowed ids, as probabilities `(V,)`."""
    weights = np.where(allowed, np.exp((logits - logits[allowed].max()) / TEMPERATURE), 0.0)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    reached = np.cumsum(probabilities[order])
    kept = order[: int(np.searchsorted(reached, TOP_P)) + 1]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def text_step(form: SequenceFormat, logits: np.ndarray, ids: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Allowed ids, then the repetition penalty, temperature and top-p: probabilities `(V,)`."""
    allowed = form.vocabulary.contains("text", np.arange(len(logits)))
    allowed[form.vocabulary.eos] = True
    allowed[form.vocabulary.break_] = len(ids) + 1 + LENGTH + 1 <= max_seq_len  # a whole picture fits
    logits = logits.copy()
    for token in set(ids.tolist()):
        logits[token] = logits[token] * PENALTY if logits[token] < 0 else logits[token] / PENALTY
    return draw_plainly(logits, allowed)


def image_step(form: SequenceFormat, f: np.ndarray, i: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Guidance by three rows, then codes alone, temperature and top-p: probabilities `(V,)`."""
    logits = u + IMAGE_SCALE * (i - u) + TEXT_SCALE * (f - i)
    return draw_plainly(logits, form.vocabulary.contains("image", np.arange(len(logits))))


def spread(form: SequenceFormat, logits: torch.Tensor) -> np.ndarray:
    """Recorded logits, of all columns or of codes, to probabilities `(V,)`."""
    probabilities, found = np.zeros(form.vocabulary.size), logits.double().softmax(dim=0).numpy()
    if len(found) == len(probabilities):
        return found
    probabilities[list(form.vocabulary.ids("image"))] = found
    return probabilities


def assert_same(form: SequenceFormat, logits: torch.Tensor, expected: np.ndarray) -> None:
    found = spread(form, logits)
    assert (found > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)  # worst seen 9e-7


@chameleon_alone
@pytest.mark.parametrize("seed", range(4))
def test_each_step_of_a_picture_follows_chameleons_table(
    form: SequenceFormat,
    model: Transformer,
    last_logits: LastLogits,
    image: Image,
    drawn_from: list[torch.Tensor],
    seed: int,
) -> None:
    whole = form.spell_prompt(Document([Text("ab"), image, Text("cd")]), "image")
    pictures, nothing = (form.spell_prompt(Document(parts), "image") for parts in ([image], []))
    vocabulary, codes = form.vocabulary, form.vocabulary.contains("image", whole)
    kept = codes | np.isin(whole, [vocabulary.bos, vocabulary.break_, vocabulary.end_of_span])
    assert pictures.tolist() == whole[kept].tolist()
    assert nothing.tolist() == [vocabulary.bos, vocabulary.break_]
    weight, streams = build_streams(GUIDANCE, whole, pictures, nothing)
    generator = SequenceGenerator(model, form)
    request = generator.request(whole, seed, "image", weight=weight, streams=streams)
    (found,) = generator.generate([request], SAMPLING, GUIDANCE)
    assert len(found) == len(drawn_from) == LENGTH + 1
    assert found[-1] == vocabulary.end_of_span
    assert drawn_from[-1].isfinite().nonzero()[:, 0].tolist() == [vocabulary.end_of_span]  # it is forced
    for step in range(LENGTH):
        rows = (np.append(row, found[:step]) for row in (whole, pictures, nothing))
        logits = (last_logits(row).double().numpy() for row in rows)
        assert_same(form, drawn_from[step], image_step(form, *logits))


@chameleon_alone
def test_each_step_of_text_and_pictures_follows_chameleons_table(
    form: SequenceFormat,
    model: Transformer,
    last_logits: LastLogits,
    image: Image,
    drawn_from: list[torch.Tensor],
) -> None:
    documents = [[Text("a"), image, Text("b")], [image], []]
    rows = [form.spell_prompt(Document(parts), "image") for parts in documents]
    weight, streams = build_streams(GUIDANCE, *rows)
    generator, vocabulary, limit = SequenceGenerator(model, form), form.vocabulary, model.config.max_seq_len
    begun, fitted = 0, set()
    for seed in range(5):
        drawn_from.clear()
        request = generator.request(rows[0], seed, "mixed", weight=weight, streams=streams)
        (found,) = generator.generate([request], SAMPLING, GUIDANCE)
        left = LENGTH + 1  # tokens of a picture that must follow
        for step, token in enumerate(found.tolist()):
            ids = [np.append(row, found[:step]) for row in rows]
            if left > 1:
                logits = (last_logits(row).double().numpy() for row in ids)
                assert_same(form, drawn_from[step], image_step(form, *logits))
            elif left == 1:
                assert drawn_from[step].isfinite().nonzero()[:, 0].tolist() == [vocabulary.end_of_span] == [token]
            else:
                expected = text_step(form, last_logits(ids[0]).double().numpy(), ids[0], limit)
                assert_same(form, drawn_from[step], expected)
                fitted.add(len(ids[0]) + LENGTH + 2 <= limit)
            left = LENGTH + 1 if token == vocabulary.break_ else max(left - 1, 0)
            begun += token == vocabulary.break_
        assert found[-1] == vocabulary.eos or len(rows[0]) + len(found) == limit
    assert begun
    assert fitted == {True, False}


@pytest.mark.parametrize("penalised", [(), ("text",), ("image",), ("text", "image")])
def test_the_repetition_penalty_counts_prompt_and_sample_where_the_modality_has_one(
    form: SequenceFormat,
    model: Transformer,
    last_logits: LastLogits,
    image: Image,
    drawn_from: list[torch.Tensor],
    penalised: tuple[str, ...],
) -> None:
    prompt = form.spell_prompt(Document([image, Text("abcd")]), "image")
    generator, codes = SequenceGenerator(model, form), form.vocabulary.ids("image")
    sampling = {name: TokenSampling(repetition_penalty=3.0) for name in penalised}
    modalities = Counter()
    for seed in range(4):
        drawn_from.clear()
        (found,) = generator.generate([generator.request(prompt, seed, "mixed")], sampling)
        for step, logits in enumerate(drawn_from):
            ids = np.append(prompt, found[:step])
            expected, seen = last_logits(ids), torch.from_numpy(np.unique(ids))
            modality = "text" if len(logits) == len(expected) else "image"
            if modality in penalised:
                expected[seen] = torch.where(expected[seen] > 0, expected[seen] / 3, expected[seen] * 3)
            expected = expected if modality == "text" else expected[codes.start : codes.stop]
            drawable = logits.isfinite()
            torch.testing.assert_close(logits[drawable], expected[drawable], atol=5e-5, rtol=0)  # worst seen 4e-6
            modalities[modality] += int(drawable.sum()) > 1
    assert min(modalities["text"], modalities["image"]) > 5
