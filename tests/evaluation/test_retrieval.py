"""What retrieved documents are worth: against log-probabilities of whole chains, and who is never asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.document import Document, Image, SequenceFormat, Text, build_format
from mixmodal.evaluation.retrieval import Pair, RetrievalAblation, Worth
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline.evaluate_retrieval import read_pairs
from mixmodal.retrieval.selection import Candidates
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

NUM, ROOM = 7, 64


class FakeMemory:
    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents, self.keys = documents, [f"key{number}" for number in range(len(documents))]

    def __len__(self) -> int:
        return len(self.documents)

    def ids(self, number: int, variant: int = 0) -> np.ndarray:
        assert variant == 0
        return self.documents[number]


@pytest.fixture(params=["cm3leon", "chameleon"])
def form(request: pytest.FixtureRequest, letters: Callable[[int], Any]) -> SequenceFormat:
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=10, num_sentinels=6, num_reserved=2)
    return build_format(request.param, Vocabulary(sizes), {"image": (2, 3)}, letters(10))


@pytest.fixture
def pairs(form: SequenceFormat) -> list[Pair]:
    found = []
    for number in range(NUM):
        codes = np.random.default_rng(number).integers(0, 16, (2, 3))
        text = "abcdefghij"[number : number + 1 + number % 3]
        found.append(Pair(number, f"key{number}", form.spell(Document([Text(text), Image(codes)]))))
    return found


@pytest.fixture
def ablation(form: SequenceFormat, pairs: list[Pair]) -> RetrievalAblation:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=form.vocabulary.size, dim=32, num_layers=2, num_heads=4, ffn_dim=64, max_seq_len=ROOM, init_std=0.3
    )
    memory = FakeMemory([pair.ids for pair in pairs])
    candidates = [
        Candidates(np.array([(n + 1) % NUM, (n + 2) % NUM]), np.array([(n + 3) % NUM, (n + 4) % NUM]))
        for n in range(NUM)
    ]
    scorer = SequenceScorer(Transformer(config).eval(), form, batch_size=4)
    return RetrievalAblation(scorer, memory, candidates, ROOM)  # type: ignore[arg-type]


def naive(ablation: RetrievalAblation, pair: Pair, before: list[np.ndarray]) -> float:
    """Nats a token of the pair's last part, over the whole vocabulary."""
    form = ablation.format
    ids = form.chain([*before, pair.ids])
    places = [place for place in range(len(ids)) if form.vocabulary.is_content(ids)[place]]
    places = places[-len(form.split(pair.ids)[-1].ids) :]
    with torch.inference_mode():
        hidden = ablation.scorer.model.hidden(torch.from_numpy(ids)[None])
        table = ablation.scorer.model.logits(hidden)[0].log_softmax(-1)
    return float(-np.mean([table[place - 1, ids[place]].item() for place in places]))


def by_condition(found: list[Worth]) -> dict[tuple[str, int], Worth]:
    return {(one.kind, one.count): one for one in found}


@pytest.mark.parametrize("predicted", ["image", "text"])
def test_nats_are_those_of_whole_chains_with_the_best_document_last(
    ablation: RetrievalAblation, pairs: list[Pair], predicted: str
) -> None:
    form = ablation.format
    pairs = [pair._replace(ids=form.order_pair(pair.ids, text_first=predicted == "image")) for pair in pairs]
    found = by_condition(ablation.measure(pairs, predicted, (0, 1, 2), num_random=2, seed=3))
    assert set(found) == {("retrieved", 0), ("retrieved", 1), ("retrieved", 2), ("random", 1), ("random", 2)}
    alone = []
    for count in range(3):
        wanted = []
        for pair in pairs:
            numbers = [(pair.sample + step) % NUM for step in ((1, 2) if predicted == "image" else (3, 4))][:count]
            documents = [ablation.memory.ids(number) for number in numbers[::-1]]
            before = [form.order_pair(ids, text_first=predicted == "image") for ids in documents]
            wanted.append(naive(ablation, pair, before))
        alone = alone or wanted
        entry = found["retrieved", count]
        less = np.array(alone) - np.array(wanted)
        assert entry.nats_per_token == pytest.approx(np.mean(wanted), abs=1e-5)
        assert entry.nats_less == pytest.approx(less.mean(), abs=1e-5)
        assert entry.nats_less_error == pytest.approx(less.std(ddof=1) / NUM**0.5, abs=1e-5)
        assert (entry.used, entry.num_pairs) == (count, NUM)


@pytest.mark.parametrize("predicted", ["image", "text"])
def test_documents_are_ordered_as_the_pair_is_however_they_are_stored(
    ablation: RetrievalAblation, pairs: list[Pair], predicted: str
) -> None:
    form = ablation.format
    pairs = [pair._replace(ids=form.order_pair(pair.ids, text_first=predicted == "image")) for pair in pairs]
    wanted = ablation.measure(pairs, predicted, (2,), num_random=1, seed=0)
    ablation.memory.documents = [form.turn_pair(ids) for ids in ablation.memory.documents]  # type: ignore[attr-defined]
    assert ablation.measure(pairs, predicted, (2,), num_random=1, seed=0) == wanted


def test_random_documents_are_seeded_and_never_the_own_one(ablation: RetrievalAblation, pairs: list[Pair]) -> None:
    def draw(seed: int) -> list[list[int]]:
        choose = ablation._random(2, seed)
        return [list(choose(pair, draw)) for pair in pairs for draw in range(20)]

    assert draw(0) == draw(0) != draw(1)
    for place, numbers in enumerate(draw(0)):
        assert len(set(numbers)) == 2
        assert place // 20 not in numbers


def test_documents_without_room_are_left_out_whole(ablation: RetrievalAblation, pairs: list[Pair]) -> None:
    ablation.room = 24
    found = by_condition(ablation.measure(pairs, "image", (2,), num_random=1, seed=0))
    assert 0 < found["retrieved", 2].used < 2


def test_the_first_variant_of_every_pair_is_scored(form: SequenceFormat, pairs: list[Pair]) -> None:
    class Shards(list[np.ndarray]):
        num_variants = 2
        keys = ("one#0", "one#1", "text#0", "text#1", "two#0", "two#1")

    lone = form.spell(Document([Text("abc")]))
    shards = Shards([pairs[0].ids, pairs[1].ids, lone, lone, pairs[2].ids, pairs[3].ids])
    left_out: Counter[str] = Counter()
    found = list(read_pairs(shards, form, left_out))  # type: ignore[arg-type]
    assert [(pair.sample, pair.key) for pair in found] == [(0, "one"), (2, "two")]
    assert np.array_equal(found[1].ids, pairs[2].ids)
    assert left_out == {"not pairs": 1}
