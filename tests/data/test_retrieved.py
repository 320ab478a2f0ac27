"""Rows of documents with others before them: what stands there, what it weighs, what fits, and that it resumes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.data.mixture import counters
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments
from mixmodal.data.retrieved import Retrieval, RetrievalConfig
from mixmodal.data.source import SourceConfig
from mixmodal.document import Run, build_format
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.retrieval.selection import CM3LEON, Candidates, DrawConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))
FORMATS = ("cm3leon", "chameleon")  # those whose pictures have one grid
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 3)}) for name in FORMATS}
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, poisson_rate=0), VOCABULARY)
MASKED = CausalMasked(CausalMaskedConfig(), VOCABULARY)
TWO = DrawConfig(counts=(2,), queries="all")
RETRIEVAL = RetrievalConfig(memory=Path("memory"), draw=TWO)
CONFIG = DataConfig(
    tokens=Path("shards"),
    candidates=Path("candidates"),
    retrieval=RETRIEVAL,
    seq_len=80,
    image_first_share=0.0,
    caption_dropout=0.0,
)
every_format = pytest.mark.parametrize("name", FORMATS)
NUM = 12


def document(name: str, number: int, variant: int = 0) -> np.ndarray:
    """A pair that tells its number: text pieces of that many, and codes of its variant."""
    text = VOCABULARY.to_ids("text", np.arange(number, number + 1 + number % 4))
    return FORMAT[name].join([Run("text", text), Run("image", np.arange(4, 10)[::-1] + variant)])


class Stored:
    """Documents in memory, for the training stream."""

    def __init__(self, name: str) -> None:
        self.documents = [document(name, number) for number in range(NUM)]
        self.keys = [f"doc{number}#0" for number in range(NUM)]
        self.lengths = np.array([len(ids) for ids in self.documents])

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[index]


class FakeMemory:
    """Two variants of each of the documents, of which the streams know nothing but this."""

    num_variants, digest, folder = 2, "memory", Path("memory")

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys = [f"doc{number}" for number in range(NUM)]

    def length(self, number: int, variant: int = 0) -> int:
        return len(document(self.name, number, variant))

    def __len__(self) -> int:
        return NUM

    def ids(self, number: int, variant: int = 0) -> np.ndarray:
        return document(self.name, number, variant)


class FakeCandidates(list[Candidates]):
    digest = "candidates"


CANDIDATES = FakeCandidates(
    Candidates(np.array([(n + 1) % NUM, (n + 2) % NUM]), np.array([(n + 3) % NUM])) for n in range(NUM)
)


def stream(
    config: DataConfig = CONFIG, name: str = "cm3leon", objective: CausalMasked = PLAIN, **split: Any
) -> PackedDocuments:
    assert config.retrieval
    candidates = None if config.retrieval.random else CANDIDATES
    drawn = Retrieval(FakeMemory(name), candidates, 1, config.retrieval)  # type: ignore[arg-type]
    return PackedDocuments(
        Stored(name), FORMAT[name], objective, config, retrieval={"": drawn}, **{"micro_batch_size": 2, **split}
    )


def segments(batch: Batch) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Number, ids, loss weights and positions of every document with what stands before it."""
    found = []
    for row, keys in enumerate(batch.keys):
        for segment, key in enumerate(keys, start=1):
            inside = batch.segment_ids[row] == segment
            parts = (part[row][inside].numpy() for part in (batch.tokens, batch.loss_weights, batch.positions))
            found.append((int(key.removeprefix("doc").removesuffix("#0")), *parts))
    return found


def taken(packed: PackedDocuments, number: int = 12) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    return [one for batch in islice(packed, number) for one in segments(batch)]


def numbers(ids: np.ndarray) -> list[int]:
    """Of the documents in a chain, by their first text pieces, in order."""
    is_text = VOCABULARY.contains("text", ids)
    starts = np.flatnonzero(is_text & ~np.concatenate([[False], is_text[:-1]]))
    return VOCABULARY.from_ids("text", ids[starts]).tolist()


def variants_in(ids: np.ndarray) -> list[int]:
    """Of the documents in a chain, by their first codes, in order."""
    codes = ids[VOCABULARY.contains("image", ids)]
    return [int(first) - 9 for first in codes[::6]]


def documents_in(name: str, ids: np.ndarray) -> list[np.ndarray]:
    """The whole documents that a chain must be made of."""
    return [document(name, number, variant) for number, variant in zip(numbers(ids), variants_in(ids), strict=True)]


@every_format
def test_candidates_stand_whole_before_their_document_in_one_segment(name: str) -> None:
    seen: set[tuple[int, ...]] = set()
    for number, ids, weights, positions in taken(stream(name=name)):
        found = numbers(ids)
        assert found[-1] == number
        assert len(found) == len(set(found)) == 3
        assert set(found[:-1]) <= set(np.concatenate(CANDIDATES[number]).tolist())
        variants = variants_in(ids)
        assert np.array_equal(ids, FORMAT[name].chain(documents_in(name, ids)))
        assert np.array_equal(positions, np.arange(len(ids)))
        assert np.array_equal(weights, [0] + [1] * (len(ids) - 1))  # CM3Leon: uniform
        seen.add((number, *found[:-1], *variants[:-1]))
    assert len(seen) > 2 * NUM  # which ones, in which order and in which variant is drawn anew in every epoch


@every_format
def test_all_documents_of_a_segment_are_turned_round_alike(name: str) -> None:
    for _, ids, _, _ in taken(stream(replace(CONFIG, image_first_share=1.0), name)):
        inner = ids[1:-1]
        kinds = [run for run in np.split(inner, np.flatnonzero(~VOCABULARY.is_content(inner))) if len(run) > 1]
        assert [bool(VOCABULARY.contains("image", run[-1:])[0]) for run in kinds] == [True, False] * 3


@every_format
def test_a_dropped_caption_is_that_of_the_document_alone(name: str) -> None:
    for _, ids, weights, _ in taken(stream(replace(CONFIG, caption_dropout=1.0), name)):
        masks = np.flatnonzero(ids == VOCABULARY.sentinel(0))
        assert len(masks) == 1
        assert len(numbers(ids)) == 2
        assert masks[0] > np.flatnonzero(VOCABULARY.contains("text", ids)).max()
        assert weights[masks[0]] == 0


@every_format
@pytest.mark.parametrize("image_first", [0.0, 1.0])
def test_retrieved_documents_and_first_parts_weigh_what_the_config_says(name: str, image_first: float) -> None:
    retrieval = replace(RETRIEVAL, loss_weight=0.5)
    config = replace(CONFIG, retrieval=retrieval, first_part_weight=0.25, image_first_share=image_first)
    for _, ids, weights, _ in taken(stream(config, name)):
        content = np.flatnonzero(VOCABULARY.is_content(ids))
        stretches = np.split(content, np.flatnonzero(np.diff(content) > 1) + 1)
        assert len(stretches) == 6
        for stretch, wanted in zip(stretches, [0.125, 0.5, 0.125, 0.5, 0.25, 1.0]):
            assert set(weights[stretch].tolist()) == {wanted}
        assert weights[-1] == 1
        assert weights[stretches[4][0] - 1] in (0.5, 0.25)  # a boundary, or a <break> that opens the picture


@every_format
def test_masks_never_cross_a_document_and_their_weights_go_with_them(name: str) -> None:
    config = replace(CONFIG, seq_len=160, retrieval=replace(RETRIEVAL, loss_weight=0.5))
    masks = 0
    for number, ids, weights, _ in taken(stream(config, name, MASKED)):
        restored = MASKED.restore(ids)
        assert numbers(restored)[-1] == number
        pieces = np.split(ids, np.flatnonzero(VOCABULARY.contains("sentinel", ids)))
        masks += len(pieces) - 1
        assert all(weights[ids == VOCABULARY.sentinel(0)] == 0)
        # each content token weighs as in the document that stands there without masks
        own = len(restored) - len(document(name, number)) + 1
        is_content = np.asarray(VOCABULARY.is_content(restored))
        half = is_content[:own].sum() * 0.5 + is_content[own:].sum()
        assert weights[np.asarray(VOCABULARY.is_content(ids))].sum() == half
    assert masks > 20


def test_what_does_not_fit_is_left_out_whole_and_counted() -> None:
    packed = stream(replace(CONFIG, seq_len=30))
    counts: Counter[int] = Counter()
    for _, ids, _, _ in taken(packed, 24):
        assert np.array_equal(ids, FORMAT["cm3leon"].chain(documents_in("cm3leon", ids)))
        counts[len(numbers(ids)) - 1] += 1
    place = packed.state_dict()["sources"][""]
    assert set(counts) == {0, 1} or set(counts) == {1}
    assert place["left_out"] > 0
    assert place["retrieved"] + place["left_out"] == 2 * place["used"]
    assert place["used"] == counts.total()
    assert place["retrieved"] == sum(count * times for count, times in counts.items())


def test_a_config_can_refuse_what_does_not_fit() -> None:
    packed = stream(replace(CONFIG, seq_len=30, retrieval=replace(RETRIEVAL, overflow="refuse")))
    with pytest.raises(ValueError, match=r"data shards: document doc\d+#0: .* do not fit the \d+ tokens beside it"):
        taken(packed, 24)


@pytest.mark.parametrize("objective", [PLAIN, MASKED])
def test_a_step_trains_on_the_same_rows_however_they_are_spread_and_resumes(objective: CausalMasked) -> None:
    config = replace(CONFIG, caption_dropout=0.2, image_first_share=0.5, lookahead=3)
    whole = stream(config, objective=objective, micro_batch_size=4)
    halves = [stream(config, objective=objective, rank=rank, world_size=2) for rank in range(2)]
    resumed = stream(config, objective=objective, micro_batch_size=4)
    for _ in range(9):
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        batch = next(whole)
        again = next(resumed)
        parts = [next(half) for half in halves]
        assert again.tokens.equal(batch.tokens)
        assert again.loss_weights.equal(batch.loss_weights)
        assert batch.tokens[:2].equal(parts[0].tokens)
        assert batch.tokens[2:].equal(parts[1].tokens)
        assert resumed.state_dict() == whole.state_dict() == halves[0].state_dict() | {"split": [4, 1, 1]}


def test_counts_are_drawn_alike_and_rows_stay_full() -> None:
    counts = [
        len(numbers(one[1])) - 1
        for one in taken(
            stream(replace(CONFIG, retrieval=replace(RETRIEVAL, draw=DrawConfig(counts=(0, 1, 2), queries="all")))), 100
        )
    ]
    assert np.abs(np.bincount(counts, minlength=3) / len(counts) - 1 / 3).max() < 0.06


def test_three_of_the_pool_as_in_cm3leon() -> None:
    config = replace(CONFIG, seq_len=120, retrieval=replace(RETRIEVAL, draw=CM3LEON))
    assert {len(numbers(ids)) for _, ids, _, _ in taken(stream(config))} == {4}


def test_random_documents_come_from_the_whole_memory_but_never_the_own_one() -> None:
    config = replace(CONFIG, candidates=None, retrieval=replace(RETRIEVAL, random=True, draw=DrawConfig(counts=(2,))))
    found: set[tuple[int, int]] = set()
    for number, ids, _, _ in taken(stream(config), 150):
        assert number not in numbers(ids)[:-1]
        found |= {(number, one) for one in numbers(ids)[:-1]}
    assert len(found) > 0.9 * NUM * (NUM - 1)


@pytest.mark.parametrize("random", [False, True])
def test_documents_are_read_in_the_variant_of_their_own(random: bool) -> None:
    draw = DrawConfig(counts=(2,)) if random else TWO
    config = replace(RETRIEVAL, variants="same", random=random, draw=draw)
    drawn = Retrieval(FakeMemory("cm3leon"), None if random else CANDIDATES, 2, config)  # type: ignore[arg-type]
    for index in range(2 * NUM):
        generator = np.random.default_rng(index)
        found = drawn.draw(index, f"doc{index // 2}#{index % 2}", 80, generator)
        assert found.documents
        assert {variant for _, variant in found.documents} == {index % 2}
    with pytest.raises(ValueError, match=r"memory: 2 variants a document, where those .* have 3; .*variants to any"):
        Retrieval(FakeMemory("cm3leon"), CANDIDATES, 3, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["other", None])
def test_another_memory_does_not_go_on_with_a_run(other: str | None) -> None:
    packed = stream()
    state = packed.state_dict()
    state["sources"][""]["retrieval_sha256"] = other
    with pytest.raises(ValueError, match=r"data shards: retrieval_sha256 is .*, but the checkpoint was written with"):
        packed.load_state_dict(state)


def test_a_checkpoint_from_before_there_was_retrieval_goes_on_without() -> None:
    def plain() -> PackedDocuments:
        config = replace(CONFIG, candidates=None, retrieval=None, lookahead=3)
        return PackedDocuments(Stored("cm3leon"), FORMAT["cm3leon"], MASKED, config, micro_batch_size=2)

    packed, resumed = plain(), plain()
    next(packed)
    state = packed.state_dict()
    for key in ("retrieval_sha256", "retrieved", "left_out"):
        del state["sources"][""][key]
    resumed.load_state_dict(state)
    assert next(resumed).tokens.equal(next(packed).tokens)
    assert "retrieved" not in counters(resumed.state_dict())


def test_a_source_with_documents_before_its_own_can_be_left_out_and_added() -> None:
    sources = {name: SourceConfig(tokens=Path(name), candidates=Path("found")) for name in ("one", "two")}
    both = replace(CONFIG, tokens=None, candidates=None, sources=sources, lookahead=4)
    alone = replace(both, sources={"one": sources["one"]})

    def build(config: DataConfig) -> PackedDocuments:
        drawn = Retrieval(FakeMemory("cm3leon"), CANDIDATES, 1, RETRIEVAL)  # type: ignore[arg-type]
        held = {name: Stored("cm3leon") for name in config.sources}
        return PackedDocuments(
            held, FORMAT["cm3leon"], MASKED, config, micro_batch_size=2, retrieval=dict.fromkeys(held, drawn)
        )

    packed, left, again = build(both), build(alone), build(both)
    next(packed)
    state = packed.state_dict()
    assert {name for name, _, _ in state["pending"]} == {"one", "two"}
    left.load_state_dict(state)
    waiting = [drawn.document for drawn in left._pending]
    assert waiting == [document for name, _, document in state["pending"] if name == "one"]
    keys = [key for batch in islice(left, 4) for row in batch.keys for key in row]
    assert {key.split(":")[0] for key in keys} == {"one"}
    assert keys[0] == f"one:doc{waiting[0]}#0"
    again.load_state_dict(left.state_dict())
    assert {key.split(":")[0] for batch in islice(again, 4) for row in batch.keys for key in row} == {"one", "two"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"candidates": None}, "retrieval needs the candidates"),
        ({"retrieval": None}, "candidates can not act without retrieval"),
        ({"retrieval": replace(RETRIEVAL, random=True, draw=DrawConfig())}, "can not act where retrieval.random"),
        (
            {"tokens": None, "sources": {"one": SourceConfig(tokens=Path("one"))}},
            "candidates are those of tokens; give each source its own",
        ),
    ],
)
def test_keys_that_can_not_act_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="loss_weight"):
        replace(RETRIEVAL, loss_weight=-1)
    with pytest.raises(ValueError, match="overflow"):
        replace(RETRIEVAL, overflow="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"draw\.queries can not act"):
        replace(RETRIEVAL, random=True)
    with pytest.raises(ValueError, match="variants"):
        replace(RETRIEVAL, variants="each")  # type: ignore[arg-type]
