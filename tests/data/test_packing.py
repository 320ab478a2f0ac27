"""Rows of packed documents, and that a model does not notice the packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.data.packing import Batch, TrainingDocument, build_batch, pack
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.objectives.loss import TokenLosses, token_losses
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=2))
PAD = VOCABULARY.pad


def sample(key: str, length: int) -> TrainingDocument:
    """A document without content of its own: random ids, seeded by its key."""
    rng = np.random.default_rng(sum(map(ord, key)))
    ids = np.concatenate([[0], rng.integers(4, VOCABULARY.size, length - 2), [2]])
    weights = rng.integers(0, 3, length).astype(np.float32) / 2
    return TrainingDocument(key, ids, weights)


@given(lengths=st.lists(st.integers(2, 10), max_size=20))
def test_rows_hold_every_document_once_in_order_and_are_closed_only_when_full(lengths: list[int]) -> None:
    samples = [sample(str(i), length) for i, length in enumerate(lengths)]
    rows = list(pack(samples, 10))
    assert [s.key for row in rows for s in row] == [s.key for s in samples]
    sizes = [sum(len(s.ids) for s in row) for row in rows]
    assert all(0 < size <= 10 for size in sizes)
    assert all(size + len(following[0].ids) > 10 for size, following in zip(sizes, rows[1:]))


def test_a_document_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="document long: 11 tokens do not fit a row of 10"):
        list(pack([sample("long", 11)], 10))


def test_a_row_says_what_stands_where() -> None:
    a = TrainingDocument("a", np.array([0, 7, 2]), np.array([1, 1, 0.5], dtype=np.float32))
    b = TrainingDocument("b", np.array([0, 9, 9, 2]), np.array([1, 0, 1, 1], dtype=np.float32))
    batch = build_batch([[a, b], [], [b]], 9, PAD)
    assert batch.tokens.tolist() == [[0, 7, 2, 0, 9, 9, 2, 1, 1], [1] * 9, [0, 9, 9, 2, 1, 1, 1, 1, 1]]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert batch.loss_weights[0].tolist() == [0, 1, 0.5, 0, 0, 1, 1, 0, 0]
    assert batch.loss_weights[1].sum() == 0
    assert batch.keys == [["a", "b"], [], ["b"]]
    assert (batch.num_documents, batch.num_tokens) == (3, 11)
    assert batch.document_lengths.tolist() == [3, 4, 4]
    assert build_batch([[]], 9, PAD).document_lengths.tolist() == []
    dtypes = [tensor.dtype for tensor in batch[:4]]
    assert dtypes == [torch.int64, torch.int64, torch.int64, torch.float32]


def losses(model: Transformer, batch: Batch) -> TokenLosses:
    logits = model(batch.tokens, batch.positions, batch.segment_ids)
    return token_losses(logits, batch.tokens, batch.segment_ids, batch.loss_weights, VOCABULARY, z_loss_weight=0.1)


@pytest.fixture(scope="module", params=["rope", "learned"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCABULARY.size,
        dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=32,
        max_seq_len=64,
        position=request.param,
        init_std=0.5,
    )
    return Transformer(config)


def gradient(model: Transformer, *batches: Batch) -> tuple[float, float, torch.Tensor]:
    model.zero_grad()
    found = [losses(model, batch) for batch in batches]
    torch.stack([part.objective for part in found]).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return sum(part.objective.item() for part in found), sum(part.weight.item() for part in found), flat


def test_documents_packed_in_a_row_cost_what_they_cost_alone(model: Transformer) -> None:
    a, b = sample("a", 9), sample("b", 12)
    packed = gradient(model, build_batch([[a, b]], 21, PAD))
    alone = gradient(model, build_batch([[a]], 9, PAD), build_batch([[b]], 12, PAD))
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)  # measured 5.9e-8
    assert packed[1] == alone[1] > 0
    torch.testing.assert_close(packed[2], alone[2], rtol=0, atol=1e-4)  # measured 1.2e-5 of 28
    swapped = gradient(model, build_batch([[b, a]], 21, PAD))
    assert swapped[0] == pytest.approx(alone[0], rel=1e-5)  # measured 9.4e-8


def test_padding_and_empty_rows_change_nothing(model: Transformer) -> None:
    rows = [[sample("a", 9), sample("b", 5)], [sample("c", 14)]]
    tight = gradient(model, build_batch(rows, 14, PAD))
    padded = gradient(model, build_batch([*rows, []], 30, PAD))
    assert padded[0] == pytest.approx(tight[0], rel=1e-5)  # measured 0
    assert padded[1] == tight[1]
    torch.testing.assert_close(padded[2], tight[2], rtol=0, atol=1e-4)  # measured 1.2e-5 of 28


def test_without_segments_the_packed_loss_is_another(model: Transformer) -> None:
    batch = build_batch([[sample("a", 9), sample("b", 12)]], 21, PAD)
    logits = model(batch.tokens, batch.positions)
    mixed = token_losses(logits, batch.tokens, batch.segment_ids, batch.loss_weights, VOCABULARY, z_loss_weight=0.1)
    assert mixed.objective.item() != pytest.approx(losses(model, batch).objective.item(), rel=1e-3)
