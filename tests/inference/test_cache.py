"""Rows of a cache that are filled, moved and left out continue as if they had been there from the start."""

import pytest
import torch

from mixmodal.models.attention import KVCache
from mixmodal.models.transformer import Transformer

TOLERANCE = {"atol": 3e-5, "rtol": 0}  # worst seen 5e-6

pytestmark = pytest.mark.parametrize("form", ["cm3leon"], indirect=True)  # the network does not know it


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(40, (4, 10), generator=torch.Generator().manual_seed(0))


def fill(model: Transformer, cache: KVCache, rows: torch.Tensor, start: int) -> None:
    """Reads rows `(B, T)` in a cache of their own, and puts them to the rows from `start` on."""
    own = model.build_cache(*rows.shape)
    model.hidden(rows, cache=own)
    cache.put(start, own)


def step(model: Transformer, cache: KVCache, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits `(B, V)` behind one more token of the first rows, `tokens` `(B,)`."""
    cache.used = max(lengths)
    positions = torch.tensor(lengths)[: len(tokens), None]
    return model(tokens[:, None], positions, cache=cache)[:, 0]


@torch.no_grad()
def test_rows_that_are_put_into_a_cache_continue(model: Transformer, tokens: torch.Tensor) -> None:
    cache = model.build_cache(4, 12)
    for layer in cache.layers:  # what was there before must not be seen
        layer.keys.fill_(9.0)
        layer.values.fill_(9.0)
    fill(model, cache, tokens[:1, :6], 0)
    fill(model, cache, tokens[1:3, :4], 1)
    fill(model, cache, tokens[3:, :1], 3)
    lengths = [6, 4, 4, 1]
    for _ in range(3):
        found = step(model, cache, tokens[torch.arange(4), lengths], lengths)
        lengths = [length + 1 for length in lengths]
        expected = [model(tokens[row : row + 1, :length])[0, -1] for row, length in enumerate(lengths)]
        torch.testing.assert_close(found, torch.stack(expected), **TOLERANCE)


@torch.no_grad()
def test_put_copies_what_is_used_and_leaves_other_rows_alone(model: Transformer, tokens: torch.Tensor) -> None:
    cache, own = model.build_cache(4, 12), model.build_cache(2, 9)
    model.hidden(tokens[:2, :5], cache=own)
    for layer in own.layers:
        layer.keys[:, :, 5:], layer.values[:, :, 5:] = torch.nan, torch.nan
    cache.put(1, own)
    for kept, given in zip(cache.layers, own.layers):
        for mine, other in zip(kept, given):
            assert mine[1:3, :, :5].tolist() == other[:, :, :5].tolist()
            assert not mine[[0, 3]].any()
            assert not mine[1:3, :, 5:].any()


@torch.no_grad()
def test_a_moved_row_continues_at_its_new_place(model: Transformer, tokens: torch.Tensor) -> None:
    cache, lengths = model.build_cache(4, 12), [6, 6, 6, 4]
    fill(model, cache, tokens[:3, :6], 0)
    fill(model, cache, tokens[3:, :4], 3)
    cache.move(3, 1, 4)
    order, lengths = [0, 3, 2], [6, 4, 6]
    for _ in range(3):
        found = step(model, cache, tokens[order, lengths], lengths)
        lengths = [length + 1 for length in lengths]
        expected = [model(tokens[row : row + 1, :length])[0, -1] for row, length in zip(order, lengths)]
        torch.testing.assert_close(found, torch.stack(expected), **TOLERANCE)


@torch.no_grad()
def test_a_move_copies_the_first_tokens_alone(model: Transformer, tokens: torch.Tensor) -> None:
    cache = model.build_cache(4, 12)
    model.hidden(tokens, cache=cache)
    before = cache.select(torch.arange(4))
    cache.move(2, 0, 7)
    for moved, kept in zip(cache.layers, before.layers):
        for now, then in zip(moved, kept):
            assert now[0, :, :7].tolist() == then[2, :, :7].tolist()
            assert now[0, :, 7:].tolist() == then[0, :, 7:].tolist()
            assert now[1:].tolist() == then[1:].tolist()


@torch.no_grad()
def test_a_step_of_the_first_rows_leaves_the_others_as_they_are(model: Transformer, tokens: torch.Tensor) -> None:
    cache = model.build_cache(4, 12)
    model.hidden(tokens[:, :5], cache=cache)
    before = cache.select(torch.arange(4))
    found = step(model, cache, tokens[:2, 5], [5, 5])
    torch.testing.assert_close(found, model(tokens[:2, :6])[:, -1], **TOLERANCE)
    assert [layer.keys.shape for layer in cache.seen(3)] == [(3, 4, 6, 8)] * 2
    for now, then in zip(cache.layers[1:], before.layers[1:]):
        assert all(one[2:].equal(other[2:]) for one, other in zip(now, then))
