"""Files of conversations, and files of other projects as such: each is a kind of corpus of `mixmodal prepare`.

| kind | a line, or an entry of a JSON list | becomes |
|---|---|---|
| conversations | `{"messages": ..., "task": ..., "key": ...}` | a conversation |
| preferences | `{"messages": ..., "chosen": ..., "rejected": ...}` | a pair of answers (`mixmodal.data.preferences`) |
| tasks | `{"task": ..., "caption": ..., "image": ..., "key": ...}` | what its template says (`mixmodal.data.tasks`) |
| llava | `{"image": ..., "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}` | a conversation |
| instructpix2pix | `{"input_image": ..., "edit_prompt": ..., "edited_image": ...}` | picture and text, then a picture |
| obelics | `{"texts": [..., null], "images": [null, ...]}` | a document, trained on as a whole |
| mmc4 | `{"text_list": [...], "image_info": [{"image_name": ..., "matched_text_index": 0}]}` | such a document |

Pictures are files within the folder of the file. What stands beside these keys becomes metadata of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mixmodal.data.boxes import BoxMover
from mixmodal.data.conversations import Message, check_task, is_pair, parse_messages
from mixmodal.data.corpus_files import first, read_part, read_rows
from mixmodal.data.preferences import ANSWERS, CHOSEN, KEYS, REJECTED, parse_pair
from mixmodal.data.shards import PictureFile, Sample
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter, may_be_cut
from mixmodal.data.tasks import TaskTemplates

IMAGE_MARK = "<image>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
INPUT_KEYS = ("input_image", "original_image", "source_img")
EDIT_KEYS = ("edit_prompt", "edit", "instruction")
OUTPUT_KEYS = ("edited_image", "output_image", "target_img")
EDITING = "editing"
PREFERENCES = "preferences"
Row = dict[str, Any]


def read_conversations(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Lines of messages, see `parse_messages`.

    Raises:
        ValueError: where there is no such file; so do the other readers.
    """
    yield from _read(path, "conversations", counter, limits, lambda row, source: row)


def read_preferences(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Lines of messages with a chosen and a rejected answer, see `parse_pair`."""
    yield from _read(path, PREFERENCES, counter, limits, lambda row, source: row)


def read_tasks(
    path: Path, counter: SkipCounter, limits: SampleLimits, templates: TaskTemplates, image_size: int = 0
) -> Iterator[Sample]:
    """Records of a task's name and its fields, filled into the templates.

    Args:
        image_size: boxes are moved into squares of this side, pixels; 0 leaves them as they are.
    """
    mover = BoxMover(folder=path.parent, image_size=image_size, counter=counter, limits=limits)
    fill = partial(templates.fill, move=mover.move if image_size else None)
    yield from _read(path, "tasks", counter, limits, fill)


def read_llava(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """LLaVA's training files (arXiv 2304.08485): the i-th `<image>` is the i-th of the pictures of `image`."""
    yield from _read(path, "llava", counter, limits, _from_llava)


def read_instructpix2pix(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Pictures with an edit in words and the edited picture (InstructPix2Pix, arXiv 2211.09800; MagicBrush's names)."""
    yield from _read(path, "instructpix2pix", counter, limits, _from_edit)


def read_obelics(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Documents in two lists of one length, of which at each place one is null (OBELICS, arXiv 2306.16527)."""
    yield from _read(path, "obelics", counter, limits, _from_obelics)


def read_mmc4(path: Path, counter: SkipCounter, limits: SampleLimits) -> Iterator[Sample]:
    """Sentences, each behind the pictures that were matched with it (MMC4, arXiv 2304.06939)."""
    yield from _read(path, "mmc4", counter, limits, _from_mmc4)


def _read(
    path: Path, kind: str, counter: SkipCounter, limits: SampleLimits, convert: Callable[[Row, str], Row]
) -> Iterator[Sample]:
    """Samples of rows that `convert` gives `messages` or `parts`."""

    def build(row: Row, source: str) -> Sample:
        row = convert(row, source)
        if kind != PREFERENCES and any(key in row for key in ANSWERS):
            message = f"{source}: it has {CHOSEN} or {REJECTED}, as pairs have; those are read with kind {PREFERENCES}"
            raise SampleError("broken metadata", message)
        if kind != PREFERENCES and "messages" not in row and "parts" not in row:
            raise SampleError("broken metadata", f"{source}: the key messages is missing")
        check_task(row.get("task"), source)
        messages: tuple[Message, ...] = ()
        if kind == PREFERENCES:
            messages, entries = parse_pair(row, source)
        elif "messages" in row:
            messages, entries = parse_messages(row["messages"], source)
        else:
            entries = row["parts"]
        if not entries:
            raise SampleError("empty document", f"{source}: there is neither a text nor a picture")
        cut = may_be_cut(messages, row)
        parts = tuple(read_part(entry, path.parent, source, counter, limits, cut) for entry in entries)
        if is_pair(messages):
            _check_differ(parts, [message.num_parts for message in messages], source)
        metadata = {key: value for key, value in row.items() if key not in (*KEYS, "parts")}
        return Sample(source, parts, metadata, source, messages)

    yield from read_rows(path, kind, counter, build)


def _check_differ(parts: tuple[str | PictureFile, ...], counts: list[int], source: str) -> None:
    """Whether the answers of a pair, of the last two numbers of parts, differ when they are read."""
    content = [part if isinstance(part, str) else part.data for part in parts]
    stop = len(content) - counts[-1]
    if content[stop - counts[-2] : stop] == content[stop:]:
        raise SampleError("equal answers", f"{source}: chosen and rejected hold the same texts and pictures")


def _from_llava(row: Row, source: str) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SampleError("empty document", f"{source}: conversations is no list, or empty")
    found = row.get("image")
    pictures = [] if found is None else found if isinstance(found, list) else [found]
    values: list[str] = []
    for number, turn in enumerate(turns, start=1):
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str):
            raise SampleError("broken metadata", f"{source}: message {number} has no value that is a text")
        values.append(value)
    marks = sum(value.count(IMAGE_MARK) for value in values)
    if marks != len(pictures):
        message = f"{source}: {len(pictures)} pictures for {marks} {IMAGE_MARK}; one stands for one"
        raise SampleError("wrong number of pictures", message)
    rest = iter(pictures)
    messages: list[Row] = []
    for turn, value in zip(turns, values):
        parts: list[Row] = []
        for place, piece in enumerate(value.split(IMAGE_MARK)):
            parts += [{"image": next(rest)}] if place else []
            parts += [{"text": piece.strip()}] if piece.strip() else []
        speaker = turn.get("from")
        messages.append(
            {"role": LLAVA_ROLES.get(speaker, speaker) if isinstance(speaker, str) else None, "parts": parts}
        )
    return {**_without(row, ("conversations", "image")), "messages": messages}


def _from_edit(row: Row, source: str) -> Row:
    before, after = (_one_picture(row, keys, source) for keys in (INPUT_KEYS, OUTPUT_KEYS))
    edit = first(row, EDIT_KEYS)
    if not isinstance(edit, str):
        raise SampleError("broken metadata", f"{source}: none of the keys {', '.join(EDIT_KEYS)} holds a text")
    messages = [
        {"role": "user", "parts": [{"image": before}, {"text": edit}]},
        {"role": "assistant", "parts": [{"image": after}]},
    ]
    return {"task": EDITING, **_without(row, (*INPUT_KEYS, *EDIT_KEYS, *OUTPUT_KEYS)), "messages": messages}


def _one_picture(row: Row, keys: tuple[str, ...], source: str) -> str:
    found = first(row, keys)
    names = found if isinstance(found, list) else [] if found is None else [found]
    if len(names) != 1:
        raise SampleError(
            "wrong number of pictures", f"{source}: {len(names)} pictures where one is wanted, as {' or '.join(keys)}"
        )
    if not isinstance(names[0], str):
        raise SampleError("no picture", f"{source}: {keys[0]} is {str(names[0])[:40]!r}; give the name of a file")
    return names[0]


def _from_obelics(row: Row, source: str) -> Row:
    texts, images = row.get("texts"), row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise SampleError("broken metadata", f"{source}: texts and images are not two lists of one length")
    parts: list[Row] = []
    for place, (text, image) in enumerate(zip(texts, images)):
        if (text is None) == (image is None):
            raise SampleError("broken metadata", f"{source}: not one of text and image is null at place {place}")
        parts.append({"text": text} if image is None else {"image": image})
    return {**_without(row, ("texts", "images")), "parts": parts}


def _from_mmc4(row: Row, source: str) -> Row:
    sentences, pictures = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not isinstance(pictures, list):
        raise SampleError("broken metadata", f"{source}: text_list and image_info are not two lists")
    before: dict[int, list[Row]] = {}
    for number, picture in enumerate(pictures, start=1):
        place = picture.get("matched_text_index") if isinstance(picture, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            message = f"{source}: matched_text_index of picture {number} is {place}, of {len(sentences)} texts"
            raise SampleError("broken metadata", message)
        before.setdefault(place, []).append({"image": picture.get("image_name")})
    parts: list[Row] = []
    for place, sentence in enumerate(sentences):
        joins = place and place not in before and isinstance(sentence, str)  # nothing stands between two texts
        parts += [*before.get(place, []), {"text": f" {sentence}" if joins else sentence}]
    return {**_without(row, ("text_list", "image_info", "similarity_matrix")), "parts": parts}


def _without(row: Row, keys: tuple[str, ...]) -> Row:
    return {key: value for key, value in row.items() if key not in keys}
