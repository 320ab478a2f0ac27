"""Conversations: messages of a system, a user and an assistant, with texts and pictures in any order.

    {"key": "a7", "task": "editing", "messages": [
      {"role": "user", "parts": [{"image": "a.png"}, {"text": "Make it blue."}]},
      {"role": "assistant", "parts": [{"text": "Here."}, {"image": "b.png"}]}]}

This is a line of a JSONL file and, with its own pictures' names, the JSON of a sample in shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

from mixmodal.data.skipping import SampleError
from mixmodal.document import Part, Turn

Role = Literal["system", "user", "assistant"]
Modality = Literal["text", "image"]
ROLES: tuple[Role, ...] = get_args(Role)
NO_TASK = "(none)"
"""What samples without a task are counted under."""


@dataclass(frozen=True)
class Message:
    """Whose some parts of a sample are, and which of them are trained on.

    Args:
        role: who speaks.
        loss: one flag for each of its parts.
    """

    role: Role
    loss: tuple[bool, ...]

    @property
    def num_parts(self) -> int:
        return len(self.loss)


def is_pair(messages: Sequence[Message]) -> bool:
    """Whether the last two messages are a chosen and a rejected answer, see `mixmodal.data.preferences`."""
    return [message.role for message in messages[-2:]] == ["assistant"] * 2


def parse_messages(rows: Any, source: str) -> tuple[tuple[Message, ...], list[dict[str, Any]]]:
    """Messages as they stand in JSON, and the entries `{"text": ...}` or `{"image": ...}` of all their parts in order.

    A message is `{"role": ..., "parts": [...]}`, or has `content`, one text, in the place of `parts`. A part may say
    `loss`: true or false; by default those of the assistant have it, and no others.

    At most one system message begins a conversation. Then user and assistant take turns, the user first and the
    assistant last: nothing in a sequence says who speaks but the number of turns before.

    Raises:
        SampleError: naming `source` and the message, counted from 1.
    """
    if not isinstance(rows, list) or not rows:
        raise SampleError("empty document", f"{source}: messages is no list, or empty")
    messages: list[Message] = []
    entries: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        message, parts = _parse_message(row, f"{source}: message {number}")
        messages.append(message)
        entries += parts
    _check_turns(messages, source)
    if not any(flag for message in messages for flag in message.loss):
        raise SampleError("loss on nothing", f"{source}: loss is false on every part; take one away, or the sample")
    return tuple(messages), entries


def _parse_message(row: Any, place: str) -> tuple[Message, list[dict[str, Any]]]:
    if not isinstance(row, dict):
        raise SampleError("broken metadata", f"{place} is not an object")
    role = row.get("role")
    if role not in ROLES:
        raise SampleError("unknown role", f"{place} is of the role {str(role)[:40]!r}; take {', '.join(ROLES)}")
    if "loss" in row:
        raise SampleError("loss on nothing", f"{place} has a loss flag, which acts on parts alone; set it on those")
    if ("parts" in row) == ("content" in row):
        raise SampleError("broken metadata", f"{place} must have either parts, a list, or content, a text")
    parts = row["parts"] if "parts" in row else [{"text": row["content"]}]
    if not isinstance(parts, list):
        raise SampleError("broken metadata", f"{place}: parts is not a list")
    if "content" in row and not isinstance(row["content"], str):
        raise SampleError(
            "broken metadata", f"{place}: content is {str(row['content'])[:40]!r}; give one text, or parts"
        )
    is_answer = role == "assistant"
    empty = ("empty answer", "the answer") if is_answer else ("empty text", "the message")
    if not parts:
        raise SampleError(empty[0], f"{place}: {empty[1]} has no parts")
    flags: list[bool] = []
    for at, part in enumerate(parts, start=1):
        modality = _modality(part, f"{place}, part {at}")
        if modality == "text" and not part["text"].strip():
            raise SampleError(empty[0], f"{place}, part {at}: the text is empty")
        flag = part.get("loss", is_answer)
        if not isinstance(flag, bool):
            raise SampleError("broken metadata", f"{place}, part {at}: loss is {str(flag)[:40]!r}; take true or false")
        flags.append(flag)
    return Message(role, tuple(flags)), parts


def _modality(part: Any, place: str) -> Modality:
    """Which of the two a part is."""
    found: list[Modality] = []
    if isinstance(part, dict):
        found = [key for key in get_args(Modality) if isinstance(part.get(key), str)]
    if isinstance(part, dict) and not found and "loss" in part:
        raise SampleError("loss on nothing", f"{place} has a loss flag and neither a text nor an image")
    if len(found) != 1:
        raise SampleError("broken metadata", f"{place}: {str(part)[:80]!r} must be either a text or an image")
    return found[0]


def _check_turns(messages: Sequence[Message], source: str) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise SampleError("no assistant message", f"{source}: no message is of the assistant, so nothing is learned")
    spoken = roles[1:] if roles[0] == "system" else roles
    first = len(roles) - len(spoken) + 1
    for place, role in enumerate(spoken):
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            raise SampleError(
                "wrong turn",
                f"{source}: message {first + place} is of the {role} where the {wanted} must speak; join neighbouring "
                "messages of one speaker, and let system stand first",
            )
    if roles[-1] != "assistant":
        raise SampleError("wrong turn", f"{source}: the last message is of the {roles[-1]}; end with the assistant")


def dump_messages(messages: Sequence[Message], entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The inverse of `parse_messages`, with `loss` where it is not the default."""
    rest = iter(entries)
    rows: list[dict[str, Any]] = []
    for message in messages:
        default = message.role == "assistant"
        parts = [
            dict(entry) if flag == default else {**entry, "loss": flag}
            for entry, flag in zip([*islice(rest, message.num_parts)], message.loss, strict=True)
        ]
        rows.append({"role": message.role, "parts": parts})
    return rows


def turns_of(messages: Sequence[Message], parts: Sequence[Part]) -> list[Turn]:
    """The turns of a conversation, for `spell_turns`; a system message stands at the start of the first one.

    Args:
        messages: as `parse_messages` gives them.
        parts: of all messages, in order.
    """
    rest = iter(parts)
    turns: list[Turn] = []
    lead: tuple[tuple[Part, ...], tuple[bool, ...]] = ((), ())
    for message in messages:
        own = (*lead[0], *islice(rest, message.num_parts)), (*lead[1], *message.loss)
        if message.role == "system":
            lead = own
        else:
            turns.append(Turn(*own, is_answer=message.role == "assistant"))
            lead = ((), ())
    return turns


def check_task(task: Any, source: str) -> str | None:
    """The name of a task; None where there is none.

    Raises:
        SampleError: for what is no name.
    """
    if task is not None and (not isinstance(task, str) or not task.strip()):
        raise SampleError("broken metadata", f"{source}: task is {str(task)[:40]!r}; give a name, or leave it out")
    return task


class ConversationCounter:
    """Counts conversations by task, their messages by role and the answers by their modality; and documents by task.

    A pair of answers is a conversation with two of them.
    """

    def __init__(self) -> None:
        self._documents: Counter[str] = Counter()
        self.num_conversations, self.num_pairs = 0, 0
        self._tasks: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()

    def add(self, messages: Sequence[Message], modalities: Sequence[Modality], task: str | None) -> None:
        """Counts a sample; one without messages is no conversation, and is counted where it has a task.

        Args:
            messages: of the sample.
            modalities: of each of its parts.
            task: its name.
        """
        if not messages:
            self._documents.update([task] if isinstance(task, str) else [])
            return
        self.num_conversations += 1
        self.num_pairs += is_pair(messages)
        self._tasks[task or NO_TASK] += 1
        rest = iter(modalities)
        for message in messages:
            found = set(islice(rest, message.num_parts))
            self._messages[message.role] += 1
            if message.role == "assistant":
                self._answers["both" if len(found) > 1 else found.pop()] += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report; nothing where there were no conversations, and no documents with a task."""
        documents = {"documents": {"tasks": dict(sorted(self._documents.items()))}} if self._documents else {}
        if not self.num_conversations:
            return documents
        counts = {"tasks": self._tasks, "messages": self._messages, "answers": self._answers}
        return {
            "conversations": {
                "samples": self.num_conversations,
                **({"pairs": self.num_pairs} if self.num_pairs else {}),
                **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
            },
            **documents,
        }


def describe_conversations(report: Mapping[str, Any]) -> list[str]:
    """What `ConversationCounter.to_dict` gave, as lines for people."""
    lines: list[str] = []
    if found := report.get("conversations"):
        shown = "; ".join(f"{name}: {_listed(found[name])}" for name in ("tasks", "messages", "answers"))
        pairs = f", {found['pairs']:,} of them pairs of answers" if "pairs" in found else ""
        lines.append(f"  {found['samples']:,} conversations{pairs}; {shown}")
    if found := report.get("documents"):
        lines.append(f"  documents trained on as a whole; tasks: {_listed(found['tasks'])}")
    return lines


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {key}" for key, count in counts.items())
