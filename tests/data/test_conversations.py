"""Messages come back from shards as they were, and what is wrong with them is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmodal.data.conversations import ConversationCounter, Message, dump_messages, parse_messages
from mixmodal.data.shards import PictureFile, Sample, read_samples, write_shards
from mixmodal.data.skipping import SampleError, SkipCounter

USER = {"role": "user", "parts": [{"image": "a.png"}, {"text": "What is this?"}]}
ANSWER = {"role": "assistant", "content": "An apple."}

flags = st.lists(st.booleans(), min_size=1, max_size=3).map(tuple)
pairs = st.lists(st.tuples(flags, flags), min_size=1, max_size=3)


def messages_of(pairs: list[tuple[tuple[bool, ...], tuple[bool, ...]]]) -> list[Message]:
    return [Message(role, found) for pair in pairs for role, found in zip(("user", "assistant"), pair)]  # type: ignore[arg-type]


@given(pairs=pairs, system=flags | st.none())
def test_messages_come_back_as_they_were(
    pairs: list[tuple[tuple[bool, ...], tuple[bool, ...]]], system: tuple[bool, ...] | None
) -> None:
    messages = [*([Message("system", system)] if system else []), *messages_of(pairs)]
    if not any(flag for message in messages for flag in message.loss):
        return
    count = sum(message.num_parts for message in messages)
    entries = [{"text": f"t{i}"} if i % 2 else {"image": f"{i}.png"} for i in range(count)]
    rows = json.loads(json.dumps(dump_messages(messages, entries)))
    found, parts = parse_messages(rows, "here")
    assert list(found) == messages
    assert [{key: value for key, value in part.items() if key != "loss"} for part in parts] == entries


def test_only_the_parts_of_the_assistant_have_loss_by_default() -> None:
    rows = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    messages, entries = parse_messages(rows, "here")
    assert messages == (Message("system", (False,)), Message("user", (False, False)), Message("assistant", (True,)))
    assert entries == [{"text": "Be brief."}, *USER["parts"], {"text": "An apple."}]
    assert "loss" not in json.dumps(dump_messages(messages, entries))


@pytest.mark.parametrize(
    ("rows", "reason", "said"),
    [
        ("hello", "empty document", "no list"),
        ([], "empty document", "empty"),
        (["hello"], "broken metadata", "message 1 is not an object"),
        ([{"role": "human", "content": "a"}], "unknown role", "message 1 .*'human'; take system, user, assistant"),
        ([{"content": "a"}], "unknown role", "message 1 .*'None'"),
        ([USER], "no assistant message", "no message is of the assistant"),
        ([ANSWER], "wrong turn", "message 1 is of the assistant where the user must speak"),
        ([USER, ANSWER, ANSWER], "wrong turn", "message 3"),
        ([USER, ANSWER, {"role": "system", "content": "a"}], "wrong turn", "message 3 is of the system"),
        ([USER, ANSWER, USER], "wrong turn", "the last message is of the user"),
        ([USER, {"role": "assistant", "parts": []}], "empty answer", "message 2"),
        ([USER, {"role": "assistant", "content": " "}], "empty answer", "message 2, part 1"),
        ([{"role": "user", "parts": []}, ANSWER], "empty text", "message 1"),
        ([{"role": "user", "parts": "a"}, ANSWER], "broken metadata", "parts is not a list"),
        ([{"role": "user", "content": "a", "parts": []}, ANSWER], "broken metadata", "either parts"),
        ([{"role": "user", "parts": [{"sound": "a"}]}, ANSWER], "broken metadata", "either a text or an image"),
        (
            [{"role": "user", "content": [{"text": "a"}]}, ANSWER],
            "broken metadata",
            "content is .*give one text, or parts",
        ),
        ([{"role": "user", "content": None}, ANSWER], "broken metadata", "message 1: content is 'None'"),
        ([{"role": "user", "parts": [{"text": "a", "image": "b"}]}, ANSWER], "broken metadata", "must be either"),
        ([USER, {"role": "assistant", "parts": [{"loss": True}]}], "loss on nothing", "message 2, part 1"),
        ([USER, {**ANSWER, "loss": True}], "loss on nothing", "message 2 has a loss flag, which acts on parts"),
        ([USER, {"role": "assistant", "parts": [{"text": "a", "loss": False}]}], "loss on nothing", "every part"),
        ([USER, {"role": "assistant", "parts": [{"text": "a", "loss": 1}]}], "broken metadata", "loss is '1'"),
    ],
)
def test_what_is_no_conversation_is_named(rows: Any, reason: str, said: str) -> None:
    with pytest.raises(SampleError, match=f"^shard:7.*{said}") as caught:
        parse_messages(rows, "shard:7")
    assert caught.value.reason == reason


def test_conversations_come_back_from_shards(tmp_path: Path, build_picture: Callable[[int], PictureFile]) -> None:
    messages = (Message("user", (False, True)), Message("assistant", (True, False)))
    parts = (build_picture(1), "Make it blue.", "Here.", build_picture(2))
    (path,) = write_shards([Sample("a", parts, {"task": "editing"}, "", messages)], tmp_path)
    with tarfile.open(path) as archive:
        assert sorted(archive.getnames()) == ["a.0.png", "a.3.png", "a.json"]
        held = archive.extractfile("a.json")
        assert held is not None
        assert json.loads(held.read())["messages"][1]["parts"] == [{"text": "Here."}, {"image": "3.png", "loss": False}]
    (sample,) = read_samples(tmp_path)
    assert (sample.messages, sample.metadata) == (messages, {"task": "editing"})
    assert [part if isinstance(part, str) else part.data for part in sample.parts] == [
        part if isinstance(part, str) else part.data for part in parts
    ]
    assert sample.losses == (False, True, True, False)


def test_a_text_and_a_picture_stay_a_conversation(tmp_path: Path, build_picture: Callable[[int], PictureFile]) -> None:
    messages = (Message("user", (False,)), Message("assistant", (True,)))
    write_shards([Sample("a", ("Draw.", build_picture(1)), {}, "", messages)], tmp_path)
    (sample,) = read_samples(tmp_path)
    assert sample.messages == messages


def test_conversations_are_counted_by_task_role_and_modality_of_answers() -> None:
    counter = ConversationCounter()
    assert counter.to_dict() == {}
    turn = (Message("user", (False, False)), Message("assistant", (True,)))
    counter.add(turn, ["image", "text", "text"], "questions")
    counter.add(turn, ["image", "text", "image"], None)
    both = (Message("system", (False,)), Message("user", (False,)), Message("assistant", (True, True)))
    counter.add(both, ["text", "text", "text", "image"], "questions")
    counter.add((), ["text"], None)
    assert counter.to_dict() == {
        "conversations": {
            "samples": 3,
            "tasks": {"(none)": 1, "questions": 2},
            "messages": {"assistant": 3, "system": 1, "user": 3},
            "answers": {"both": 1, "image": 1, "text": 1},
        }
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "user", "parts": [{"image": "5.png"}]}, ANSWER]}, "no picture"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": None}, "empty document"),
        ({"task": ["a"]}, "broken metadata"),
    ],
)
def test_bad_conversation_of_a_shard_is_counted_and_named_by_shard_and_key(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, ANSWER]}
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for key, row in (("x", {**good, **change}), ("y", good)):
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    counter = SkipCounter(max_share=1.0)
    assert [sample.key for sample in read_samples(tmp_path, counter)] == ["y"]
    assert counter.skipped == {reason: 1}
    assert f"{tmp_path / '00000.tar'}:x" in counter.examples[0]
