"""Mixtures of sources: shares of tokens, stages, ends of sources, the same order for every split, exact resumption."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.data.mixture import StageConfig, counters
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments
from mixmodal.data.source import SourceConfig
from mixmodal.data.variation import Variation
from mixmodal.document import Run, build_format
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))
FORMATS = ("cm3leon", "chameleon")  # those whose pictures have one grid
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 3)}) for name in FORMATS}
MASKED = CausalMasked(CausalMaskedConfig(min_masks=0), VOCABULARY)
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, poisson_rate=0), VOCABULARY)
IMAGE = Run("image", np.arange(4, 10))
SEQ_LEN = 60


class Listed:
    """Documents in memory; `read` counts how often each was read."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents
        self.keys = [f"doc{i}" for i in range(len(documents))]
        self.lengths = np.array([len(document) for document in documents])
        self.read: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        self.read[index] += 1
        return self.documents[index]


def text(length: int, seed: int = 0) -> Run:
    pieces = np.random.default_rng((length, seed)).integers(0, 30, length)
    return Run("text", VOCABULARY.to_ids("text", pieces))


def documents(name: str = "cm3leon") -> dict[str, Listed]:
    """Text alone, pairs, and texts with two pictures between them."""
    join = FORMAT[name].join
    return {
        "web": Listed([join([text(20 + i % 17, i)]) for i in range(31)]),
        "pairs": Listed([join([text(1 + i % 5, i), IMAGE]) for i in range(43)]),
        "pages": Listed([join([text(3 + i % 4, i), IMAGE, text(2 + i % 7, i), IMAGE]) for i in range(19)]),
    }


def mixed(weights: Mapping[str, float], when_done: Mapping[str, Any] | None = None, **options: Any) -> DataConfig:
    ends = when_done or {}
    sources = {
        name: SourceConfig(tokens=Path(name), weight=weight, when_done=ends.get(name, "repeat"))
        for name, weight in weights.items()
    }
    return DataConfig(sources=sources, seq_len=SEQ_LEN, **options)


EVEN = mixed({"web": 1, "pairs": 1, "pages": 1})


def stream(config: DataConfig, objective: CausalMasked = MASKED, **options: Any) -> PackedDocuments:
    given = options.pop("documents", None) or documents()
    return PackedDocuments(given, FORMAT["cm3leon"], objective, config, **{"micro_batch_size": 2, **options})


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4])) and one.keys == other.keys


def stack(batches: list[Batch]) -> Batch:
    tensors = (torch.cat(part) for part in zip(*(batch[:4] for batch in batches)))
    return Batch(*tensors, keys=[row for batch in batches for row in batch.keys])


def used(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for row in batch.keys for key in row]


def tokens_by_source(batches: list[Batch]) -> Counter[str]:
    found: Counter[str] = Counter()
    for batch in batches:
        for row, keys in enumerate(batch.keys):
            for segment, key in enumerate(keys, start=1):
                found[key.split(":")[0]] += int((batch.segment_ids[row] == segment).sum())
    return found


# shares


@pytest.mark.parametrize("weights", [{"web": 1, "pairs": 1, "pages": 1}, {"web": 6, "pairs": 3, "pages": 1}])
def test_tokens_are_shared_as_the_weights_say_at_every_moment(weights: dict[str, float]) -> None:
    batches: list[Batch] = []
    for batch in islice(stream(mixed(weights)), 60):
        batches.append(batch)
        found, total = tokens_by_source(batches), sum(weights.values())
        for name, weight in weights.items():
            # the document that is drawn and not yet placed, and one by which a source may be ahead
            assert abs(found[name] - weight / total * found.total()) < 2 * SEQ_LEN  # worst seen: 47
    assert {name: round(found[name] / found.total() * total) for name in weights} == weights


def test_shares_do_not_depend_on_the_size_of_a_source() -> None:
    few = {**documents(), "pairs": Listed(documents()["pairs"].documents[:2])}
    found = tokens_by_source(list(islice(stream(EVEN, documents=few), 60)))
    assert all(count / found.total() == pytest.approx(1 / 3, abs=0.02) for count in found.values())


def test_a_source_has_an_order_of_its_own_whatever_stands_beside_it() -> None:
    orders = []
    for weights in ({"web": 1, "pairs": 1}, {"pairs": 1, "pages": 5}, {"pairs": 2}):
        keys = used(list(islice(stream(mixed(weights), micro_batch_size=8), 30)))
        orders.append([key for key in keys if key.startswith("pairs")][:60])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0][:43]) == sorted(f"pairs:doc{i}" for i in range(43))
    assert orders[0][:17] != orders[0][43:60]


def test_sources_of_the_same_documents_come_in_different_orders() -> None:
    twins = {name: documents()["pairs"] for name in ("one", "other")}
    keys = used(list(islice(stream(mixed({"one": 1, "other": 1}), documents=twins, micro_batch_size=8), 5)))
    one, other = ([key.split(":")[1] for key in keys if key.startswith(f"{name}:")][:30] for name in twins)
    assert len(one) == len(other) == 30
    assert one != other


def test_the_order_in_which_sources_are_written_does_not_matter() -> None:
    turned = replace(EVEN, sources=dict(reversed(EVEN.sources.items())))
    assert all(same(a, b) for a, b in islice(zip(stream(EVEN), stream(turned)), 20))


def test_plain_tokens_are_a_source_without_a_name() -> None:
    config = replace(EVEN, sources={}, tokens=Path("web"))
    plain = used(list(islice(stream(config, documents=documents()["web"]), 20)))
    assert sorted(plain[:31]) == sorted(f"doc{i}" for i in range(31))


# ranks


def test_a_step_trains_on_the_same_rows_however_it_is_spread() -> None:
    stages = (StageConfig(from_step=3, weights={"pages": 3}),)
    config = mixed({"web": 1, "pairs": 2, "pages": 1}, {"web": "drop"}, stages=stages, lookahead=2)
    whole = list(islice(stream(config, micro_batch_size=12), 8))
    for world_size, accum in ((1, 2), (2, 3), (3, 2), (4, 1), (6, 2)):
        split = {"micro_batch_size": 12 // world_size // accum, "grad_accum_steps": accum, "world_size": world_size}
        ranks = [list(islice(stream(config, rank=rank, **split), 8 * accum)) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            parts = [part for rank in ranks for part in rank[accum * step : accum * (step + 1)]]
            assert same(batch, stack(parts)), (world_size, accum, step)


def test_documents_in_the_rows_of_other_ranks_are_not_read() -> None:
    given = documents()
    packed = stream(replace(EVEN, caption_dropout=0.0), documents=given, rank=3, world_size=64)
    drawn = Counter(key for key in used([next(packed)]))
    read = sum((Counter({f"{name}:doc{i}": n for i, n in s.read.items()}) for name, s in given.items()), Counter())
    assert read == drawn
    assert packed.counts["documents"] > 20 * drawn.total()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("objective", [MASKED, PLAIN])
def test_the_length_of_a_document_is_known_before_it_is_varied(name: str, objective: CausalMasked) -> None:
    settings = {"seq_len": 40, "image_first_share": 0.5, "first_part_weight": 1.0}
    mask = Run("text", np.array([VOCABULARY.sentinel(0)]))
    odd = Listed([FORMAT[name].join(parts) for parts in ([text(2), mask, text(2), IMAGE], [IMAGE], [IMAGE, mask])])
    for dropout in (0.0, 0.5):
        variation = Variation(FORMAT[name], objective, caption_dropout=dropout, **settings)
        for source in (*documents(name).values(), odd):
            packed = PackedDocuments(
                source, FORMAT[name], objective, replace(EVEN, sources={}, tokens=Path("x")), micro_batch_size=1
            )
            randomness = packed.sources[""].randomness_of(0)
            for index in range(len(source)):
                varied = variation.vary("", source[index], randomness.of(index))
                assert variation.length(source, index, randomness) == len(varied.ids)


def test_a_document_with_less_content_than_masks_leaves_room() -> None:
    objective = CausalMasked(CausalMaskedConfig(min_masks=9), VOCABULARY)
    short = Listed([FORMAT["cm3leon"].join([text(1, i)]) for i in range(5)])
    config = replace(EVEN, sources={}, tokens=Path("x"))
    batch = next(stream(config, objective, documents=short, micro_batch_size=1))
    assert batch.num_documents == 2  # 3 tokens and 9 masks of 3 tokens are reserved for each
    assert int(batch.num_tokens) == 12


# packing


def test_looking_ahead_fills_rows_and_leaves_no_document_behind() -> None:
    used_tokens = {}
    for lookahead in (0, 8):
        config = mixed({"web": 1, "pairs": 1, "pages": 1}, lookahead=lookahead)
        batches = list(islice(stream(config, PLAIN), 60))
        used_tokens[lookahead] = sum(int(batch.num_tokens) for batch in batches)
        for name in ("web", "pairs"):  # an epoch is drawn in full, and what is passed by begins one of the next rows
            keys = [key for key in used(batches) if key.startswith(name)]
            size = len(documents()[name])
            first = set(keys[: size + lookahead])
            assert len(first) == size
        batch = batches[0]
        assert (batch.positions[batch.segment_ids == 0] == 0).all()
    total = 60 * 2 * SEQ_LEN
    assert used_tokens[0] / total < 0.82 < 0.92 < used_tokens[8] / total  # seen: 0.811 and 0.937


# stages


def test_a_stage_begins_at_its_step_with_its_shares() -> None:
    # Chameleon's second stage: the weights of the first are halved, as new sources of the same weight are added
    config = mixed({"web": 2, "pairs": 1, "pages": 0}, stages=(StageConfig(from_step=20, weights={"pages": 3}),))
    batches = list(islice(stream(config, micro_batch_size=4), 60))
    first, second = tokens_by_source(batches[:20]), tokens_by_source(batches[20:])
    assert set(first) == {"web", "pairs"}
    assert first["web"] / first.total() == pytest.approx(2 / 3, abs=0.02)
    for name, share in {"web": 1 / 3, "pairs": 1 / 6, "pages": 1 / 2}.items():
        assert second[name] / second.total() == pytest.approx(share, abs=0.02)


def test_a_source_that_rested_does_not_catch_up() -> None:
    stages = (StageConfig(from_step=20, weights={"pages": 0}), StageConfig(from_step=40, weights={"pages": 1}))
    batches = list(islice(stream(replace(EVEN, stages=stages), micro_batch_size=4), 50))
    assert set(tokens_by_source(batches[21:40])) == {"web", "pairs"}
    found = tokens_by_source(batches[41:])
    assert found["pages"] / found.total() == pytest.approx(1 / 3, abs=0.05)


# ends


def test_a_source_that_is_done_is_left_out_and_the_others_share() -> None:
    packed = stream(mixed({"web": 2, "pairs": 1, "pages": 1}, {"web": "drop"}), micro_batch_size=8)
    batches = list(islice(packed, 30))
    keys = used(batches)
    assert sorted(key for key in keys if key.startswith("web")) == sorted(f"web:doc{i}" for i in range(31))
    found = tokens_by_source(batches[20:])
    assert found["pairs"] / found.total() == pytest.approx(0.5, abs=0.03)
    assert packed.state_dict()["sources"]["web"]["done"]


def test_a_source_that_stops_ends_training_before_the_step_that_needs_more() -> None:
    packed = stream(mixed({"web": 2, "pairs": 1, "pages": 1}, {"web": "stop"}), micro_batch_size=8)
    batches = list(packed)
    keys = [key for key in used(batches) if key.startswith("web")]
    assert len(keys) == len(set(keys))
    assert 20 < len(keys) <= 31  # seen: 27
    state = packed.state_dict()
    assert state["step"] == len(batches)
    resumed = stream(mixed({"web": 2, "pairs": 1, "pages": 1}, {"web": "stop"}), micro_batch_size=8)
    resumed.load_state_dict(state)
    for ended in (packed, resumed):
        with pytest.raises(StopIteration, match=r"data\.sources\.web \(web\) is done, and its when_done is stop"):
            next(ended)
    assert packed.state_dict() == state


def test_training_ends_where_all_sources_are_dropped() -> None:
    packed = stream(mixed({"web": 1, "pairs": 1}, {"web": "drop", "pairs": "drop"}))
    assert len(used(list(packed))) > 60
    with pytest.raises(StopIteration, match="every source that has a weight is done"):
        next(packed)


# state


def test_a_source_that_was_dropped_comes_back_where_it_is_to_be_repeated() -> None:
    packed = stream(mixed({"web": 1, "pairs": 1}, {"web": "drop"}))
    for _ in range(60):
        next(packed)
    state = packed.state_dict()
    resumed = {}
    for when_done in ("drop", "repeat"):
        resumed[when_done] = stream(mixed({"web": 1, "pairs": 1}, {"web": when_done}))
        resumed[when_done].load_state_dict(state)
    shown = {name: used([next(packed) for _ in range(20)]) for name, packed in resumed.items()}
    assert not any(key.startswith("web") for key in shown["drop"])
    assert any(key.startswith("web") for key in shown["repeat"])


@pytest.mark.parametrize("lookahead", [0, 5])
@pytest.mark.parametrize("taken", range(0, 36, 5))
def test_resuming_gives_exactly_the_batches_that_would_have_come(taken: int, lookahead: int) -> None:
    config = mixed({"web": 1, "pairs": 1, "pages": 0.5}, {"web": "drop"}, lookahead=lookahead)
    config = replace(config, stages=tuple(StageConfig(from_step=s, weights={"pages": s}) for s in (3, 5, 10)))
    split = {"micro_batch_size": 2, "grad_accum_steps": 3, "rank": 1, "world_size": 2}
    given = documents()
    given["pairs"] = Listed([*given["pairs"].documents, FORMAT["cm3leon"].join([text(90)])])
    packed = stream(config, documents=given, **split)
    for _ in range(taken):
        next(packed)
    state = json.loads(json.dumps(packed.state_dict()))
    resumed = stream(config, documents=given, **split)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(12):
        assert same(next(packed), next(resumed))
        assert packed.state_dict() == resumed.state_dict()


def test_a_source_can_be_added_and_taken_out_between_runs(caplog: pytest.LogCaptureFixture) -> None:
    packed = stream(mixed({"web": 1, "pairs": 1}), micro_batch_size=8)
    for _ in range(8):
        next(packed)
    resumed = stream(EVEN, micro_batch_size=8)
    resumed.load_state_dict(packed.state_dict())
    assert "data.sources.pages: new from here on" in caplog.text
    batches = list(islice(resumed, 1, 12))
    found = tokens_by_source(batches)
    assert all(count / found.total() == pytest.approx(1 / 3, abs=0.05) for count in found.values())
    places = resumed.state_dict()["sources"]
    assert places["web"]["used"] > packed.state_dict()["sources"]["web"]["used"]
    fewer = stream(mixed({"web": 1, "pairs": 1}), micro_batch_size=8)
    fewer.load_state_dict(resumed.state_dict())
    assert "data.sources.pages: left out from here on" in caplog.text
    assert set(tokens_by_source(list(islice(fewer, 1, 4)))) == {"web", "pairs"}


def test_a_checkpoint_of_other_sources_is_refused() -> None:
    state = stream(mixed({"web": 1})).state_dict()
    with pytest.raises(ValueError, match=r"none of the checkpoint's sources, \['web'\], is among \['pairs'\]"):
        stream(mixed({"pairs": 1})).load_state_dict(state)


def test_counters_tell_what_is_trained_on_by_source() -> None:
    given = documents()
    given["pairs"] = Listed([*given["pairs"].documents, FORMAT["cm3leon"].join([text(90)])])
    packed = stream(EVEN, documents=given)
    batches = list(islice(packed, 40))
    found = counters(packed.state_dict())
    tokens = tokens_by_source(batches)
    names = Counter(key.split(":")[0] for key in used(batches))
    for name in EVEN.sources:
        assert found[f"documents/{name}"] == names[name]
        assert found[f"tokens/{name}"] == pytest.approx(tokens[name])
    assert found["epochs/pairs"] == pytest.approx(names["pairs"] / 43, abs=0.04)
    assert (
        found["skipped/pairs"] == int(found["epochs/pairs"]) or found["skipped/pairs"] == int(found["epochs/pairs"]) + 1
    )
    plain = replace(EVEN, sources={}, tokens=Path("web"))
    assert set(counters(stream(plain, documents=given["web"]).state_dict())) == {
        "documents", "tokens", "epochs", "skipped"
    }  # fmt: skip
