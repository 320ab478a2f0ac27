"""Rows for tokens that a text model does not have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixmodal.interop.new_rows import add_rows
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

PIECES, DIM = 300, 16
OWN = {"bos": 1, "eos": 2, "unk": 0}


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(VocabularyConfig(codebook_sizes={"image": 4000}, num_text_pieces=PIECES, num_sentinels=8))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With means and deviations that differ from dimension to dimension."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.linspace(0.1, 1.0, DIM), torch.linspace(-1.0, 1.0, DIM)
    both = [torch.randn(PIECES, DIM, generator=generator) * shape[0] + factor * shape[1] for factor in (1.0, -0.3)]
    return both[0].to(dtype), both[1].to(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_ids(vocabulary: Vocabulary) -> list[int]:
    """Those that are drawn where `OWN` rows are copied."""
    text = vocabulary.ids("text")
    taken = {*text, vocabulary.bos, vocabulary.eos, vocabulary.unk}
    return [id for id in range(vocabulary.size) if id not in taken]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_rows_move_to_the_text_range_bit_for_bit(vocabulary: Vocabulary, dtype: torch.dtype):
    old = weights(dtype)
    new = add_rows(*old, vocabulary, seeded(), OWN)
    text = vocabulary.ids("text")
    for before, after in zip(old, new, strict=True):
        assert after is not None
        assert after.shape == (vocabulary.size, DIM)
        assert after.dtype == dtype
        assert torch.equal(after[text.start : text.stop], before)
        assert torch.equal(after[vocabulary.bos], before[1])
        assert torch.equal(after[vocabulary.eos], before[2])
        assert torch.equal(after[vocabulary.unk], before[0])


def test_new_embedding_rows_have_mean_and_spread_of_the_old(vocabulary: Vocabulary):
    old, output = weights()
    new = add_rows(old, output, vocabulary, seeded(), OWN).embedding[new_ids(vocabulary)]
    error = (new.mean(0) - old.mean(0)).abs() / old.std(0)
    assert error.max() < 0.08  # worst of 20 seeds 0.050
    assert (new.std(0) / old.std(0) - 1).abs().max() < 0.06  # worst of 20 seeds 0.036


def test_new_output_rows_stand_close_to_the_mean(vocabulary: Vocabulary):
    embedding, old = weights()
    output = add_rows(embedding, old, vocabulary, seeded(), OWN).output
    assert output is not None
    new = output[new_ids(vocabulary)]
    assert ((new.mean(0) - old.mean(0)).abs() / old.std(0)).max() < 0.008  # worst of 20 seeds 0.0051
    assert (new.std(0) / old.std(0) * 10 - 1).abs().max() < 0.06  # worst of 20 seeds 0.039


def test_a_new_token_starts_about_as_likely_as_an_average_one(vocabulary: Vocabulary):
    """And each text piece loses at most `log(1 + n / V)` nats, up to the spread of new rows."""
    embedding, old = weights()
    output = add_rows(embedding, old, vocabulary, seeded(), OWN).output
    assert output is not None
    hidden = torch.randn(32, DIM, generator=seeded(1))
    before, after = (hidden @ old.T).double(), (hidden @ output.T).double()
    text, new = vocabulary.ids("text"), after[:, new_ids(vocabulary)]
    assert (new.mean(1) - before.mean(1)).abs().max() < 0.05  # worst of 20 seeds 0.012
    cost = after.logsumexp(1) - before.logsumexp(1)
    bound = math.log(vocabulary.size / len(text))
    assert cost.max() <= bound + 0.05
    assert cost.min() > 0


def test_the_draws_follow_the_generator(vocabulary: Vocabulary):
    old = weights()
    first, again = (add_rows(*old, vocabulary, seeded(3), OWN) for _ in range(2))
    other = add_rows(*old, vocabulary, seeded(4), OWN)
    assert first.output is not None
    assert again.output is not None
    assert torch.equal(first.embedding, again.embedding)
    assert torch.equal(first.output, again.output)
    code = vocabulary.ids("image").start
    assert not torch.equal(first.embedding[code], other.embedding[code])
    assert not torch.equal(first.embedding[code], first.embedding[code + 1])


def test_narrow_weights_are_drawn_in_float32(vocabulary: Vocabulary):
    """What bfloat16 gives is what float32 gives for the same old values, rounded once."""
    narrow = weights(torch.bfloat16)
    wide = tuple(weight.float() for weight in narrow)
    found, expected = add_rows(*narrow, vocabulary, seeded()), add_rows(*wide, vocabulary, seeded())
    assert torch.equal(found.embedding, expected.embedding.bfloat16())


def test_tied_weights_stay_tied_and_spread_as_outputs_do(vocabulary: Vocabulary):
    old = weights()[0]
    found = add_rows(old, None, vocabulary, seeded())
    assert found.output is None
    new = found.embedding[list(vocabulary.ids("image"))]
    assert (new.std(0) / old.std(0) * 10 - 1).abs().max() < 0.05


def test_a_special_token_that_is_not_named_is_drawn(vocabulary: Vocabulary):
    old = weights()
    found = add_rows(*old, vocabulary, seeded(), {"eos": 2})
    assert torch.equal(found.embedding[vocabulary.eos], old[0][2])
    assert not (found.embedding[vocabulary.bos] == old[0]).all(1).any()


def test_what_does_not_fit_is_named(vocabulary: Vocabulary):
    embedding, output = weights()
    with pytest.raises(ValueError, match="299 rows, but the vocabulary 300 text pieces"):
        add_rows(embedding[:-1], output[:-1], vocabulary, seeded())
    with pytest.raises(ValueError, match=r"not the shapes \[\(300, 16\), \(299, 16\)\]"):
        add_rows(embedding, output[:-1], vocabulary, seeded())
    with pytest.raises(ValueError, match="can be copied to 'sep'"):
        add_rows(embedding, output, vocabulary, seeded(), {"sep": 3})
    with pytest.raises(ValueError, match=r"bos can not take row 300 of a base model with rows 0 .. 299"):
        add_rows(embedding, output, vocabulary, seeded(), {"bos": 300})
