"""Modality balance: shares of answers hold at every moment, on any number of ranks, resumed, and within limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mixmodal.config import load_config
from mixmodal.data import balance
from mixmodal.data.balance import BalancedMixture, modalities_of, name_modalities
from mixmodal.data.inspect import InspectConfig, inspect
from mixmodal.data.mixture import ShareLimits, StageConfig, counters
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments, open_sources
from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Document, Image, Part, Text, Turn, build_format, spell_turns
from mixmodal.manifests import write_manifest
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

ROOT = Path(__file__).parents[2]
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=256, num_sentinels=4))
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, max_masks=0), VOCABULARY)
HALVES = {"text": 0.5, "image": 0.5}


class ByteTokenizer:
    """A piece is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode()


FORMAT = build_format("cm3leon", VOCABULARY, {"image": (2, 2)}, ByteTokenizer())
PICTURE = Image(np.arange(4).reshape(2, 2))
ANSWERS: dict[str, tuple[Part, ...]] = {
    "text": (Text("yes"),),
    "image": (PICTURE,),
    "both": (Text("so"), PICTURE),
    "question": (Text("draw"), PICTURE),  # asked, with loss on nothing of it
}


def spell(kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "document":
        ids = FORMAT.spell(Document([Text("a"), PICTURE]))
        return ids, np.ones(len(ids), bool)
    asked = Turn(ANSWERS["question"], (False, False), is_answer=False)
    parts = ANSWERS[kind]
    return spell_turns(FORMAT, [asked, Turn(parts, (True,) * len(parts), is_answer=True)])


def write(folder: Path, counts: Mapping[str, int], flags: bool = True, shard_size: int = 17) -> Path:
    """Token shards with so many documents of each kind, shuffled, named KIND-NUMBER."""
    folder.mkdir(parents=True)
    keys = [f"{kind}-{number}" for kind, count in counts.items() for number in range(count)]
    np.random.default_rng(0).shuffle(keys)
    entries = []
    for number, start in enumerate(range(0, len(keys), shard_size)):
        own = keys[start : start + shard_size]
        spelled = [spell(key.split("-")[0]) for key in own]
        losses = [loss for _, loss in spelled] if flags else None
        name = f"shard_{number:05d}"
        entries.append(write_token_shard(folder, name, [ids for ids, _ in spelled], own, VOCABULARY.size, losses))
    sha256 = {"text_tokenizer_sha256": "a" * 64, "image_tokenizer_sha256": "b" * 64}
    write_manifest(folder, build_manifest(FORMAT, entries, counts={"documents": len(keys)}, **sha256))
    return folder


def config_of(tokens: Path | Mapping[str, Path], **options: Any) -> DataConfig:
    places: dict[str, Any] = {"tokens": tokens}
    if isinstance(tokens, Mapping):
        places = {"sources": {name: SourceConfig(tokens=folder) for name, folder in tokens.items()}}
    plain = {"seq_len": 64, "image_first_share": 0, "caption_dropout": 0, "modality_balance": HALVES}
    return DataConfig(**{**places, **plain, **options})


def stream(config: DataConfig, **options: Any) -> PackedDocuments:
    given = {"micro_batch_size": 4, **options}
    return PackedDocuments(open_sources(config), TokenShards(folder_of(config)).build_format(), PLAIN, config, **given)


def folder_of(config: DataConfig) -> Path:
    return next(iter(config.mixture.values())).tokens


def kinds(batches: Sequence[Batch]) -> list[str]:
    """Of the documents in order, which their keys begin with."""
    return [key.rpartition(":")[2].split("-")[0] for batch in batches for row in batch.keys for key in row]


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        (HALVES, {"text": 57, "image": 5}),
        ({"text": 9, "image": 1}, {"text": 20, "image": 40}),
        ({"text": 0.5, "image": 0.3, "both": 0.2}, {"text": 8, "image": 30, "both": 3}),
        ({"text": 1, "image": 1, "both": 0}, {"text": 8, "image": 30, "both": 9}),
    ],
)
def test_shares_of_answers_hold_at_every_moment_in_one_folder(
    tmp_path: Path, shares: dict[str, float], counts: dict[str, int]
) -> None:
    found = kinds([*islice(stream(config_of(write(tmp_path / "a", counts), modality_balance=shares)), 60)])
    total = sum(shares.values())
    for number in range(1, len(found)):
        seen = Counter(found[:number])
        for kind, share in shares.items():
            assert abs(seen[kind] - number * share / total) <= 1  # worst seen: 0.9


def test_without_a_balance_the_rare_stay_rare(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a", {"text": 57, "image": 5}), modality_balance={})
    found = Counter(kinds([*islice(stream(config), 60)]))
    assert found["image"] / found.total() < 0.15


def test_every_document_of_a_modality_is_seen_equally_often(tmp_path: Path) -> None:
    batches = [*islice(stream(config_of(write(tmp_path / "a", {"text": 57, "image": 5}))), 60)]
    seen = Counter(key for batch in batches for row in batch.keys for key in row)
    for kind, count in {"text": 57, "image": 5}.items():
        own = [times for key, times in seen.items() if key.startswith(kind)]
        assert len(own) == count
        assert max(own) - min(own) <= 1


def test_a_step_is_the_same_however_it_is_spread_and_seeds_differ(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a", {"text": 57, "image": 5}), lookahead=2)
    whole = [*islice(stream(config, micro_batch_size=8), 6)]
    ranks = [stream(config, micro_batch_size=2, grad_accum_steps=2, rank=rank, world_size=2) for rank in range(2)]
    for batch in whole:
        parts = [next(one) for one in ranks for _ in range(2)]
        assert torch.equal(batch.tokens, torch.cat([part.tokens for part in parts]))
        assert batch.keys == [row for part in parts for row in part.keys]
    assert [batch.keys for batch in islice(stream(config, micro_batch_size=8, seed=1), 6)] != [b.keys for b in whole]


def test_a_resumed_stream_goes_on_with_the_next_document(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a", {"text": 57, "image": 5, "both": 3}), lookahead=2)
    config = replace(config, modality_balance={"text": 2, "image": 1, "both": 1})
    rows = stream(config)
    for taken in range(13):
        resumed = stream(config, micro_batch_size=2, grad_accum_steps=2)  # between two steps the split may change
        resumed.load_state_dict(rows.state_dict())
        if taken % 4 == 0:
            again = stream(config)
            again.load_state_dict(rows.state_dict())
            rows = again
        batch = next(rows)
        assert batch.keys == [*next(resumed).keys, *next(resumed).keys]


def test_changed_shares_are_counted_from_the_resumption_on(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a", {"text": 57, "image": 25}))
    rows = stream(config)
    [*islice(rows, 20)]
    changed = stream(replace(config, modality_balance={"text": 3, "image": 1}))
    changed.load_state_dict(rows.state_dict())
    found = Counter(kinds([*islice(changed, 10)]))
    assert found["image"] / found.total() == pytest.approx(0.25, abs=0.02)


def test_a_balance_can_not_come_or_go_at_a_resumption(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a", {"text": 7, "image": 5}))
    plain = replace(config, modality_balance={})
    for before, after in ((config, plain), (plain, config)):
        with pytest.raises(ValueError, match=r"whether there is a modality_balance is .* the checkpoint was written"):
            stream(after).load_state_dict(stream(before).state_dict())


def test_several_sources_are_balanced_together_and_share_the_tokens_of_each_modality(tmp_path: Path) -> None:
    folders = {
        "talk": write(tmp_path / "talk", {"text": 40, "image": 3}),
        "questions": write(tmp_path / "questions", {"text": 11}),
    }
    config = config_of(folders)
    config.sources["talk"] = replace(config.sources["talk"], weight=3)
    rows = stream(config)
    found = kinds([*islice(rows, 60)])
    assert Counter(found)["image"] / len(found) == pytest.approx(0.5, abs=0.01)
    counted = counters(rows.state_dict())
    assert counted["tokens/talk/text"] / counted["tokens/questions/text"] == pytest.approx(3, abs=0.2)
    assert counted["answer_share/image"] == pytest.approx(0.5, abs=0.01)
    assert counted["documents/talk/image"] == Counter(found)["image"]


def test_a_modality_that_is_dropped_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    folders = {"talk": write(tmp_path / "talk", {"text": 40}), "draw": write(tmp_path / "draw", {"image": 3})}
    config = config_of(folders)
    config.sources["draw"] = replace(config.sources["draw"], when_done="drop")
    found = kinds([*islice(stream(config), 20)])
    assert Counter(found)["image"] == 3
    assert "image" not in found[8:]
    config.sources["draw"] = replace(config.sources["draw"], when_done="stop")
    assert len(kinds([*stream(config, micro_batch_size=1)])) <= 7


# limits


def test_limits_bound_the_shares_and_say_what_can_not_be_reached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(write(tmp_path / "a", {"text": 90, "image": 10}), share_limits=ShareLimits(up=3, down=0.3))
    rows = stream(config)
    (message,) = caplog.messages
    assert "image 30.0% (wanted 50.0%, stored 10.0%)" in message
    assert "text 70.0% (wanted 50.0%, stored 90.0%)" in message
    assert "widen the limits or bring more documents" in message
    found = Counter(kinds([*islice(rows, 60)]))
    assert found["image"] / found.total() == pytest.approx(0.3, abs=0.01)
    caplog.clear()
    stream(replace(config, share_limits=ShareLimits(up=5, down=0.3)))
    assert not caplog.messages


def test_limits_follow_the_stages(tmp_path: Path) -> None:
    folders = {"talk": write(tmp_path / "t", {"text": 30, "image": 10}), "more": write(tmp_path / "m", {"text": 60})}
    weights = {"talk": 1.0, "more": 0.0}
    sources = {name: SourceConfig(tokens=folder, weight=weights[name]) for name, folder in folders.items()}
    stages = (StageConfig(from_step=3, weights={"more": 1.0}),)
    config = config_of(folders, sources=sources, share_limits=ShareLimits(up=1.2, down=0.1), stages=stages)
    rows = stream(config)
    assert isinstance(rows.mixture, BalancedMixture)
    assert rows.mixture.shares == pytest.approx({"image": 0.3, "text": 0.7})
    [*islice(rows, 4)]
    assert rows.mixture.shares == pytest.approx({"image": 0.12, "text": 0.88})
    resumed = stream(config)
    resumed.load_state_dict(rows.state_dict())
    assert [batch.keys for batch in islice(resumed, 5)] == [batch.keys for batch in islice(rows, 5)]


# what can not act


@pytest.mark.parametrize(
    ("counts", "shares", "message"),
    [
        ({"text": 3}, HALVES, r"gives image a share, but there are no documents whose answers are image; leave it out"),
        ({"text": 3, "image": 3, "both": 2}, HALVES, r"does not name both, which the answers of 2 of 8 documents of"),
        ({"text": 3, "image": 3}, {"text": 1, "sound": 1}, r"'sound' is no modality; there are text, image, both"),
        ({"text": 3, "image": 3}, {"text": 1}, r"fewer than two modalities a share; name them, as in"),
        ({"text": 3, "image": 3}, {"text": 1, "image": 0}, r"fewer than two modalities a share"),
        ({"text": 3, "image": 3}, {"text": 1, "image": -1}, r"the share of image is -1; it must be at least 0"),
        ({"text": 3, "document": 2}, HALVES, r"2 of 5 documents, the first of them document-\d, are no conversations"),
    ],
)
def test_a_balance_that_can_not_act_is_refused(
    tmp_path: Path, counts: dict[str, int], shares: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^data\.modality_balance.*{message}"):
        stream(config_of(write(tmp_path / "a", counts), modality_balance=shares))


def test_documents_that_are_no_conversations_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"document": 4}, flags=False)
    with pytest.raises(ValueError, match=r"^data\.modality_balance: data .*a holds no conversations"):
        stream(config_of(folder))


def test_a_stage_without_a_wanted_modality_and_a_source_of_nothing_are_refused(tmp_path: Path) -> None:
    folders = {"talk": write(tmp_path / "talk", {"text": 4}), "draw": write(tmp_path / "draw", {"image": 3})}
    config = config_of(folders, stages=(StageConfig(from_step=5, weights={"draw": 0.0}),))
    with pytest.raises(ValueError, match=r"image a share, but from step 5, no source that has a weight has documents"):
        stream(config)
    folders = {"all": write(tmp_path / "all", {"text": 4, "image": 3}), "two": write(tmp_path / "two", {"both": 3})}
    with pytest.raises(ValueError, match=r"of data\.sources\.two .* nothing is trained on, since both has 0"):
        stream(config_of(folders, modality_balance={**HALVES, "both": 0}))


def test_the_balance_of_the_page_is_a_config(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```balance\n(.*?)```", page, re.DOTALL)
    config = yaml.safe_load((ROOT / "configs" / "train" / "tiny.yaml").read_text()) | yaml.safe_load(block)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    data = load_config(PretrainConfig, tmp_path / "config.yaml").data
    assert data.modality_balance == {"text": 0.45, "image": 0.45, "both": 0.1}
    assert data.share_limits == ShareLimits()


# what answers are


def test_modalities_are_those_of_what_carries_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TokenShards(write(tmp_path / "a", {"text": 9, "image": 8, "both": 5, "document": 4}, shard_size=7))
    expected = [key.split("-")[0] for key in shards.keys]  # of the prompts, which have both, nothing is seen
    for chunk in (1, 30, 1 << 22):
        monkeypatch.setattr(balance, "CHUNK_TOKENS", chunk)
        found = modalities_of(shards).tolist()
        names = [name_modalities(bits, VOCABULARY.modalities) if bits else "document" for bits in found]
        assert names == expected


def test_inspect_shows_the_shares_of_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, Any] = {"image_first_share": 0, "caption_dropout": 0, "objective": PLAIN.config, "seq_len": 64}
    shown |= {"modality_balance": HALVES, "share_limits": ShareLimits(up=3, down=0.3), "num_rows": 40}
    inspect(InspectConfig(data=write(tmp_path / "a", {"text": 90, "image": 10}), **shown))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    (image,) = [row for row in rows if row[:1] == ["image"] and len(row) == 6]
    assert float(image[2][:-1]) == pytest.approx(30, abs=1)
    assert image[3:] == ["50.0%", "30.0%", "10.0%"]
