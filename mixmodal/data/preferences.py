"""Pairs of answers to one prompt, of which one is preferred, and conversations and pairs alike on their way to tokens.

    {"key": "p7", "messages": [{"role": "user", "content": "Draw a red apple."}],
     "chosen": [{"image": "a.png"}], "rejected": [{"image": "b.png"}]}

This is a line of a JSONL file and, with its own pictures' names, the JSON of a sample in shards. A sample holds it as
messages of which the last two are both the assistant's, the chosen answer and the rejected one; no conversation has two
messages of one speaker side by side. In token shards it is one document: the conversation with the chosen answer from
`<s>` to `</s>`, and behind it the one with the rejected answer, which nothing can part on the way into a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixmodal.data.conversations import Message, dump_messages, is_pair, parse_messages, turns_of
from mixmodal.data.skipping import SampleError
from mixmodal.document import Part, SequenceFormat, spell_turns

CHOSEN, REJECTED = ANSWERS = ("chosen", "rejected")
KEYS = ("messages", *ANSWERS)
"""What a pair is written with."""


def parse_pair(row: Mapping[str, Any], source: str) -> tuple[tuple[Message, ...], list[dict[str, Any]]]:
    """Messages of a pair and the entries of all their parts, the rejected answer's last; see `parse_messages`.

    `chosen` and `rejected` are parts, or one text each. Loss is on these alone.

    Raises:
        SampleError: naming `source` and what is wrong.
    """
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise SampleError("missing field", f"{source}: a pair needs {', '.join(KEYS)}; {missing[0]} is not there")
    if row[CHOSEN] == row[REJECTED]:
        raise SampleError("equal answers", f"{source}: chosen and rejected are the same")
    for key in ANSWERS:
        if not isinstance(row[key], (str, list)):
            raise SampleError("broken metadata", f"{source}: {key} is {str(row[key])[:40]!r}; give one text, or parts")
    prompt = row["messages"]
    if not isinstance(prompt, list) or not prompt:
        raise SampleError("empty document", f"{source}: messages is no list, or empty")
    chosen, entries = _parse_with(prompt, row[CHOSEN], f"{source}: with chosen as the answer")
    rejected, others = _parse_with(prompt, row[REJECTED], f"{source}: with rejected as the answer")
    return (*chosen, rejected[-1]), entries + others[len(others) - rejected[-1].num_parts :]


def _parse_with(prompt: list[Any], answer: Any, source: str) -> tuple[tuple[Message, ...], list[dict[str, Any]]]:
    content = "content" if isinstance(answer, str) else "parts"
    messages, entries = parse_messages([*prompt, {"role": "assistant", content: answer}], source)
    if any("loss" in entry for entry in entries):
        raise SampleError("loss on nothing", f"{source}: a pair has loss on its answers alone; take the flag away")
    *before, last = messages
    return (*(Message(one.role, (False,) * one.num_parts) for one in before), last), entries


def parse_conversation(row: Mapping[str, Any], source: str) -> tuple[tuple[Message, ...], list[dict[str, Any]]]:
    """Messages of a conversation, or of a pair where the row has answers beside them.

    Raises:
        SampleError: see `parse_messages` and `parse_pair`.
    """
    if any(key in row for key in ANSWERS):
        return parse_pair(row, source)
    return parse_messages(row["messages"], source)


def dump_conversation(messages: Sequence[Message], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `parse_conversation`."""
    if not is_pair(messages):
        return {"messages": dump_messages(messages, entries)}
    stop = len(entries) - messages[-1].num_parts
    start = stop - messages[-2].num_parts
    prompt = [Message(one.role, (one.role == "assistant",) * one.num_parts) for one in messages[:-2]]  # no flags
    return {
        "messages": dump_messages(prompt, entries[:start]),
        CHOSEN: list(map(dict, entries[start:stop])),
        REJECTED: list(map(dict, entries[stop:])),
    }


def spell_conversation(
    spelling: SequenceFormat, messages: Sequence[Message], parts: Sequence[Part]
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as `spell_turns` spells it; of a pair both of its conversations, one behind the other.

    Args:
        spelling: of the sequence.
        messages: of the sample.
        parts: of all messages, in order.
    """
    if not is_pair(messages):
        return spell_turns(spelling, turns_of(messages, parts))
    *prompt, chosen, rejected = messages
    stop = len(parts) - rejected.num_parts
    start = stop - chosen.num_parts
    spelled = [
        spell_turns(spelling, turns_of([*prompt, answer], [*parts[:start], *found]))
        for answer, found in ((chosen, parts[start:stop]), (rejected, parts[stop:]))
    ]
    return np.concatenate([ids for ids, _ in spelled]), np.concatenate([loss for _, loss in spelled])


def answers_equal(ids: np.ndarray, bos: int) -> bool:
    """Whether both conversations of a pair, ids `(T,)`, are the same tokens."""
    half = len(ids) // 2
    return len(ids) % 2 == 0 and ids[half] == bos and bool((ids[:half] == ids[half:]).all())
