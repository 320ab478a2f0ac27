"""Templates of tasks: what records become, which tokens of it carry loss, and what is wrong with either."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mixmodal.data.conversations import Message, parse_messages, turns_of
from mixmodal.data.corpora import CorpusConfig, describe
from mixmodal.data.shards import PictureFile
from mixmodal.data.skipping import SampleError
from mixmodal.data.tasks import TasksConfig, TaskTemplates, spell_objects
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Image, Part, SequenceFormat, Text, build_format, spell_turns
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
SHIPPED = {name: TaskTemplates.load(ROOT / "configs" / "tasks" / f"{name}.yaml") for name in ("chameleon", "cm3leon")}
OBJECTS = [{"name": "dog", "box": [10, 20, 60, 90]}, {"name": "ball", "box": [0, 1.6, 5, 9.2]}]
EDITS = {"editing": [[{"user": "{image1} {edit}"}, {"assistant": "{image2}"}]]}
EDIT = {"task": "editing", "image1": "a.png", "edit": "Make it blue.", "image2": "b.png"}
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 4}, num_text_pieces=0x3000, num_sentinels=2))


class CharacterCodec:
    """A piece is a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, pieces: Any) -> str:
        return "".join(map(chr, pieces))


def block(language: str) -> str:
    """What stands on the page in its first block of a language."""
    found, *_ = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def templates(tasks: dict[str, Any], seed: int = 0) -> TaskTemplates:
    return TaskTemplates(TasksConfig(tasks=tasks, seed=seed))


def record(found: TaskTemplates, task: str) -> dict[str, Any]:
    """A record whose every text is the place that it fills, and whose pictures are called as their fields."""
    fields = found.fields(task)
    values = {field: field if field.startswith("image") else f"{{{field}}}" for field in fields}
    return {"task": task, **values, **({"objects": OBJECTS} if "objects" in fields else {})}


def every_wording(found: TaskTemplates) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each wording of each task, with the name of the task, filled with its own places."""
    for task, wordings in found.wordings.items():
        keys = {found.draw(task, str(number)): str(number) for number in range(100)}
        assert len(keys) == len(wordings)
        for number in range(len(wordings)):
            yield task, found.fill({"key": keys[number], **record(found, task)}, "here")


def part(entry: dict[str, str]) -> Part:
    """A picture is two codes: 0 and its number, 0 where it has none."""
    if "text" in entry:
        return Text(entry["text"])
    return Image(np.array([[0, int(entry["image"].removeprefix("image") or 0)]]))


def shown(row: dict[str, Any], spelling: SequenceFormat) -> str:
    """A conversation's tokens as text, in square brackets where they carry loss."""
    messages, entries = parse_messages(row["messages"], "here")
    ids, loss = spell_turns(spelling, turns_of(messages, [part(entry) for entry in entries]))
    lines: list[str] = []
    for flag, group in groupby(zip(ids, loss), key=lambda pair: bool(pair[1])):
        said = ""
        for token in (int(token) for token, _ in group):
            if VOCABULARY.contains("text", np.array([token]))[0]:
                said += chr(int(VOCABULARY.from_ids("text", np.array([token]))[0]))
            elif VOCABULARY.contains("image", np.array([token]))[0]:
                code = int(VOCABULARY.from_ids("image", np.array([token]))[0])
                said += " image" if code == 0 and not said.endswith("image") else str(code or "")
            else:
                said += f" {VOCABULARY.name(token)} "
        said = " ".join(said.split())
        lines.append(f"[{said}]" if flag else said)
    return " ".join(lines)


def test_exactly_the_tokens_on_the_page_carry_loss_in_every_wording_with_turns() -> None:
    spelling = build_format("chameleon", VOCABULARY, {"image": (1, 2)}, CharacterCodec())
    lines = [f"{task}: {shown(row, spelling)}" for task, row in every_wording(SHIPPED["chameleon"])]
    assert "\n".join(lines) + "\n" == block("loss")


def test_a_wording_of_cm3leon_is_a_document_with_its_texts_before_the_picture() -> None:
    lines: list[str] = []
    for task, row in every_wording(SHIPPED["cm3leon"]):
        assert "messages" not in row
        shown = " <break> ".join(part.get("text") or part["image"] for part in row["parts"])
        lines.append(f"{task}: {shown}".replace("\n", "\\n"))
        assert "image" in row["parts"][-1]
    assert "\n".join(lines) + "\n" == block("documents")


def test_both_files_have_the_same_tasks_of_the_same_fields() -> None:
    first, second = (
        {task: set(found.fields(task)) for task in found.wordings}
        for found in (SHIPPED["chameleon"], SHIPPED["cm3leon"])
    )
    assert first == second


def test_the_page_lists_all_fields() -> None:
    names = set(re.findall(r"^\| `(\w+)`.* \| ((?:`\w+`(?:, )?)+) \|$", PAGE, re.MULTILINE))
    listed = {task: set(re.findall(r"\w+", fields)) for task, fields in names}
    assert listed == {task: set(SHIPPED["chameleon"].fields(task)) for task in SHIPPED["chameleon"].wordings}


def test_the_records_and_the_templates_of_the_page_become_samples(
    build: Build, build_picture: Callable[[int], PictureFile], tmp_path: Path
) -> None:
    for number, name in enumerate(("apple", "dark", "dog")):
        (tmp_path / f"{name}.png").write_bytes(build_picture(number).data)
    records = [json.loads(line) for line in block("json").splitlines()]
    shipped = yaml.safe_load((ROOT / "configs" / "tasks" / "chameleon.yaml").read_text())["tasks"]
    found = build(records, shipped)
    assert [sample.metadata["task"] for sample in found.samples] == [record["task"] for record in records]
    assert "dog at location (10, 20) -> (60, 90)" in found.samples[2].texts[0]
    editing = TaskTemplates(TasksConfig(**yaml.safe_load(block("yaml"))))
    rows = [editing.fill({**records[0], "key": str(number)}, "here") for number in range(20)]
    assert {"messages" in row for row in rows} == {True, False}


def test_a_wording_is_drawn_by_seed_and_key_alone() -> None:
    wordings = [[{"user": f"{number} {{caption}}"}, {"assistant": "{image}"}] for number in range(3)]
    found = [templates({"drawing": wordings, "other": wordings}, seed) for seed in (0, 0, 1)]
    drawn = [[one.draw("drawing", f"k{key}") for key in range(300)] for one in found]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != [found[0].draw("other", f"k{key}") for key in range(300)]
    assert min(Counter(drawn[0]).values()) > 70
    row = {"task": "drawing", "caption": "x", "image": "a.png"}
    assert found[0].fill({**row, "key": "k"}, "b/c:1 (k)") == found[0].fill({**row, "key": "k"}, "d:9 (k)")
    assert found[0].fill(row, "b/rows.jsonl:7") == found[0].fill(row, "c/rows.jsonl:7")


def test_values_are_no_templates_and_doubled_braces_are_braces() -> None:
    found = templates({"a": [[{"user": "{{x}} {question}"}, {"assistant": "{answer}"}]]})
    row = found.fill({"task": "a", "question": "{answer} {0}", "answer": 3, "more": 1, "key": "k"}, "here")
    messages = [
        {"role": "user", "parts": [{"text": "{x} {answer} {0}"}]},
        {"role": "assistant", "parts": [{"text": "3"}]},
    ]
    assert row == {"task": "a", "more": 1, "key": "k", "messages": messages}


def test_objects_are_spelled_as_in_the_paper() -> None:
    box = [{"name": "bottle", "box": [199, 130, 204, 150]}]
    assert spell_objects(box, "here") == "bottle at location (199, 130) -> (204, 150)"
    assert spell_objects(OBJECTS, "here") == "dog at location (10, 20) -> (60, 90), ball at location (0, 2) -> (5, 9)"


@pytest.mark.parametrize(
    ("wordings", "said"),
    [
        ([], "task a: it has no wordings"),
        ("{caption}", "task a: it has no wordings"),
        ([3], "task a, wording 1: it is '3'; give a list of messages, or one text"),
        ([[]], "wording 1: it is"),
        (["none"], "wording 1: it has no place for a field"),
        (["{caption"], "wording 1: '{caption': expected '}'"),
        (["{caption!r}"], "a place is a name in braces"),
        (["{Caption}"], "a place is a name in braces"),
        (["{}"], "a place is a name in braces"),
        (["{caption} {image}", "{image}"], "wording 2: it has image, and wording 1 has caption, image"),
        ([[{"human": "{caption}"}]], "message 1 is .*human.*; give one of {system: TEXT}"),
        ([[{"user": "x", "assistant": "{caption}"}]], "message 1 is"),
        ([[{"user": "{caption}"}]], "wording 1: no message is of the assistant"),
        ([[{"assistant": "{caption}"}]], "wording 1: message 1 is of the assistant where the user must speak"),
        ([[{"user": "{caption}"}, {"assistant": ""}]], "wording 1: message 2: the answer has no parts"),
    ],
)
def test_a_template_that_gives_no_sample_is_named_by_file_task_and_wording(
    tmp_path: Path, wordings: Any, said: str
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(json.dumps({"tasks": {"a": wordings}}))
    with pytest.raises(ValueError, match=rf"^[^\n]*tasks\.yaml[^\n]*{said}") as caught:
        TaskTemplates.load(path)
    assert "task a" in str(caught.value)


def test_a_templates_file_that_is_absent_or_has_other_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: No such file"):
        TaskTemplates.load(tmp_path / "absent.yaml")
    for content, said in (
        ("task: {}", "the key tasks is missing"),
        ("- tasks", "it holds a list; keys and values"),
        ("tasks: {a: ['{caption}']}\nseeds: 1", "there is no key 'seeds'; take tasks and seed"),
        ("tasks: {a: ['{caption}']}\nseed: x", "seed is 'x'"),
        ("tasks: {}", "tasks is empty"),
        ("tasks: {3: ['{caption}']}", "task 3: its name is no text"),
        ("tasks: [", "not valid YAML"),
    ):
        (tmp_path / "tasks.yaml").write_text(content)
        with pytest.raises(ValueError, match=rf"tasks\.yaml: {said}"):
            TaskTemplates.load(tmp_path / "tasks.yaml")


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([], "no list, or empty"),
        ("dog", "no list, or empty"),
        ([{"box": [0, 0, 1, 1]}], "object 1 has no name"),
        ([{"name": "dog"}], "object 1: the box None"),
        ([{"name": "dog", "box": [0, 0, 1, 1]}, {"name": "dog", "box": [5, 0, 3, 1]}], "object 2: the box"),
        ([{"name": "dog", "box": [0, 0, 1, float("nan")]}], "object 1"),
        ([{"name": "dog", "box": [0, 0, float("inf"), 1]}], "object 1"),
        ([{"name": "dog", "box": [0, 0, True, 1]}], "object 1"),
    ],
)
def test_a_box_without_area_or_name_is_named(box: Any, said: str) -> None:
    with pytest.raises(SampleError, match=f"^here.*{said}") as caught:
        spell_objects(box, "here")
    assert caught.value.reason == "broken box"


Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path, prepare_file: Build) -> Build:
    """Prepares records beside the pictures a.png and b.png, with templates of two tasks."""

    def build(rows: list[dict[str, Any]], tasks: dict[str, Any] | None = None) -> Any:
        path, file = tmp_path / "rows.jsonl", tmp_path / "tasks.yaml"
        questions = {"questions": [[{"user": "{image} {question}"}, {"assistant": "It is {reply}."}]]}
        path.write_text("\n".join(map(json.dumps, rows)))
        file.write_text(json.dumps({"tasks": tasks or {**EDITS, **questions, "infilling": ["{answer} {image}"]}}))
        return prepare_file(CorpusConfig(kind="tasks", path=path, templates=file))

    return build


def test_records_become_conversations_and_documents(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    found = build([{**EDIT, "key": "x", "from": 1}, {"task": "infilling", "answer": "An apple.", "image": ["a.png"]}])
    edit, pair = found.samples
    assert edit.messages == (Message("user", (False, False)), Message("assistant", (True,)))
    assert edit.texts == ["Make it blue."]
    assert edit.metadata == {"key": "x", "task": "editing", "from": 1, "source": f"{found.path}:1 (x)"}
    assert (pair.messages, pair.losses, pair.texts) == ((), (True, True), ["An apple."])
    corpus = found.report["shards"]["corpora"][0]
    assert corpus["conversations"]["tasks"] == {"editing": 1}
    assert corpus["documents"] == {"tasks": {"infilling": 1}}
    assert "documents trained on as a whole; tasks: 1 infilling" in capsys.readouterr().out


def test_tokens_with_loss_are_counted_by_task_and_modality(
    build: Build, build_shards: Callable[..., Path], write_tokens: Callable[..., TokenShards], tmp_path: Path
) -> None:
    rows = [
        {"task": "questions", "image": "a.png", "question": "What?", "reply": "caption"},
        {"task": "infilling", "answer": "caption", "image": "a.png"},
    ]
    found = build([EDIT, EDIT, *rows])
    folder = tmp_path / "out" / "shards"
    shards = write_tokens([folder, build_shards(1), folder], sequence_format="chameleon")
    counts = shards.manifest["counts"]
    tasks = {task: {name: count / 2 for name, count in found.items()} for task, found in counts["tasks"].items()}
    losses = [shards.loss(index) for index in range(4)]
    assert [tasks[name]["documents"] for name in ("editing", "infilling", "questions")] == [2, 1, 1]
    assert tasks["editing"] == {
        "documents": 2,
        "loss_tokens": sum(int(loss.sum()) for loss in losses[:2] if loss is not None),
        "text_loss_tokens": 0,
        "image_loss_tokens": 2 * 4,
    }
    assert tasks["questions"]["text_loss_tokens"] > tasks["infilling"]["text_loss_tokens"] > 0
    assert (tasks["questions"]["image_loss_tokens"], tasks["infilling"]["image_loss_tokens"]) == (0, 4)
    assert tasks["infilling"]["loss_tokens"] == len(shards[3])
    for name in ("loss_tokens", "text_loss_tokens", "image_loss_tokens"):
        assert counts[name] == 2 * sum(count[name] for count in tasks.values())
    shown = describe({**found.report, "tokens": counts}, tmp_path)
    assert "    editing: 4 documents, loss on 0 text and 16 image tokens\n" in shown
    assert "tasks" not in write_tokens([build_shards(1, name="others")], out=tmp_path / "more").manifest["counts"]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"task": "edit"}, "unknown task", "the task 'edit' has no template; take editing, questions, infilling"),
        ({"task": None}, "unknown task", "the task 'None'"),
        ({"edit": None}, "missing field", "the task editing has image1, edit, image2, and edit is missing"),
        ({"task": "questions", "image": "a.png", "question": "?"}, "missing field", "reply is missing"),
        ({"edit": " "}, "empty text", "edit is empty"),
        ({"edit": ["a"]}, "broken metadata", "edit is"),
        (
            {"image1": ["a.png", "b.png"]},
            "wrong number of pictures",
            "image1 holds 2 pictures where the task",
        ),
        ({"image1": []}, "wrong number of pictures", "image1 holds 0 pictures"),
        ({"image3": "a.png"}, "wrong number of pictures", "image3 has no place in the task editing"),
        ({"image1": 3}, "no picture", "image1 is '3'"),
        ({"image1": "absent.png"}, "no picture", "absent.png"),
        ({"image1": "../a.png"}, "unsafe name", "leads out"),
        ({"messages": []}, "broken metadata", "messages stands beside the fields"),
    ],
)
def test_bad_record_is_counted_and_named_by_file_line_and_key(
    build: Build, change: dict[str, Any], reason: str, said: str
) -> None:
    found = build([EDIT, {**EDIT, **change, "key": "k7"}])
    assert len(found.samples) == 1
    (corpus,) = found.report["shards"]["corpora"]
    assert corpus["skipped"] == {reason: 1}
    assert f"{found.path}:2 (k7)" in corpus["examples"][0]
    assert said in corpus["examples"][0]


@pytest.mark.parametrize(
    "row",
    [
        {"task": "questions", "image": "a.png", "question": "?", "reply": ""},
        {"task": "infilling", "image": "a.png", "answer": " "},
    ],
)
def test_an_empty_answer_is_counted_as_such_wherever_it_stands(build: Build, row: dict[str, Any]) -> None:
    assert build([EDIT, row]).report["shards"]["corpora"][0]["skipped"] == {"empty answer": 1}


def test_shards_of_other_templates_are_not_taken_for_finished(build: Build) -> None:
    build([EDIT])
    build([EDIT])
    with pytest.raises(ValueError, match=r"corpora is .*templates_digest"):
        build([EDIT], {"editing": [[{"user": "{edit} {image1}"}, {"assistant": "{image2}"}]]})


def test_templates_belong_to_tasks_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: a corpus of kind tasks needs templates"):
        CorpusConfig(kind="tasks", path=Path("rows"))
    with pytest.raises(ValueError, match="rows: a corpus of kind llava takes no templates"):
        CorpusConfig(kind="llava", path=Path("rows"), templates=tmp_path)
