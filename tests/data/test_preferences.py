"""Pairs of answers, from lines of JSON to rows in which both stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.data.augment import AugmentConfig
from mixmodal.data.corpora import CorpusConfig, CorpusKind, PrepareConfig, prepare
from mixmodal.data.inspect import InspectConfig, inspect
from mixmodal.data.packing import TrainingDocument as Row
from mixmodal.data.packing import build_batch, split_pairs
from mixmodal.data.preferences import is_pair
from mixmodal.data.shards import PictureFile, Sample, read_samples, write_shards
from mixmodal.data.skipping import SampleLimits
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import SequenceError
from mixmodal.objectives.causal_masked import CausalMaskedConfig

PROMPT = [{"role": "user", "parts": [{"image": "a.png"}, {"text": "make it darker"}]}]
PAIR = {
    "key": "p",
    "task": "editing",
    "messages": PROMPT,
    "chosen": [{"image": "b.png"}],
    "rejected": [{"text": "no "}, {"image": "c.png"}],
}
WORDS = {"messages": [{"role": "user", "content": "which?"}], "chosen": "the red", "rejected": "the blue"}
Prepare = Callable[..., tuple[dict[str, Any], list[Sample]]]


@pytest.fixture
def prepared(tmp_path: Path, build_picture: Callable[[int], PictureFile]) -> Prepare:
    """The report and the samples of lines beside the pictures a.png, b.png and c.png, and d.png, a copy of b.png."""
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(build_picture(number).data)
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes())

    def prepared(rows: list[Any], kind: CorpusKind = "preferences") -> tuple[dict[str, Any], list[Sample]]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report = prepare(
            PrepareConfig(
                corpora=(CorpusConfig(kind=kind, path=tmp_path / "rows.jsonl"),),
                out=tmp_path / "out",
                limits=SampleLimits(max_skipped_share=1.0),
            )
        )
        return report, list(read_samples(tmp_path / "out/shards"))

    return prepared


def test_pairs_go_through_shards_and_back(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    report, (pair, words) = prepared([PAIR, WORDS])
    assert is_pair(pair.messages)
    assert is_pair(words.messages)
    assert [message.role for message in pair.messages] == ["user", "assistant", "assistant"]
    assert pair.losses == (False, False, True, True, True)
    assert [part if isinstance(part, str) else "picture" for part in pair.parts] == [
        "picture", "make it darker", "picture", "no ", "picture",
    ]  # fmt: skip
    assert pair.metadata["task"] == "editing"
    assert set(pair.metadata) == {"key", "task", "source"}
    (corpus,) = report["shards"]["corpora"]
    assert corpus["conversations"]["pairs"] == 2
    assert "2 conversations, 2 of them pairs of answers" in capsys.readouterr().out


def test_the_prompts_of_several_turns_carry_no_loss(prepared: Prepare) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    _, (sample,) = prepared([{**WORDS, "messages": turns}])
    assert sample.losses == (False, False, False, True, True)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("missing field", {"rejected": None}, "a pair needs messages, chosen, rejected; rejected is not there"),
    ("equal answers", {"rejected": PAIR["chosen"]}, "chosen and rejected are the same"),
    ("equal answers", {"rejected": [{"image": "d.png"}]}, "the same texts and pictures"),
    ("empty answer", {"chosen": []}, "with chosen as the answer: message 2: the answer has no parts"),
    ("empty answer", {"rejected": " "}, "with rejected as the answer: message 2, part 1: the text is empty"),
    ("broken metadata", {"chosen": 3}, "chosen is '3'; give one text, or parts"),
    ("no picture", {"chosen": [{"image": "gone.png"}]}, "gone.png: the file can not be read"),
    ("unknown role", {"messages": [{"role": "judge", "content": "a"}]}, "of the role 'judge'"),
    ("wrong turn", {"messages": [*PROMPT, {"role": "assistant", "content": "b"}]}, "message 3 is of the assistant"),
    ("loss on nothing", {"chosen": [{"text": "x", "loss": True}]}, "take the flag away"),
]


@pytest.mark.parametrize(("reason", "change", "said"), BAD)
def test_what_is_no_pair_is_named_and_counted(
    prepared: Prepare, reason: str, change: dict[str, Any], said: str
) -> None:
    bad = {key: value for key, value in {**PAIR, **change}.items() if value is not None}
    report, samples = prepared([bad, WORDS])
    (corpus,) = report["shards"]["corpora"]
    assert corpus["skipped"] == {reason: 1}
    assert "rows.jsonl:1" in corpus["examples"][0]
    assert "(p)" in corpus["examples"][0]
    assert said in corpus["examples"][0]
    assert len(samples) == 1


def test_a_conversation_with_answers_beside_it_is_sent_to_its_kind(prepared: Prepare) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report, _ = prepared([{**talk, "chosen": "c"}, talk], "conversations")
    assert "kind preferences" in report["shards"]["corpora"][0]["examples"][0]


def conversations(shards: TokenShards, index: int) -> list[np.ndarray]:
    """Ids of both conversations of a pair."""
    ids = shards[index]
    starts = np.flatnonzero(ids == shards.vocabulary.bos)
    return np.split(ids, starts[1:])


def test_a_pair_is_one_document_of_two_conversations_with_one_prompt(
    prepared: Prepare, write_tokens: Callable[..., TokenShards], tmp_path: Path
) -> None:
    prepared([PAIR, WORDS])
    changes = {"num_variants": 2, "augment": AugmentConfig(flip_share=1.0)}
    shards = write_tokens([tmp_path / "out/shards"], **changes)
    assert shards.has_pairs
    assert list(shards.keys) == [f"{key:09d}#{variant}" for key in range(2) for variant in range(2)]
    prompts = []
    for index in range(4):
        chosen, rejected = conversations(shards, index)
        loss = shards.loss(index)
        assert loss is not None
        flags = loss[: len(chosen)], loss[len(chosen) :]
        starts = [int(np.flatnonzero(own)[0]) for own in flags]
        assert all(own[start:].all() for own, start in zip(flags, starts))  # to </s>
        assert starts[0] == starts[1]
        assert (chosen[: starts[0]] == rejected[: starts[1]]).all()
        assert not np.array_equal(chosen, rejected)
        prompts.append(chosen[: starts[0]].tolist())
    assert prompts[0] != prompts[1]  # the picture of the prompt is changed, and alike for both
    assert prompts[2] == prompts[3]


def test_answers_that_become_the_same_tokens_are_counted(
    prepared: Prepare, write_tokens: Callable[..., TokenShards], tmp_path: Path
) -> None:
    prepared([{**PAIR, "rejected": [{"image": "c.png"}]}])
    (found,) = read_samples(tmp_path / "out/shards")
    *prompt, chosen, _ = found.parts
    assert isinstance(chosen, PictureFile)
    shutter = PictureFile(chosen.data + b"\0", chosen.suffix, chosen.name)  # other bytes of the same picture
    write_shards([Sample("0", (*prompt, chosen, shutter), {}, "", found.messages)], tmp_path / "same")
    shards = write_tokens([tmp_path / "same"])
    assert shards.manifest["counts"]["altered"] == {"equal tokens": 1}


def test_rows_are_split_into_pairs_of_segments() -> None:
    bos, other = 1, 5
    rows = [[Row("a", np.array([bos, 5, 6, bos, 5]), np.ones(5)), Row("b", np.array([bos, 7, bos, 8]), np.ones(4))], []]
    batch = split_pairs(build_batch(rows, 11, 0), bos)
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 0]
    assert batch.document_lengths.tolist() == [3, 2, 2, 2]
    assert not batch.segment_ids[1].any()
    assert torch.equal(batch.positions[1], torch.zeros(11, dtype=torch.int64))
    single = build_batch([[Row("x", np.array([bos, other]), np.ones(2))]], 4, 0)
    with pytest.raises(SequenceError, match="document x holds 1 conversations"):
        split_pairs(single, bos)


def test_pairs_beside_other_samples_are_refused(
    prepared: Prepare, write_tokens: Callable[..., TokenShards], build_shards: Callable[..., Path], tmp_path: Path
) -> None:
    prepared([PAIR])
    with pytest.raises(ValueError, match="1 of 8 documents are pairs"):
        write_tokens([tmp_path / "out/shards", build_shards()])
    kinds = [CorpusConfig(kind=kind, path=tmp_path) for kind in ("preferences", "folder")]
    with pytest.raises(ValueError, match="not beside folder"):
        PrepareConfig(corpora=tuple(kinds), out=tmp_path / "other")


def test_pairs_are_shown_without_masks(
    prepared: Prepare,
    write_tokens: Callable[..., TokenShards],
    text_tokenizer_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared([WORDS])
    shards = write_tokens([tmp_path / "out/shards"])
    options: dict[str, Any] = {
        "data": shards.folder, "text_tokenizer": text_tokenizer_path, "num_rows": 1, "image_first_share": 0,
        "caption_dropout": 0, "seq_len": 80,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no masks are drawn in pairs"):
        inspect(InspectConfig(**options))
    inspect(InspectConfig(**options, objective=CausalMaskedConfig(min_masks=0, max_masks=0)))
    assert "which?*0 <end_of_turn>*0 the red <end_of_turn> </s> <s>*0 which?*0" in capsys.readouterr().out


def test_the_pairs_of_the_page_are_pairs(prepared: Prepare) -> None:
    page = (Path(__file__).parents[2] / "docs/finetune.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.partition("```pairs\n")[2].partition("```")[0].splitlines()]
    report, samples = prepared(rows)
    assert report["shards"]["corpora"][0]["skipped"] == {}
    assert len(samples) == 2
