"""Texts longer than is allowed: captions are cut, conversations and tasks are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixmodal.data.corpora import CorpusConfig, CorpusKind, PrepareConfig, prepare
from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SampleLimits, SkipCounter

LONG = "one two three four five six"
TEMPLATES = """
tasks:
  questions: [[{user: "Say it. {question}"}, {assistant: "{answer}"}]]
  told: ["Question: {question} Answer: {answer}."]
"""


def asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepared(tmp_path: Path, kind: CorpusKind, rows: list[dict[str, Any]], words: int) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "templates.yaml").write_text(TEMPLATES)
    templates = tmp_path / "templates.yaml" if kind == "tasks" else None
    corpus = CorpusConfig(kind=kind, path=tmp_path / "rows.jsonl", templates=templates)
    limits = SampleLimits(max_caption_words=words, max_skipped_share=1.0)
    return prepare(PrepareConfig(corpora=(corpus,), out=tmp_path / f"out{words}", limits=limits))


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("conversations", asked("a", "b"), asked("a", LONG)),
        ("conversations", asked("a", "b"), asked(LONG, "b")),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": LONG}]},
        ),
        (
            "tasks",
            {"task": "questions", "question": "a", "answer": "b"},
            {"task": "questions", "question": LONG, "answer": "b"},
        ),
        ("tasks", {"task": "told", "question": "a", "answer": "b"}, {"task": "told", "question": LONG, "answer": "b"}),
    ],
)
def test_a_conversation_or_task_with_a_long_text_is_skipped_and_named(
    tmp_path: Path, kind: CorpusKind, short: dict[str, Any], long: dict[str, Any]
) -> None:
    (corpus,) = prepared(tmp_path, kind, [short, {**long, "key": "k7"}], words=5)["shards"]["corpora"]
    assert (corpus["used"], corpus["skipped"], corpus["altered"]) == (1, {"text too long": 1}, {})
    (said,) = corpus["examples"]
    assert "rows.jsonl:2 (k7): a text has more than 5 words; raise limits.max_caption_words" in said
    (corpus,) = prepared(tmp_path, kind, [short, long], words=20)["shards"]["corpora"]
    assert (corpus["used"], corpus["skipped"]) == (2, {})
    counter = SkipCounter(1.0)  # shards of others are read with limits of their own
    found = list(read_samples(tmp_path / "out20/shards", counter, SampleLimits(max_caption_words=5)))
    assert (len(found), counter.skipped, counter.altered) == (1, {"text too long": 1}, {})


def test_other_documents_are_cut_as_before(tmp_path: Path) -> None:
    report = prepared(tmp_path, "obelics", [{"texts": [LONG], "images": [None]}], words=5)
    (corpus,) = report["shards"]["corpora"]
    assert (corpus["used"], corpus["altered"]) == (1, {"truncated text": 1})
