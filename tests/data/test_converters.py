"""Files of conversations and of other projects become the same shards, and what is wrong with them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixmodal.data.conversations import Message
from mixmodal.data.corpora import CorpusConfig, CorpusKind, PrepareConfig, prepare
from mixmodal.data.shards import PictureFile, Sample

EDIT = (Message("user", (False, False)), Message("assistant", (True,)))
ASKED = {"from": "human", "value": "<image>"}
GOOD = {
    "conversations": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}],
    },
    "instructpix2pix": {"input_image": "a.png", "edit": "more", "edited_image": "b.png"},
    "obelics": {"texts": ["a", None], "images": [None, "a.png"]},
    "mmc4": {"text_list": ["a"], "image_info": []},
}
Row = dict[str, Any]


Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path, prepare_file: Build) -> Build:
    """Prepares a file of rows beside the pictures a.png and b.png."""

    def build(kind: CorpusKind, rows: list[Row], *, listed: bool = False, **options: Any) -> Any:
        path = tmp_path / ("rows.json" if listed else "rows.jsonl")
        path.write_text(json.dumps(rows) if listed else "\n".join(map(json.dumps, rows)))
        return prepare_file(CorpusConfig(kind=kind, path=path), **options)

    return build


@pytest.fixture
def shown(build_picture: Callable[[int], PictureFile]) -> Callable[[Sample], list[str]]:
    """Parts of a sample, with the name of the picture for its bytes."""
    names = {build_picture(number).data: f"{name}.png" for number, name in enumerate("ab")}
    return lambda sample: [part if isinstance(part, str) else names[part.data] for part in sample.parts]


def test_messages_of_a_file(build: Build, shown: Callable[[Sample], list[str]]) -> None:
    user = {"role": "user", "parts": [{"image": "a.png"}, {"text": "Blue."}]}
    row = {"key": "x", "task": "editing", "messages": [user, {"role": "assistant", "parts": [{"image": "b.png"}]}]}
    found = build("conversations", [row, GOOD["conversations"]])
    first, second = found.samples
    assert (shown(first), first.messages) == (["a.png", "Blue.", "b.png"], EDIT)
    assert first.metadata == {"key": "x", "task": "editing", "source": f"{found.path}:1 (x)"}
    assert shown(second) == ["a", "b"]
    assert found.report["shards"]["corpora"][0]["conversations"] == {
        "samples": 2,
        "tasks": {"(none)": 1, "editing": 1},
        "messages": {"assistant": 2, "user": 2},
        "answers": {"image": 1, "text": 1},
    }


@pytest.mark.parametrize("listed", [True, False])
def test_llava(build: Build, shown: Callable[[Sample], list[str]], listed: bool) -> None:
    turns = [
        ("system", "Be brief."),
        ("human", "<image>\nWhat?"),
        ("gpt", "A."),
        ("human", "And <image>?"),
        ("gpt", "B."),
    ]
    values = [{"from": speaker, "value": value} for speaker, value in turns]
    row = {"id": "x", "image": ["a.png", "b.png"], "conversations": values}
    found = build("llava", [row, GOOD["llava"]], listed=listed)
    assert shown(found.samples[0]) == ["Be brief.", "a.png", "What?", "A.", "And", "b.png", "?", "B."]
    assert [message.role for message in found.samples[0].messages] == ["system", *["user", "assistant"] * 2]
    assert found.samples[0].metadata["source"] == f"{found.path}{', entry 1' if listed else ':1'} (x)"
    assert shown(found.samples[1]) == ["a.png", "b"]


@pytest.mark.parametrize(
    "names",
    [
        ("input_image", "edit_prompt", "edited_image"),
        ("original_image", "edit", "output_image"),
        ("source_img", "instruction", "target_img"),
    ],
)
def test_instructpix2pix(build: Build, shown: Callable[[Sample], list[str]], names: tuple[str, str, str]) -> None:
    (sample,) = build("instructpix2pix", [dict(zip(names, ("a.png", "Make it blue.", "b.png")))]).samples
    assert (shown(sample), sample.messages) == (["a.png", "Make it blue.", "b.png"], EDIT)
    assert sample.metadata["task"] == "editing"


def test_obelics_and_mmc4_become_documents_that_are_trained_on_as_a_whole(
    build: Build, shown: Callable[[Sample], list[str]], tmp_path: Path
) -> None:
    obelics = {"texts": ["one", None, "two"], "images": [None, "a.png", None], "metadata": "{}"}
    (sample,) = build("obelics", [obelics]).samples
    assert (shown(sample), sample.messages, sample.losses) == (["one", "a.png", "two"], (), (True,) * 3)
    (tmp_path / "out").rename(tmp_path / "before")
    pictures = [{"image_name": name, "matched_text_index": place} for name, place in (("b.png", 2), ("a.png", 0))]
    (sample,) = build("mmc4", [{"text_list": ["one", "two", "three"], "image_info": pictures}]).samples
    assert shown(sample) == ["a.png", "one", " two", "b.png", "three"]
    assert not sample.messages


def test_pictures_of_prompts_are_padded_and_those_of_answers_cropped(build: Build, tmp_path: Path) -> None:
    wide = Image.new("RGB", (16, 8), "red")
    wide.paste("blue", (4, 0, 12, 8))
    wide.save(tmp_path / "a.png")
    row = {"input_image": "a.png", "edit": "more", "edited_image": "a.png"}
    (sample,) = build("instructpix2pix", [row], image_size=8).samples
    prompt, answer = (picture.open(1000) for picture in sample.pictures)
    assert prompt.size == answer.size == (8, 8)
    assert [prompt.getpixel(at) for at in ((0, 0), (0, 4), (4, 4))] == [(255, 255, 255), (255, 0, 0), (0, 0, 255)]
    assert len(answer.getcolors() or []) == 1


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("conversations", {"messages": [{"role": "human", "content": "a"}]}, "unknown role"),
        ("conversations", {"messages": None}, "empty document"),
        ("conversations", {"task": 3}, "broken metadata"),
        ("conversations", {"messages": [{"role": "user", "parts": [{"image": "absent.png"}]},
                                        {"role": "assistant", "content": "b"}]}, "no picture"),
        ("conversations", {"messages": [{"role": "user", "parts": [{"image": "../a.png"}]},
                                        {"role": "assistant", "content": "b"}]}, "unsafe name"),
        ("llava", {"image": ["a.png", "b.png"]}, "wrong number of pictures"),
        ("llava", {"image": None}, "wrong number of pictures"),
        ("llava", {"image": "absent.png"}, "no picture"),
        ("llava", {"conversations": []}, "empty document"),
        ("llava", {"conversations": [ASKED, {"from": "gpt", "value": ""}]}, "empty answer"),
        ("llava", {"conversations": [ASKED, {"from": "bot", "value": "a"}]}, "unknown role"),
        ("llava", {"conversations": [ASKED]}, "no assistant message"),
        ("llava", {"conversations": [{"from": "human"}]}, "broken metadata"),
        ("instructpix2pix", {"input_image": ["a.png", "b.png"]}, "wrong number of pictures"),
        ("instructpix2pix", {"edited_image": None}, "wrong number of pictures"),
        ("instructpix2pix", {"edited_image": {"bytes": "x"}}, "no picture"),
        ("instructpix2pix", {"edit": None}, "broken metadata"),
        ("instructpix2pix", {"edit": " "}, "empty text"),
        ("obelics", {"texts": ["a"]}, "broken metadata"),
        ("obelics", {"texts": ["a", "b"]}, "broken metadata"),
        ("obelics", {"texts": [], "images": []}, "empty document"),
        ("mmc4", {"image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "broken metadata"),
        ("mmc4", {"image_info": [{"image_name": "absent.png", "matched_text_index": 0}]}, "no picture"),
        ("mmc4", {"text_list": [3]}, "broken metadata"),
    ],
)  # fmt: skip
def test_bad_row_is_counted_and_named_by_file_line_and_key(
    build: Build, kind: CorpusKind, change: Row, reason: str
) -> None:
    found = build(kind, [GOOD[kind], {**GOOD[kind], **change, "key": "k7"}])
    assert len(found.samples) == 1
    (corpus,) = found.report["shards"]["corpora"]
    assert corpus["skipped"] == {reason: 1}
    assert f"{found.path}:2 (k7)" in corpus["examples"][0]


def test_a_missing_file_and_a_broken_list_are_named(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a corpus of kind llava must be a file"):
        prepare(PrepareConfig(corpora=(CorpusConfig(kind="llava", path=tmp_path),), out=tmp_path / "out"))
    (tmp_path / "cut.json").write_text('[{"id":')
    with pytest.raises(ValueError, match=r"cut\.json: it begins as a list"):
        prepare(PrepareConfig(corpora=(CorpusConfig(kind="llava", path=tmp_path / "cut.json"),), out=tmp_path / "out"))
