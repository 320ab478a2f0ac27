"""A memory holds the documents of token shards with their tokens, goes on after a break, and takes more of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.data import indexing
from mixmodal.data.augment import AugmentConfig
from mixmodal.data.conversations import Message
from mixmodal.data.indexing import MemoryConfig, build_memory
from mixmodal.data.shards import PictureFile, Sample
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.data.token_shards import TokenShards
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, open_memory

SHIFTS = AugmentConfig(move_share=1.0, max_shift=0.3)
LIMITS = SampleLimits(max_skipped_share=0.5)


@pytest.fixture
def corpus(build_shards: Callable[..., Path], build_picture: Callable[..., PictureFile], write_tokens: Any) -> Any:
    """Two folders of shards with a text, a picture, both in another order, and a broken one; tokens in 3 variants."""
    whole = build_picture(60).data
    extra = [
        Sample("broken", ("cut", PictureFile(whole[: len(whole) // 2], "png", "cut"))),
        Sample("text", ("text only",)),
        Sample("image", (build_picture(50),)),
        Sample("mixed", (build_picture(51), "between", build_picture(52))),
    ]
    folders = (build_shards(5, "one", extra), build_shards(2, "two", [Sample("last", ("the last", build_picture(53)))]))
    tokens = write_tokens(folders, num_variants=3, augment=SHIFTS)
    return folders, tokens


def config_of(tmp_path: Path, corpus: tuple[tuple[Path, ...], TokenShards], **options: Any) -> MemoryConfig:
    folders, tokens = corpus
    given = {"shards": folders, "tokens": tokens.folder, "encoder": "org/clip", "out": tmp_path / "memory"}
    return MemoryConfig(**{**given, "part_documents": 4, "batch_size": 3, "limits": LIMITS, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_with_their_vectors_modalities_and_tokens_of_every_variant(
    tmp_path: Path, corpus: Any, fake_encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = build_memory(config_of(tmp_path, corpus))
    tokens = corpus[1]
    names = ["0000", "0001", "0002", "0003", "0004", "text", "image", "mixed", "0000", "0001", "last"]
    assert list(memory.keys) == names
    assert memory.modalities.tolist() == [3] * 5 + [HAS_TEXT, HAS_IMAGE, 3] + [3] * 3
    assert (memory.num_variants, len(tokens)) == (3, 3 * len(names))
    for number in range(len(names)):
        for variant in range(3):
            assert np.array_equal(memory.ids(number, variant), tokens[3 * number + variant])
    assert memory.encoder == "org/clip"
    memory.check_tokens(vocabulary_digest=tokens.vocabulary.digest, sequence_format=tokens.manifest["sequence_format"])
    with pytest.raises(ValueError, match=r"manifest\.json: tokens\.vocabulary_digest is .* another vocabulary"):
        memory.check_tokens(vocabulary_digest="f" * 64, sequence_format=tokens.manifest["sequence_format"])
    text = memory.vectors([5])[0]
    assert text == pytest.approx(fake_encoder.embed_texts(["text only"])[0])
    out = capsys.readouterr().out
    total = int(tokens.lengths.sum())
    assert f"11 documents with {total} tokens in 3 variants, 1 samples skipped, index flat" in out


def test_a_second_call_changes_nothing_and_embeds_nothing(tmp_path: Path, corpus: Any, fake_encoder: Any) -> None:
    config = config_of(tmp_path, corpus)
    build_memory(config)
    before = contents(config.out)
    fake_encoder.embedded = 0
    build_memory(replace(config, batch_size=1, part_documents=2))
    assert contents(config.out) == before
    assert not fake_encoder.embedded


def test_a_job_that_broke_off_goes_on_and_ends_the_same(tmp_path: Path, corpus: Any, fake_encoder: Any) -> None:
    whole = config_of(tmp_path, corpus, out=tmp_path / "whole")
    build_memory(whole)
    config = config_of(tmp_path, corpus)
    fake_encoder.embedded, fake_encoder.breaks_after = 0, 5
    with pytest.raises(RuntimeError, match="power cut"):
        build_memory(config)
    with pytest.raises(ValueError, match="the index covers 0 of 4 documents, so the job broke off"):
        open_memory(config.out, encoder_identity=None)
    fake_encoder.embedded, fake_encoder.breaks_after = 0, None
    build_memory(config)
    assert fake_encoder.embedded == 11 - 4
    assert contents(config.out) == contents(whole.out)


def test_more_shards_are_added_behind_the_earlier_ones(
    tmp_path: Path, corpus: Any, write_tokens: Any, fake_encoder: Any
) -> None:
    folders, tokens = corpus
    first = write_tokens(folders[:1], num_variants=3, augment=SHIFTS, out=tmp_path / "first")
    config = config_of(tmp_path, (folders[:1], first))
    before = build_memory(config)
    fake_encoder.embedded = 0
    memory = build_memory(replace(config, shards=folders, tokens=tokens.folder))
    assert fake_encoder.embedded == 3
    assert (len(before), len(memory)) == (8, 11)
    assert memory.digest != before.digest
    at_once = build_memory(config_of(tmp_path, corpus, out=tmp_path / "once"))
    assert np.array_equal(memory.vectors(range(11)), at_once.vectors(range(11)))
    assert list(memory.keys) == list(at_once.keys)
    assert memory.search(at_once.vectors([10]), 1).numbers.tolist() == [[10]]
    assert np.array_equal(memory.ids(10, 2), tokens[32])
    with pytest.raises(ValueError, match="holds other documents than those given"):
        build_memory(config)


def test_shards_that_the_tokens_are_not_of_are_named(
    tmp_path: Path, corpus: Any, build_shards: Callable[..., Path], fake_encoder: Any
) -> None:
    folders, tokens = corpus
    with pytest.raises(ValueError, match=r"manifest\.json lists 4 token shards, .* hold 3; give the same shards"):
        build_memory(config_of(tmp_path, (folders[:1], tokens)))
    one = sorted(folders[0].glob("*.tar"))
    with pytest.raises(ValueError, match=r"the document 'text#0' has no sample in .*/two/00000\.tar, where it should"):
        build_memory(config_of(tmp_path, ((*one[:2], folders[1], one[2]), tokens)))
    fewer = build_shards(4, "fewer")
    with pytest.raises(ValueError, match=r"the document '0004#0' has no sample in .*fewer/00001\.tar"):
        build_memory(config_of(tmp_path, ((fewer, one[2], folders[1]), tokens)))


def test_samples_that_were_not_pretokenized_count_as_skipped(tmp_path: Path, corpus: Any, fake_encoder: Any) -> None:
    limits = SampleLimits(max_skipped_share=0.05)
    with pytest.raises(TooManySkipped, match=r"1 of 12 samples are bad \(1 not pretokenized\).*broken: .* no document"):
        build_memory(config_of(tmp_path, corpus, limits=limits))


def test_limits_that_were_not_those_of_the_tokens_are_named(tmp_path: Path, corpus: Any, fake_encoder: Any) -> None:
    limits = SampleLimits(max_pixels=10, max_skipped_share=0.5)
    with pytest.raises(ValueError, match=r"0000\.png.*8x8 pixels .*give the limits that it was pretokenized with"):
        build_memory(config_of(tmp_path, corpus, limits=limits))


def test_bad_encoders_are_named(
    tmp_path: Path, corpus: Any, fake_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, corpus)
    fake_encoder.none_for = "caption 2"
    with pytest.raises(ValueError, match="document '0002': the vector holds NaN or infinity; its part was not written"):
        build_memory(config)
    fake_encoder.none_for = None
    build_memory(config)
    fake_encoder.identity = "f" * 64
    with pytest.raises(ValueError, match=r"manifest\.json: encoder_identity is e{12}.* built with another encoder"):
        build_memory(config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        build_memory(replace(config, encoder=str(tmp_path / "nowhere")))


def test_a_local_encoder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert indexing.name_of("encoder") == str(tmp_path / "encoder")
    assert indexing.name_of("org/clip@v1") == "org/clip@v1"


def test_a_memory_of_nothing_is_refused(
    tmp_path: Path, build_shards: Callable[..., Path], write_tokens: Any, fake_encoder: Any
) -> None:
    shards = build_shards(1)
    tokens = write_tokens((shards,))
    path = tokens.manifest_path
    manifest = json.loads(path.read_bytes())
    for kind, data in {"tokens": [], "keys": [], "offsets": [0], "key_offsets": [0]}.items():
        dtype = {"tokens": np.uint16, "keys": np.uint8}.get(kind, np.int64)
        np.save(tokens.folder / f"shard_00000.{kind}.npy", np.array(data, dtype))
    manifest["shards"][0] |= {"documents": 0, "tokens": 0}
    path.write_text(json.dumps(manifest))
    limits = SampleLimits(max_skipped_share=1.0)
    with pytest.raises(ValueError, match="there are no documents, so there is no memory to build"):
        build_memory(config_of(tmp_path, ((shards,), TokenShards(tokens.folder)), limits=limits))


def test_conversations_are_refused_before_anything_is_loaded_or_written(
    tmp_path: Path, build_shards: Callable[..., Path], build_picture: Callable[..., PictureFile], write_tokens: Any
) -> None:
    turns = (Message("user", (False,)), Message("assistant", (True,)))
    asked = Sample("asked", ("what is it?", build_picture(9)), messages=turns)
    folders = (build_shards(2, "talk", [asked]),)
    config = config_of(tmp_path, (folders, write_tokens(folders)))
    with pytest.raises(ValueError, match=r"manifest\.json: its documents are conversations, .* a folder of their own$"):
        build_memory(config)  # whose encoder is not there
    assert not config.out.exists()
