"""Ways to keep attention within documents give what the dense mask gives, and cost what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixmodal.models.attention import Attention
from mixmodal.models.packed_rows import AttentionKind, Documents, find_documents, find_pattern
from mixmodal.models.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32)
LEARNED = replace(TINY, norm="layernorm", activation="gelu", position="learned", qk_norm=False, tie_embeddings=True)
VARIANTS = {"chameleon_7b": TINY, "chameleon_34b": replace(TINY, norm_placement="post_sublayer"), "cm3leon": LEARNED}
ROWS = {
    "packed": [[5, 1, 5, 3], [14], [2, 7]],  # lengths of documents; rows of 16 with padding behind
    "full rows": [[16], [16]],
    "one document a row": [[3], [9], [9]],
    "an empty row": [[], [4, 4]],
    "all empty": [[], []],
}


def build_rows(lengths: list[list[int]], length: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, positions that restart, and segment ids, `(B, length)` each."""
    positions, segments = (torch.zeros(len(lengths), length, dtype=torch.long) for _ in range(2))
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes, 1):
            positions[row, start : start + size] = torch.arange(size)
            segments[row, start : start + size] = number
            start += size
    return torch.randint(50, positions.shape), positions, segments


def trained(network: Transformer, kind: AttentionKind, rows: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Hidden states of tokens that are not padding, and gradients of all weights."""
    network.attention_kind = kind
    network.zero_grad()
    hidden = network.hidden(*rows)
    real = hidden[rows[2] != 0]
    real.sin().sum().backward()
    return [real.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["auto", "documents"])
@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_outputs_and_gradients_are_those_of_the_dense_mask(
    kind: AttentionKind, shape: TransformerConfig, lengths: list[list[int]]
) -> None:
    torch.manual_seed(0)
    network, rows = Transformer(replace(shape, init_std=0.2)), build_rows(lengths)
    expected, found = trained(network, "dense", rows), trained(network, kind, rows)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, atol=2e-5 * scale, rtol=0)  # worst seen 1.5e-6


@pytest.mark.slow  # importing FlexAttention takes seconds
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_blocks_that_are_skipped_change_no_output(shape: TransformerConfig) -> None:
    torch.manual_seed(0)
    network, rows = Transformer(replace(shape, init_std=0.2)), build_rows(ROWS["packed"])
    hidden = {}
    for kind in ("dense", "flex"):
        network.attention_kind = kind
        with torch.no_grad():
            hidden[kind] = network.hidden(*rows)
    torch.testing.assert_close(hidden["flex"], hidden["dense"], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="flex, which torch can not train with on the CPU"):
        network.hidden(*rows)


def test_a_document_in_two_pieces_is_still_one() -> None:
    network, (tokens, positions, segments) = Transformer(replace(TINY, init_std=0.2)), build_rows([[4, 4, 4]])
    segments[segments == 3] = 1
    assert find_documents(segments) is None
    rows = (tokens, positions, segments)
    torch.testing.assert_close(trained(network, "documents", rows), trained(network, "dense", rows))


def test_documents_of_one_length_stand_together_and_padding_nowhere() -> None:
    _, positions, segments = build_rows(ROWS["packed"])
    found = find_documents(segments)
    assert found is not None
    assert found.groups == [(1, 1), (1, 2), (1, 3), (2, 5), (1, 7), (1, 14)]
    expected = [0, *range(2), *range(3), *range(5), *range(5), *range(7), *range(14)]
    assert found.gather(positions).tolist() == [expected]
    back = found.scatter(found.gather(segments)[..., None].float(), *segments.shape)
    assert torch.equal(back[..., 0], segments.float())


class Work(TorchDispatchMode):
    """Multiplications of matrix products, and pairs of tokens that attention computes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.products += args[0].numel() * args[1].shape[1]
        if "scaled_dot_product" in str(func):
            self.pairs += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
        return func(*args, **(kwargs or {}))


def test_tokens_of_other_documents_and_padding_cost_nothing() -> None:
    network, rows = Transformer(replace(TINY, max_seq_len=512)), build_rows([[64] * 4, [64] * 2], length=512)
    work = []
    for kind in ("dense", "documents"):
        network.attention_kind = kind
        with Work() as counted:
            network.hidden(*rows)
        work.append(counted)
    dense, documents = work
    assert documents.products * 1024 == dense.products * 384  # tokens that are not padding
    assert dense.pairs == 2 * 2 * 512**2
    assert documents.pairs == 2 * 6 * 64**2


def test_fixed_shapes_are_kept_where_blocks_are_compiled() -> None:
    segments = build_rows(ROWS["packed"])[2]
    assert isinstance(find_pattern(segments, "auto", compiled=False), Documents)
    assert isinstance(find_pattern(segments, "auto", compiled=True), Tensor)


def test_tensors_without_data_stand_for_a_document_a_row() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        segments = torch.ones(2, 16, dtype=torch.long)
        assert find_pattern(segments, "documents", compiled=False) is None
        assert isinstance(find_pattern(segments, "dense", compiled=False), Tensor)


def test_the_index_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    attend = Attention.attend

    def spy(self: Attention, *arguments: object) -> Tensor:
        seen.append(arguments[-1])
        return attend(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Attention, "attend", spy)
    Transformer(TINY).hidden(*build_rows(ROWS["packed"]))
    assert len(seen) == 2
    assert seen[0] is seen[1]
