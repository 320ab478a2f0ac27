"""Streams of a sample, their weights, and what is made of their logits, against formulas and plain loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import NO_GUIDANCE, Guidance, build_streams, contrast, mix, steer
from mixmodal.sampling.rules import TokenSampling

LENGTH = 6
GREEDY = {"image": TokenSampling(temperature=0)}
WHOLE, PICTURES, NOTHING = np.array([0, 30, 4, 21]), np.array([0, 4, 21]), np.array([0, 21])
BOTH = Guidance(text_scale=3.0, image_scale=1.2)


@pytest.fixture
def three(form: SequenceFormat, image: Image) -> list[np.ndarray]:
    """One prompt as f, i and u: whole, its picture alone, and neither."""
    documents = [[Text("ab"), image, Text("cdefg")], [image], []]
    return [form.spell_prompt(Document(parts), "image") for parts in documents]


@pytest.mark.parametrize(
    ("scales", "prompts", "rows"),
    [
        ((1.0, 1.0), (WHOLE, PICTURES, NOTHING), [WHOLE]),
        ((3.0, 1.2), (WHOLE, NOTHING, NOTHING), [WHOLE, NOTHING]),  # no pictures
        ((1.0, 1.2), (WHOLE, NOTHING, NOTHING), [WHOLE]),
        ((3.0, 1.2), (PICTURES, PICTURES, NOTHING), [PICTURES, NOTHING]),  # no text
        ((3.0, 1.2), (NOTHING, NOTHING, NOTHING), [NOTHING]),
        ((3.0, 1.0), (WHOLE, PICTURES, NOTHING), [WHOLE, PICTURES]),
        ((3.0, 3.0), (WHOLE, PICTURES, NOTHING), [WHOLE, NOTHING]),
        ((3.0, 1.2), (WHOLE, PICTURES, NOTHING), [WHOLE, PICTURES, NOTHING]),
        ((1.0, 1.2), (WHOLE, PICTURES, NOTHING), [WHOLE, PICTURES, NOTHING]),
    ],
)
def test_only_rows_that_have_a_weight_are_computed(
    scales: tuple[float, float], prompts: tuple[np.ndarray, ...], rows: list[np.ndarray]
) -> None:
    weight, streams = build_streams(Guidance(text_scale=scales[0], image_scale=scales[1]), *prompts)
    assert [prompts[0].tolist(), *(stream.prompt.tolist() for stream in streams)] == [row.tolist() for row in rows]
    weights = torch.tensor([weight, *(stream.weight for stream in streams)])
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)  # worst seen 0
    # equal prompts have equal logits: the rows that are left give what all three would
    torch.manual_seed(0)
    logits = {prompt.tobytes(): torch.randn(1, 5) for prompt in prompts}
    f, i, u = (logits[prompt.tobytes()] for prompt in prompts)
    expected = u + scales[1] * (i - u) + scales[0] * (f - i)
    found = mix(torch.stack([logits[row.tobytes()] for row in rows]), weights[:, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # worst seen 5e-7


@pytest.mark.parametrize("unconditional", ["mask", "drop"])
def test_contrast_takes_the_whole_prompt_and_the_one_without_text(unconditional: str) -> None:
    guidance = Guidance(contrast_k=3, unconditional=unconditional)
    weight, (stream,) = build_streams(guidance, WHOLE, PICTURES, NOTHING)
    assert (weight, stream.weight) == (1, -1)
    assert stream.prompt is PICTURES


def test_each_sample_is_mixed_by_its_own_weights() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 3, 7), torch.tensor([[1.0, 3.0, 0.5], [0.0, -2.0, 0.5]])
    for row in range(3):
        alone = weights[0, row] * logits[0, row] + weights[1, row] * logits[1, row]
        torch.testing.assert_close(mix(logits, weights)[row], alone)


def test_guidance_moves_from_unconditional_to_conditional_and_beyond() -> None:
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    for scale, expected in ((0.0, [3.0, 5.0]), (1.0, [1.0, 2.0]), (3.0, [-3.0, -4.0])):
        weights = torch.tensor([[scale], [1 - scale]])
        assert steer(NO_GUIDANCE, torch.stack((conditional, unconditional)), weights).tolist() == [expected]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def contrast_plainly(expert: np.ndarray, amateur: np.ndarray, k: int, alpha: float) -> np.ndarray:
    """Equations 3 and 4 of CM3Leon for one sample, logits `(C,)`."""
    likely, unlikely = log_softmax(expert), log_softmax(amateur)
    kth = np.sort(np.exp(likely))[::-1][min(k, len(likely)) - 1]
    plausible = np.exp(likely) >= alpha * kth
    return np.where(plausible, likely - unlikely, -np.inf)


@pytest.mark.parametrize("k", [1, 3, 12, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
def test_contrastive_decoding_follows_its_formula(k: int, alpha: float) -> None:
    expert, amateur = np.random.default_rng(0).normal(size=(2, 20, 12)) * 2
    found = contrast(torch.from_numpy(expert), torch.from_numpy(amateur), k, alpha)
    expected = np.stack([contrast_plainly(*pair, k, alpha) for pair in zip(expert, amateur)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12, rtol=0)  # worst seen 2e-15
    if alpha == 0:
        assert found.isfinite().all()
    if alpha == 1:
        assert (found.isfinite().sum(dim=1) == min(k, 12)).all()
    single = contrast(torch.from_numpy(expert).float(), torch.from_numpy(amateur).float(), k, alpha)
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5, rtol=0)  # worst seen 9e-7


def test_contrast_with_k_of_one_is_ordinary_contrastive_decoding() -> None:
    expert, amateur = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likely, unlikely = expert.softmax(dim=1), amateur.softmax(dim=1)
    plausible = likely >= 0.2 * likely.amax(dim=1, keepdim=True)  # arXiv 2210.15097, equation 4
    expected = (likely.log() - unlikely.log()).masked_fill(~plausible, -torch.inf)
    torch.testing.assert_close(contrast(expert, amateur, 1, 0.2), expected, atol=1e-12, rtol=0)  # worst seen 2e-15


@pytest.mark.parametrize(("text_scale", "image_scale"), [(3.0, 1.2), (1.0, 4.0), (-1.0, 2.5)])
def test_greedy_codes_with_both_scales_equal_a_loop_without_cache(
    form: SequenceFormat,
    model: Transformer,
    last_logits: Callable[[np.ndarray], torch.Tensor],
    three: list[np.ndarray],
    text_scale: float,
    image_scale: float,
) -> None:
    guidance = Guidance(text_scale=text_scale, image_scale=image_scale)
    weight, streams = build_streams(guidance, *three)
    assert len(streams) == 2
    generator, codes = SequenceGenerator(model, form), form.vocabulary.ids("image")
    request = generator.request(three[0], 0, "image", weight=weight, streams=streams)
    (found,) = generator.generate([request], GREEDY, guidance)
    plain = generator.generate([generator.request(three[0], 0, "image")], GREEDY)
    rows, expected = three, []
    for _ in range(LENGTH):
        f, i, u = (last_logits(row) for row in rows)
        logits = u + image_scale * (i - u) + text_scale * (f - i)
        expected.append(codes.start + int(logits[codes.start : codes.stop].argmax()))
        rows = [np.append(row, expected[-1]) for row in rows]
    assert found[:LENGTH].tolist() == expected != plain[0][:LENGTH].tolist()


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (4, 0.3), (4, 0.0)])
def test_greedy_contrastive_codes_equal_a_loop_without_cache(
    form: SequenceFormat,
    model: Transformer,
    last_logits: Callable[[np.ndarray], torch.Tensor],
    three: list[np.ndarray],
    k: int,
    alpha: float,
) -> None:
    guidance = Guidance(contrast_k=k, contrast_alpha=alpha)
    weight, streams = build_streams(guidance, *three)
    generator, codes = SequenceGenerator(model, form), form.vocabulary.ids("image")
    request = generator.request(three[0], 0, "image", weight=weight, streams=streams)
    (found,) = generator.generate([request], GREEDY, guidance)
    rows, expected = three[:2], []
    for _ in range(LENGTH):
        expert, amateur = (last_logits(row)[codes.start : codes.stop].double().numpy() for row in rows)
        expected.append(codes.start + int(contrast_plainly(expert, amateur, k, alpha).argmax()))
        rows = [np.append(row, expected[-1]) for row in rows]
    assert found[:LENGTH].tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_scale": float("nan")}, "text_scale is nan"),
        ({"image_scale": float("inf")}, "image_scale is inf"),
        ({"text_scale": 2.0, "unconditional": "blank"}, "choose mask or drop"),
        ({"contrast_k": -1}, "contrast_k is -1"),
        ({"contrast_k": 1, "contrast_alpha": 1.1}, "contrast_alpha 1.1"),
        ({"contrast_k": 1, "text_scale": 2.0}, "takes the place of the scales"),
        ({"contrast_k": 1, "image_scale": 2.0}, "takes the place of the scales"),
        ({"contrast_alpha": 0.3}, "contrast_alpha can not act without contrast_k"),
        ({"unconditional": "drop"}, "unconditional can not act"),
    ],
)
def test_guidance_that_can_not_act_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_guidance_acts_where_a_sample_has_more_than_one_row() -> None:
    assert not NO_GUIDANCE.acts
    assert all(one.acts for one in (BOTH, Guidance(text_scale=2.0), Guidance(image_scale=2.0), Guidance(contrast_k=1)))
