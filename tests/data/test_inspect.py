"""`mixmodal inspect` shows what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.data.inspect import InspectConfig, inspect, stretches_of
from mixmodal.data.mixture import ShareLimits, StageConfig
from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import build_manifest, write_token_shard
from mixmodal.document import Run, build_format
from mixmodal.manifests import write_manifest
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.tokenization import text as text_module
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=256, num_sentinels=20))
FORMAT = build_format("cm3leon", VOCABULARY, {"image": (2, 3)})


class ByteTokenizer:
    """A piece is a byte."""

    sha256 = "a" * 64

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: Sequence[int]) -> str:
        return bytes(pieces).decode(errors="replace")

    @classmethod
    def load(cls, path: Path) -> ByteTokenizer:
        assert path.is_file()
        return cls()


def shards(folder: Path, texts: Sequence[str], text_sha256: str = "a" * 64, key: str = "key") -> InspectConfig:
    image = Run("image", np.arange(4, 10))
    documents = [
        FORMAT.join([Run("text", VOCABULARY.to_ids("text", np.array(list(text.encode())))), image]) for text in texts
    ]
    keys = [f"{key}{i}" for i in range(len(texts))]
    folder.mkdir(exist_ok=True)
    entry = write_token_shard(folder, "shard_00000", documents, keys, VOCABULARY.size)
    counts = {"documents": len(texts), "skipped": {}}
    write_manifest(
        folder,
        build_manifest(
            FORMAT, [entry], text_tokenizer_sha256=text_sha256, image_tokenizer_sha256="b" * 64, counts=counts
        ),
    )
    plain = CausalMaskedConfig(min_masks=0, poisson_rate=0)
    return InspectConfig(data=folder, objective=plain, seq_len=60, num_rows=2, image_first_share=0, caption_dropout=0)


@pytest.fixture
def byte_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(text_module, "TextTokenizer", ByteTokenizer)
    path = tmp_path / "bytes.model"
    path.touch()
    return path


def test_text_codes_and_control_tokens_are_readable(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(shards(tmp_path, ["a [red] square"] * 4), text_tokenizer=byte_tokenizer)
    inspect(config)
    printed = capsys.readouterr().out
    assert "<s>*0 a [red] square <break> [image 0 1 2 3 4 5] </s>" in printed
    assert printed.count("row ") == 2
    assert "2 documents, 46 of 60 tokens" in printed
    assert "key0" in printed
    assert all(name in printed for name in ("text", "image", "control", "padding"))


def test_masks_show_where_they_stand_and_that_they_weigh_nothing(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(shards(tmp_path, ["a red square"] * 4), objective=CausalMaskedConfig(min_masks=1, max_masks=1))
    inspect(config)
    printed = capsys.readouterr().out
    documents = [line for line in printed.splitlines() if line.startswith("<s>*0")]
    assert len(documents) >= 2
    assert all(line.count("<mask:0>*0") == 2 and line.endswith("<eoss> </s> ") for line in documents)


def test_first_part_shows_the_weight_it_is_trained_with(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(replace(shards(tmp_path, ["a red square"] * 4), first_part_weight=0.25))
    assert "<s>*0 a red square*0.25 <break> [image 0 1 2 3 4 5] </s>" in capsys.readouterr().out


def test_totals_count_every_token_once(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(shards(tmp_path, ["0123456789"] * 4))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    totals = {row[0]: row[1:] for row in rows if len(row) == 4 and row[2].endswith("%")}
    assert totals == {
        "text": ["60", "50.0%", "60"],
        "image": ["36", "30.0%", "36"],
        "control": ["18", "15.0%", "12"],
        "padding": ["6", "5.0%", "0"],
        "all": ["120", "100.0%", "108"],
    }


def test_a_text_tokenizer_beside_the_shards_is_found_if_it_is_theirs(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(shards(tmp_path, ["hello"]))
    assert "hello" in capsys.readouterr().out
    inspect(shards(tmp_path, ["hello"], text_sha256="c" * 64))
    printed = capsys.readouterr().out
    assert "hello" not in printed
    assert "[text 104 101 108 108 111]" in printed
    assert "--text_tokenizer FILE" in printed


def test_another_text_tokenizer_is_refused(tmp_path: Path, byte_tokenizer: Path) -> None:
    config = replace(shards(tmp_path, ["hello"], text_sha256="c" * 64), text_tokenizer=byte_tokenizer)
    with pytest.raises(ValueError, match="text_tokenizer_sha256"):
        inspect(config)


def test_the_source_of_each_document_and_its_share_are_shown(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shards(tmp_path / "web", ["0123456789"] * 4)
    shards(tmp_path / "books", ["abcdefghij"] * 4)
    sources = {
        "web": SourceConfig(tokens=tmp_path / "web", weight=2),
        "books": SourceConfig(tokens=tmp_path / "books"),
    }
    inspect(replace(config, data=None, sources=sources, num_rows=6))
    printed = capsys.readouterr().out
    assert printed.count("web:key") == 2 * printed.count("books:key") == 12
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    assert ["web", "12", "228", "66.7%", "66.7%", "3.000"] in rows
    assert ["books", "6", "114", "33.3%", "33.3%", "1.750"] in rows  # one is drawn already
    with pytest.raises(ValueError, match=r"either data, .* or sources"):
        replace(config, sources=sources)


def test_limits_and_stages_are_those_of_training(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shards(tmp_path / "web", ["0123456789"] * 16)
    shards(tmp_path / "books", ["abcdefghij"] * 4)
    shards(tmp_path / "late", ["ABCDEFGHIJ"] * 5)
    sources = {name: SourceConfig(tokens=tmp_path / name) for name in ("web", "books")}
    sources["late"] = SourceConfig(tokens=tmp_path / "late", weight=0)
    stages = (StageConfig(from_step=7, weights={"books": 0.0, "late": 1.0}),)
    config = replace(config, data=None, sources=sources, stages=stages, num_rows=10)

    def wanted(**options: Any) -> dict[str, str]:
        inspect(replace(config, **options))
        rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
        return {row[0]: row[4] for row in rows if len(row) == 6 and row[0] in sources}

    assert wanted() == {"web": "50.0%", "books": "50.0%"}
    assert wanted(share_limits=ShareLimits(up=1.5)) == {"web": "70.0%", "books": "30.0%"}
    assert wanted(step=6) == wanted()
    assert wanted(step=7) == {"web": "50.0%", "late": "50.0%"}
    only = (StageConfig(from_step=7, weights={"web": 0.0, "late": 1.0, "books": 0.0}),)
    assert wanted(step=7, stages=only, share_limits=ShareLimits()) == {"late": "100.0%"}
    for options in ({"step": -1}, {"step": 3, "stages": ()}):
        with pytest.raises(ValueError, match=r"step is -?\d; it must not be negative, and acts with stages alone"):
            replace(config, **options)


def test_text_and_keys_can_not_steer_the_terminal(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(shards(tmp_path, ["\x1b[2J\nred"], key="\x1b[1A\n\udc80"))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"\x1b[1A\n\udc800" in printed  # the last digit is that of the document
    assert r"\x1b[2J\nred" in printed


def test_long_parts_are_shortened(tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(replace(shards(tmp_path, ["hello"]), max_codes=2))
    assert "[image 0 1 ..4 more]" in capsys.readouterr().out


@pytest.mark.parametrize("option", [{"num_rows": 0}, {"max_codes": -1}, {"seed": -1}, {"step": 1}])
def test_options_that_can_not_act_are_named(tmp_path: Path, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"inspect: {next(iter(option))} is"):
        InspectConfig(data=tmp_path, **option)  # type: ignore[arg-type]


def test_stretches_end_where_the_kind_or_the_weight_changes() -> None:
    a = VOCABULARY.ids("text").start
    mask = VOCABULARY.sentinel(0)
    ids = np.array([0, a, a, a, mask, mask, 4, 5, 2])
    weights = np.array([0, 1, 1, 0.5, 0, 0, 1, 1, 1], dtype=np.float32)
    found = [(s.kind, s.weight, len(s.ids)) for s in stretches_of(ids, weights, VOCABULARY)]
    assert found == [
        ("control", 0, 1),
        ("text", 1, 2),
        ("text", 0.5, 1),
        ("sentinel", 0, 1),
        ("sentinel", 0, 1),
        ("image", 1, 2),
        ("control", 1, 1),
    ]
