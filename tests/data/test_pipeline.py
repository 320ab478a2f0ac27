"""The stream of packed rows: the same for any split, exactly resumable, varied as configured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmodal.data.held_out import held_out_batches
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, Documents, PackedDocuments
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Run, SequenceError, build_format
from mixmodal.manifests import write_manifest
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.objectives.loss import target_weights
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 3)}) for name in ("cm3leon", "chameleon")}
MASKED = CausalMasked(CausalMaskedConfig(), VOCABULARY)
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, poisson_rate=0), VOCABULARY)
CONFIG = DataConfig(tokens=Path("shards"), seq_len=40)
STORED = replace(CONFIG, image_first_share=0, caption_dropout=0, shuffle=False)
every_format = pytest.mark.parametrize("name", FORMAT)


class Listed:
    """Documents in memory."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents
        self.keys = [f"doc{i}" for i in range(len(documents))]

    @property
    def lengths(self) -> list[int]:
        return [len(document) for document in self.documents]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[index]


def text(length: int, seed: int = 0) -> Run:
    pieces = np.random.default_rng((length, seed)).integers(0, 30, length)
    return Run("text", VOCABULARY.to_ids("text", pieces))


IMAGE, OTHER = Run("image", np.arange(4, 10)), Run("image", np.arange(5, 11))


def pairs(number: int = 23, name: str = "cm3leon") -> Listed:
    return Listed([FORMAT[name].join([text(1 + i % 9, i), IMAGE]) for i in range(number)])


def stream(documents: Documents, config: DataConfig = CONFIG, objective: CausalMasked = MASKED, **split: int):
    return PackedDocuments(documents, FORMAT["cm3leon"], objective, config, **{"micro_batch_size": 2, **split})


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4])) and one.keys == other.keys


def stack(batches: list[Batch]) -> Batch:
    tensors = (torch.cat(part) for part in zip(*(batch[:4] for batch in batches)))
    return Batch(*tensors, keys=[row for batch in batches for row in batch.keys])


def documents_of(batch: Batch) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Key, ids and loss weights of every document in the batch."""
    found = []
    for row, keys in enumerate(batch.keys):
        for segment, key in enumerate(keys, start=1):
            inside = batch.segment_ids[row] == segment
            found.append((key, batch.tokens[row][inside].numpy(), batch.loss_weights[row][inside].numpy()))
    return found


def draw(packed: PackedDocuments, number: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [document for batch in islice(packed, number) for document in documents_of(batch)]


def test_a_step_trains_on_the_same_rows_however_they_are_spread() -> None:
    documents, steps = pairs(), 5
    whole = list(islice(stream(documents, micro_batch_size=8), steps))
    accumulated = list(islice(stream(documents, micro_batch_size=4, grad_accum_steps=2), 2 * steps))
    ranks = [list(islice(stream(documents, micro_batch_size=4, rank=r, world_size=2), steps)) for r in range(2)]
    both = [
        list(islice(stream(documents, micro_batch_size=2, grad_accum_steps=2, rank=r, world_size=2), 2 * steps))
        for r in range(2)
    ]
    for step, batch in enumerate(whole):
        assert same(batch, stack(accumulated[2 * step : 2 * step + 2]))
        assert same(batch, stack([rank[step] for rank in ranks]))
        assert same(batch, stack([part for rank in both for part in rank[2 * step : 2 * step + 2]]))


@pytest.mark.parametrize("taken", range(14))
def test_resuming_gives_exactly_the_batches_that_would_have_come(taken: int) -> None:
    split = {"micro_batch_size": 2, "grad_accum_steps": 3, "rank": 1, "world_size": 2}
    documents = Listed([*pairs().documents, FORMAT["cm3leon"].join([text(60)])])
    packed = stream(documents, **split)
    for _ in range(taken):
        next(packed)
    state = json.loads(json.dumps(packed.state_dict()))
    resumed = stream(documents, **split)
    next(resumed)  # what a stream did before does not matter
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.counts == packed.counts or state["micro_batch"]
    for _ in range(9):
        assert same(next(packed), next(resumed))
        assert packed.state_dict() == resumed.state_dict()
    assert packed.counts == resumed.counts


def test_between_steps_another_number_of_ranks_goes_on() -> None:
    documents = pairs()
    packed = stream(documents, micro_batch_size=2, grad_accum_steps=2)
    for _ in range(6):
        next(packed)
    resumed = stream(documents, micro_batch_size=4)
    resumed.load_state_dict(packed.state_dict())
    assert same(next(resumed), stack([next(packed), next(packed)]))


def test_within_a_step_another_split_is_refused() -> None:
    packed = stream(pairs(), grad_accum_steps=2)
    next(packed)
    with pytest.raises(ValueError, match="split"):
        stream(pairs(), grad_accum_steps=4).load_state_dict(packed.state_dict())


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("seed", lambda: stream(pairs(), seed=1)),
        ("num_documents", lambda: stream(pairs(24))),
        ("seq_len", lambda: stream(pairs(), replace(CONFIG, seq_len=41))),
    ],
)
def test_other_data_or_another_seed_is_refused(key: str, other) -> None:
    state = stream(pairs()).state_dict()
    with pytest.raises(ValueError, match=f"shards: {key} is"):
        other().load_state_dict(state)


def test_token_shards_made_again_with_another_content_are_refused(tmp_path: Path) -> None:
    def made(first: int) -> TokenShards:
        documents = pairs(23).documents
        documents[0] = FORMAT["cm3leon"].join([text(1, first), IMAGE])
        entry = write_token_shard(tmp_path, "shard_00000", documents, [f"doc{i}" for i in range(23)], VOCABULARY.size)
        sha256 = {"text_tokenizer_sha256": "a" * 64, "image_tokenizer_sha256": "b" * 64}
        write_manifest(tmp_path, build_manifest(FORMAT["cm3leon"], [entry], counts={"documents": 23}, **sha256))
        return TokenShards(tmp_path)

    state = json.loads(json.dumps(stream(made(0)).state_dict()))
    stream(made(0)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data shards: shard_00000 changed .*; resume with the same data and seed"):
        stream(made(1)).load_state_dict(state)
    with pytest.raises(ValueError, match="manifest_sha256 is , but"):
        stream(pairs()).load_state_dict(state)
    made(0)
    with (tmp_path / "shard_00000.tokens.npy").open("r+b") as file:  # the manifest does not tell
        file.seek(-2, 2)
        file.write(b"xx")
    unchecked = replace(CONFIG, verify_shards=False)
    stream(TokenShards(tmp_path), unchecked).load_state_dict(state)
    with pytest.raises(ValueError, match=r"shard_00000\.tokens\.npy: changed since it was written"):
        stream(TokenShards(tmp_path)).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_stream_is_a_function_of_the_seed(shuffle: bool) -> None:
    config = replace(CONFIG, shuffle=shuffle)
    one, again, other = (stack(list(islice(stream(pairs(), config, seed=seed), 6))) for seed in (3, 3, 4))
    assert same(one, again)
    assert not same(one, other)


def test_a_document_is_varied_alike_wherever_it_stands() -> None:
    config = replace(CONFIG, image_first_share=0.5, caption_dropout=0.3)
    found = []
    for shuffle in (True, False):
        one_epoch = draw(stream(pairs(), replace(config, shuffle=shuffle), micro_batch_size=1), 12)[:23]
        found.append({key: ids.tolist() for key, ids, _ in one_epoch})
    assert found[0] == found[1]
    assert len(found[0]) == 23


def test_every_epoch_holds_every_document_once_in_a_new_order() -> None:
    keys = [key for key, *_ in draw(stream(pairs(), objective=PLAIN), 20)]
    epochs = [keys[i : i + 23] for i in (0, 23, 46)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(pairs().keys)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != pairs().keys


def test_masks_are_drawn_anew_in_every_epoch() -> None:
    found = draw(stream(Listed([FORMAT["cm3leon"].join([text(20), IMAGE])]), STORED), 4)
    assert len({ids.tobytes() for _, ids, _ in found}) > len(found) // 2


def test_unshuffled_plain_documents_come_as_stored() -> None:
    documents = pairs()
    for number, (key, ids, weights) in enumerate(draw(stream(documents, STORED, PLAIN), 12)):
        assert key == f"doc{number % 23}"
        assert np.array_equal(ids, documents[number % 23])
        assert weights.tolist() == [0] + [1] * (len(ids) - 1)


@every_format
def test_every_row_restores_to_stored_documents(name: str) -> None:
    documents = pairs(name=name)
    config = replace(CONFIG, caption_dropout=0, image_first_share=0)
    packed = PackedDocuments(documents, FORMAT[name], MASKED, config, micro_batch_size=4)
    for key, ids, weights in draw(packed, 10):
        assert np.array_equal(MASKED.restore(ids), documents[int(key[3:])])
        assert np.array_equal(weights, MASKED.weigh(ids))


@every_format
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_pairs_has_the_picture_first(name: str, share: float) -> None:
    documents = pairs(400, name)
    config = replace(STORED, image_first_share=share)
    packed = PackedDocuments(documents, FORMAT[name], PLAIN, config, micro_batch_size=8)
    first = Counter()
    for key, ids, _ in draw(packed, 12):
        runs = FORMAT[name].split(ids)
        first[runs[0].modality] += 1
        stored = {run.modality: run.ids for run in FORMAT[name].split(documents[int(key[3:])])}
        assert len(runs) == 2
        assert all(np.array_equal(stored[run.modality], run.ids) for run in runs)
    assert first["image"] / first.total() == pytest.approx(share, abs=0.13 if share == 0.5 else 0)  # 0.023


def test_only_pairs_change_their_order() -> None:
    runs = [[text(5)], [IMAGE], [IMAGE, OTHER], [text(2), IMAGE, text(3)], [text(2), IMAGE, IMAGE], [IMAGE, text(3)]]
    documents = Listed([FORMAT["cm3leon"].join(parts) for parts in runs])
    found = {key: ids for key, ids, _ in draw(stream(documents, replace(STORED, image_first_share=1), PLAIN), 6)}
    for number in range(5):
        assert np.array_equal(found[f"doc{number}"], documents[number])
    assert np.array_equal(found["doc5"], FORMAT["cm3leon"].join([text(3), IMAGE]))


@every_format
def test_a_dropped_caption_leaves_what_guidance_puts_there(name: str) -> None:
    mask = Run("text", np.array([VOCABULARY.sentinel(0)]))
    runs = [[text(5), IMAGE], [text(5), IMAGE, text(4), IMAGE], [text(2), mask, text(2), IMAGE], [text(7)], [IMAGE]]
    expected = [[mask, IMAGE], [mask, IMAGE, mask, IMAGE], [mask, IMAGE], [text(7)], [IMAGE]]
    documents = Listed([FORMAT[name].join(parts) for parts in runs])
    config = replace(STORED, caption_dropout=1, image_first_share=1)
    packed = PackedDocuments(documents, FORMAT[name], PLAIN, config, micro_batch_size=2)
    found = {key: (ids, weights) for key, ids, weights in draw(packed, 6)}
    for number, parts in enumerate(expected):
        ids, weights = found[f"doc{number}"]
        assert np.array_equal(ids, FORMAT[name].join(parts))
        assert not weights[VOCABULARY.contains("sentinel", ids)].any()
        assert weights[1:].sum() == (~VOCABULARY.contains("sentinel", ids[1:])).sum()


def test_a_dropped_caption_gets_no_masks_and_the_share_is_kept() -> None:
    found = draw(stream(pairs(400), replace(STORED, caption_dropout=0.3)), 60)
    dropped = [ids for _, ids, _ in found if not VOCABULARY.contains("text", ids).any()]
    expected = [VOCABULARY.bos, VOCABULARY.sentinel(0), VOCABULARY.break_, *IMAGE.ids.tolist(), VOCABULARY.eos]
    assert all(ids.tolist() == expected for ids in dropped)
    assert len(dropped) / len(found) == pytest.approx(0.3, abs=0.12)  # 4 standard deviations; measured 0.015


def test_first_tokens_and_padding_weigh_nothing() -> None:
    for batch in islice(stream(pairs()), 10):
        assert torch.equal(target_weights(batch.segment_ids, batch.loss_weights), batch.loss_weights)
        assert not batch.loss_weights[batch.segment_ids == 0].any()
        assert (batch.tokens[batch.segment_ids == 0] == VOCABULARY.pad).all()


def test_masks_never_make_a_document_too_long() -> None:
    documents = Listed([FORMAT["cm3leon"].join([text(n), IMAGE]) for n in (31, 30, 29, 28, 27)])
    objective = CausalMasked(CausalMaskedConfig(min_masks=9), VOCABULARY)
    lengths = {key: len(ids) for key, ids, _ in draw(stream(documents, STORED, objective), 5)}
    assert lengths == {"doc0": 40, "doc1": 39, "doc2": 38, "doc3": 40, "doc4": 39}


def test_documents_that_do_not_fit_are_skipped_and_counted() -> None:
    documents = pairs()
    documents.documents[4] = FORMAT["cm3leon"].join([text(60), IMAGE])
    packed = stream(documents, STORED, PLAIN)
    keys = [key for key, *_ in draw(packed, 20)]
    assert "doc4" not in keys
    assert packed.counts["too_long"] == 1 + (packed.counts["documents"] - 4) // 22
    assert packed.counts["documents"] == len(keys)


def test_too_many_documents_that_do_not_fit_stop_training() -> None:
    documents = Listed([FORMAT["cm3leon"].join([text(60 if i % 3 else 3), IMAGE]) for i in range(30)])
    with pytest.raises(ValueError, match="20 of 30 documents are longer than seq_len 40"):
        list(islice(stream(documents), 20))
    list(islice(stream(documents, replace(CONFIG, max_skipped_share=0.7)), 20))


def test_documents_of_which_none_fits_stop_training() -> None:
    with pytest.raises(ValueError, match="3 of 3 documents"):
        next(stream(Listed([FORMAT["cm3leon"].join([text(60)])] * 3), replace(CONFIG, max_skipped_share=1)))


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no documents"):
        stream(Listed([]))


@pytest.mark.parametrize("split", [{"rank": 2, "world_size": 2}, {"micro_batch_size": 0}, {"seed": -1}])
def test_impossible_splits_are_refused(split: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="data: rank"):
        stream(pairs(), **split)


@pytest.mark.parametrize("setting", [{"seq_len": 1}, {"image_first_share": 1.5}, {"caption_dropout": -0.1}])
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"data: {next(iter(setting))}"):
        replace(CONFIG, **setting)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_documents_come_once_plain_and_in_step_on_every_rank(world_size: int) -> None:
    documents = pairs()
    ranks = [
        list(held_out_batches(documents, MASKED, CONFIG, micro_batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.tokens.shape == (2, 40) for batches in ranks for batch in batches)
    found = [document for step in zip(*ranks) for batch in step for document in documents_of(batch)]
    assert [key for key, *_ in found] == documents.keys
    for number, (_, ids, weights) in enumerate(found):
        assert np.array_equal(ids, documents[number])
        assert weights.tolist() == [0] + [1] * (len(ids) - 1)


def test_held_out_documents_that_do_not_fit_are_named(caplog: pytest.LogCaptureFixture) -> None:
    documents = pairs()
    documents.documents[4] = FORMAT["cm3leon"].join([text(60), IMAGE])
    batches = list(held_out_batches(documents, MASKED, CONFIG, micro_batch_size=2))
    assert sum(batch.num_documents for batch in batches) == 22
    assert "1 of 23 documents, first doc4" in caplog.text


@every_format
@pytest.mark.parametrize("image_first", [0.0, 1.0])
def test_the_first_part_weighs_what_the_config_says(name: str, image_first: float) -> None:
    config = replace(STORED, first_part_weight=0.25, image_first_share=image_first)
    for _, ids, weights in draw(PackedDocuments(pairs(8, name), FORMAT[name], PLAIN, config, micro_batch_size=2), 3):
        first, second = (run.ids for run in FORMAT[name].split(ids))
        counted = np.flatnonzero(VOCABULARY.is_content(ids))
        assert (weights[counted[: len(first)]] == 0.25).all()
        assert (weights[counted[len(first) :]] == 1).all()
        assert len(counted) == len(first) + len(second)


def test_a_lone_part_keeps_its_weight() -> None:
    documents = Listed([FORMAT["cm3leon"].join([text(20)])])
    config = replace(STORED, first_part_weight=0.25)
    packed = PackedDocuments(documents, FORMAT["cm3leon"], MASKED, config, micro_batch_size=1)
    assert all(set(weights[1:]) <= {0.0, 1.0} for _, _, weights in draw(packed, 3))


@pytest.mark.parametrize("wrong", ["begin", "spelling"])
def test_a_document_that_is_not_spelled_right_is_named(wrong: str) -> None:
    documents = pairs()
    documents.documents[5] = documents.documents[5][1:] if wrong == "begin" else documents.documents[5][[0, 0, -1]]
    with pytest.raises(SequenceError, match=r"^data shards: document doc5: .*; pretokenize again"):
        list(islice(stream(documents, replace(CONFIG, caption_dropout=1.0)), 30))
