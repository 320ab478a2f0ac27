"""Which tokens carry loss is stored with them and stays with them, whatever they are packed with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmodal.data.conversations import Message
from mixmodal.data.held_out import held_out_batches
from mixmodal.data.pipeline import DataConfig, PackedDocuments
from mixmodal.data.shards import PictureFile, Sample, read_samples
from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.data.variation import Variation, check_loss_kept
from mixmodal.document import Run, build_format
from mixmodal.manifests import MANIFEST_NAME, write_manifest
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))
FORMAT = build_format("cm3leon", VOCABULARY, {"image": (2, 2)})
MASKED = CausalMasked(CausalMaskedConfig(min_masks=1, max_masks=3), VOCABULARY)
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, poisson_rate=0), VOCABULARY)
CONFIG = DataConfig(tokens=Path("shards"), seq_len=60, image_first_share=0, caption_dropout=0, shuffle=False)


class Flagged:
    """Documents in memory whose odd ids carry loss, so that a flag can be told from its token wherever that goes."""

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        self.documents = documents
        self.keys = [f"doc{i}" for i in range(len(documents))]
        self.lengths = list(map(len, documents))
        self.has_loss = True

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.documents[index]

    def loss(self, index: int, /) -> np.ndarray:
        return self.documents[index] % 2 == 1


pieces = st.lists(st.integers(0, 29), min_size=1, max_size=9).map(np.array)
texts = pieces.map(lambda found: Run("text", VOCABULARY.to_ids("text", found)))
pictures = st.lists(st.integers(0, 7), min_size=4, max_size=4).map(
    lambda codes: Run("image", VOCABULARY.to_ids("image", np.array(codes)))
)
ends = st.just(Run("text", np.array([VOCABULARY.end_of_turn])))
stored = st.lists(st.lists(texts | pictures | ends, min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=50)
@given(stored=stored, masks=st.booleans(), lookahead=st.integers(0, 2), seed=st.integers(0, 99))
def test_loss_goes_with_its_token_through_masks_and_packing(
    stored: list[list[Run]], masks: bool, lookahead: int, seed: int
) -> None:
    documents = Flagged([FORMAT.join(runs) for runs in stored])
    config = replace(CONFIG, lookahead=lookahead)
    rows = PackedDocuments(documents, FORMAT, MASKED if masks else PLAIN, config, micro_batch_size=2, seed=seed)
    for batch in islice(rows, 2):
        ids, weights = batch.tokens.numpy(), batch.loss_weights.numpy()
        added = np.asarray(VOCABULARY.contains("sentinel", ids)) | (ids == VOCABULARY.end_of_span)
        expected = (ids % 2 == 1) & (batch.segment_ids.numpy() != 0) & (ids != VOCABULARY.bos)
        assert np.array_equal(weights[~added], expected[~added].astype(np.float32))
        assert not weights[np.asarray(VOCABULARY.contains("sentinel", ids))].any()
        behind = np.roll(weights, 1, axis=1)
        closing = ids == VOCABULARY.end_of_span
        assert np.array_equal(weights[closing], behind[closing])  # as the last token of its span
        assert closing.any() == masks or not any(
            np.asarray(VOCABULARY.is_content(d)).any() for d in documents.documents
        )


def test_loss_multiplies_other_weights() -> None:
    ids = FORMAT.join([Run("image", VOCABULARY.to_ids("image", np.arange(4))), Run("text", np.array([50, 51]))])
    variation = Variation(FORMAT, PLAIN, seq_len=60, image_first_share=0, caption_dropout=0, first_part_weight=0.5)
    loss = np.arange(len(ids)) % 2 == 0
    sample = variation.vary("a", ids, np.random.default_rng(0), loss=loss)
    whole = variation.vary("a", ids, np.random.default_rng(0))
    assert np.array_equal(sample.loss_weights, whole.loss_weights * loss)
    assert 0.5 in sample.loss_weights


def test_held_out_documents_keep_their_loss() -> None:
    documents = Flagged([FORMAT.join([Run("text", VOCABULARY.to_ids("text", np.arange(n)))]) for n in (3, 6)])
    (batch,) = held_out_batches(documents, PLAIN, CONFIG, micro_batch_size=1)
    ids = batch.tokens.numpy()
    expected = (ids % 2 == 1) & (batch.segment_ids.numpy() != 0)
    assert np.array_equal(batch.loss_weights.numpy(), expected.astype(np.float32))
    assert 0 < expected.sum() < (batch.segment_ids != 0).sum()


@pytest.mark.parametrize("name", ["image_first_share", "caption_dropout"])
def test_what_would_lose_the_loss_is_refused(name: str) -> None:
    documents = Flagged([FORMAT.join([Run("text", np.array([50]))])])
    with pytest.raises(ValueError, match=rf"data shards: .* carry loss; .* Set {name} from 0\.2 to 0, or"):
        PackedDocuments(documents, FORMAT, PLAIN, replace(CONFIG, **{name: 0.2}), micro_batch_size=1)
    documents.has_loss = False
    PackedDocuments(documents, FORMAT, PLAIN, replace(CONFIG, **{name: 0.2}), micro_batch_size=1)


@pytest.mark.parametrize("own", [{"image_first_share": 1.0}, {"caption_dropout": 1.0}])
def test_pairs_are_varied_beside_conversations_that_are_not(own: dict[str, Any]) -> None:
    codes = VOCABULARY.to_ids("image", np.arange(4))
    pair = FORMAT.join([Run("text", VOCABULARY.to_ids("text", np.array([3]))), Run("image", codes)])
    pairs, talk = Flagged([pair]), Flagged([pair])
    pairs.has_loss, pairs.loss = False, lambda _: None  # type: ignore[assignment, return-value]
    sources = {"pairs": SourceConfig(tokens=Path("pairs"), **own), "talk": SourceConfig(tokens=Path("talk"))}
    config = replace(CONFIG, tokens=None, sources=sources, seq_len=len(pair))
    rows = PackedDocuments({"pairs": pairs, "talk": talk}, FORMAT, PLAIN, config, micro_batch_size=2)
    batch = next(rows)
    found = {key: ids[segments != 0] for (key,), ids, segments in zip(batch.keys, batch.tokens, batch.segment_ids)}
    turned = FORMAT.turn_pair(pair)
    assert turned is not None
    dropped = np.where(np.isin(pair, VOCABULARY.ids("text")), VOCABULARY.sentinel(0), pair)
    expected = turned if "image_first_share" in own else dropped
    assert found["pairs:doc0"].tolist() == expected.tolist()
    assert found["talk:doc0"].tolist() == pair.tolist()
    with pytest.raises(ValueError, match=r"data\.sources\.talk \(talk\): .* for this source alone in data\.sources"):
        PackedDocuments(
            {"pairs": pairs, "talk": talk}, FORMAT, PLAIN, replace(config, caption_dropout=0.1), micro_batch_size=1
        )


def test_documents_before_conversations_are_refused() -> None:
    documents = Flagged([FORMAT.join([Run("text", np.array([50]))])])
    source: Any = SimpleNamespace(documents=documents, retrieval=object(), label="data.sources.a")
    with pytest.raises(ValueError, match=r"data\.sources\.a: .* Set candidates to none"):
        check_loss_kept(source, image_first_share=0, caption_dropout=0)


class Written(NamedTuple):
    folder: Path
    documents: list[np.ndarray]
    losses: list[np.ndarray]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Two token shards, of which the second says what carries loss."""
    documents = [np.array([0, 50, 51, 2]), np.array([0, 52, 2]), np.array([0, 53, 54, 55, 2])]
    losses = [np.array([0, 0, 1], bool), np.array([0, 1, 0, 1, 1], bool)]
    entries = [
        write_token_shard(tmp_path, "shard_00000", documents[:1], ["a"], VOCABULARY.size),
        write_token_shard(tmp_path, "shard_00001", documents[1:], ["b", "c"], VOCABULARY.size, losses),
    ]
    digests = {"text_tokenizer_sha256": "a" * 64, "image_tokenizer_sha256": "b" * 64}
    write_manifest(tmp_path, build_manifest(FORMAT, entries, counts={}, **digests))
    return Written(tmp_path, documents, losses)


def test_loss_is_read_as_it_was_written(written: Written) -> None:
    shards = TokenShards(written.folder)
    assert shards.has_loss
    assert shards.manifest["loss"] is True
    assert [shards[index].tolist() for index in range(3)] == [ids.tolist() for ids in written.documents]
    assert shards.loss(0) is None
    for index, loss in enumerate(written.losses, start=1):
        found = shards.loss(index)
        assert found is not None
        assert (found.dtype, found.tolist()) == (np.bool_, loss.tolist())
    assert np.load(written.folder / "shard_00001.loss.npy").dtype == np.uint8
    assert not (written.folder / "shard_00000.loss.npy").exists()


def test_shards_without_loss_are_as_they_were(tmp_path: Path) -> None:
    entry = write_token_shard(tmp_path, "shard_00000", [np.array([0, 2])], ["a"], VOCABULARY.size)
    digests = {"text_tokenizer_sha256": "a" * 64, "image_tokenizer_sha256": "b" * 64}
    manifest = build_manifest(FORMAT, [entry], counts={}, **digests)
    write_manifest(tmp_path, manifest)
    assert "loss" not in manifest
    assert not TokenShards(tmp_path).has_loss


def test_changed_loss_is_noticed(written: Written) -> None:
    shards = TokenShards(written.folder)
    path = written.folder / "shard_00001.loss.npy"
    np.save(path, 1 - np.load(path))
    with pytest.raises(ValueError, match=r"shard_00001\.loss\.npy: changed since it was written"):
        shards.verify()
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ValueError, match=r"shard_00001\.loss\.npy: 7 flags for the 8 tokens"):
        TokenShards(written.folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard_00001\.loss\.npy: missing or broken"):
        TokenShards(written.folder)


def test_a_shard_with_other_loss_counts_as_changed(written: Written) -> None:
    before = TokenShards(written.folder).shard_digests
    path = written.folder / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    manifest["shards"][1]["sha256"]["loss"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert TokenShards(written.folder).changed_since(before) == ["shard_00001"]


def conversation(key: str, picture: PictureFile, answer: PictureFile) -> Sample:
    messages = (Message("system", (False,)), Message("user", (False, False)), Message("assistant", (True, True)))
    return Sample(key, ("Be brief. ", picture, "caption", "flat", answer), {}, "", messages)


@pytest.mark.parametrize("sequence_format", ["chameleon", "cm3leon"])
def test_conversations_become_token_shards_with_loss(
    build_shards: Callable[..., Path],
    write_tokens: Callable[..., TokenShards],
    build_picture: Callable[[int], PictureFile],
    sequence_format: str,
) -> None:
    shards = build_shards(4, extra=[conversation("talk", build_picture(7), build_picture(8))])  # two shards
    tokens = write_tokens([shards], sequence_format=sequence_format)
    assert [*tokens.keys] == ["0000#0", "0001#0", "0002#0", "0003#0", "talk#0"]
    assert [tokens.loss(index) is None for index in range(5)] == [True, True, True, False, False]
    vocabulary, ids, loss = tokens.vocabulary, tokens[4], tokens.loss(4)
    assert loss is not None
    plain = tokens.loss(3)
    assert plain is not None
    assert plain.all()
    end = int(np.flatnonzero(ids == vocabulary.end_of_turn)[0])
    assert not loss[: end + 1].any()
    assert loss[end + 1 :].all()
    assert (ids == vocabulary.end_of_turn).sum() == 2
    counts = tokens.manifest["counts"]
    trained = np.concatenate([tokens[3], ids[end + 1 :]])
    assert counts["loss_tokens"] == len(trained)
    assert counts["image_loss_tokens"] == 8
    assert counts["text_loss_tokens"] == vocabulary.contains("text", trained).sum()
    assert len(list(read_samples(shards))) == 5
    again = write_tokens([shards], sequence_format=sequence_format)
    assert again.manifest == tokens.manifest


def test_pictures_of_prompts_are_seen_whole_and_those_of_answers_cropped(
    build_shards: Callable[..., Path], write_tokens: Callable[..., TokenShards], tmp_path: Path
) -> None:
    wide = Image.new("RGB", (16, 8), "black")
    wide.save(tmp_path / "wide.png")
    picture = PictureFile((tmp_path / "wide.png").read_bytes(), "png", "wide")
    tokens = write_tokens([build_shards(0, extra=[conversation("talk", picture, picture)])])
    ids: Any = tokens[0]
    codes = tokens.vocabulary.from_ids("image", ids[np.asarray(tokens.vocabulary.contains("image", ids))])
    assert codes.tolist() == [8, 8, 8, 8, 0, 0, 0, 0]  # half of each quarter is a white border
