"""The records of the demo tasks: what they show, and that held-out pairs stay out of training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.tasks import TaskTemplates
from mixmodal.quickstart.art import find_translations
from mixmodal.quickstart.demo_tasks import DemoTasksConfig, Shown, build_tasks, write_tasks
from mixmodal.quickstart.recipe import read_packaged

TONES = {"": "", " light skin tone": "-1f3fb", " dark skin tone": "-1f3ff"}
NAMES = {"man cook": "1f468-200d-1f373", "woman cook": "1f469-200d-1f373", "red apple": "1f34e"}


def shown(heldout: set[tuple[str, str]]) -> list[Shown]:
    """A man and a woman who cook, in three tones each, and an apple, in both styles; their captions are as written."""
    found = []
    for name, code_point in NAMES.items():
        for tone, part in TONES.items() if "cook" in name else [("", "")]:
            first, *rest = code_point.split("-")
            code = "-".join([first + part, *rest])
            for style in ("flat", "outline"):
                concept = name + tone
                caption = f"{concept}, {style} style"
                found.append(Shown(code, concept, style, caption, (concept, style) in heldout))
    return found


@pytest.fixture(scope="module")
def config() -> DemoTasksConfig:
    pytest.importorskip("emoji")
    return DemoTasksConfig(kinds={"person": "cook", "plant": "apple"}, languages=("de",), comparisons=3)


def test_no_record_of_training_shows_a_held_out_pair_and_no_held_out_picture_is_edited(config: DemoTasksConfig) -> None:
    pictures = shown({("red apple", "flat"), ("woman cook dark skin tone", "outline")})
    hidden = {picture.file for picture in pictures if picture.heldout}
    tasks = list(build_tasks(pictures, config))
    for record, heldout in tasks:
        files = [record[name] for name in ("image", "image1", "image2") if name in record]
        assert heldout == bool(hidden & set(files)), record
        if "edit" in record:
            assert record["image1"] not in hidden
    assert {record["task"] for record, heldout in tasks if heldout} >= {
        "style",
        "skin_tone",
        "gender",
        "drawing",
        "which",
    }


def test_edits_change_one_thing_and_say_what(config: DemoTasksConfig) -> None:
    pictures = {picture.file: picture for picture in shown(set())}
    edits = [record for record, _ in build_tasks(list(pictures.values()), config) if "edit" in record]
    assert len(edits) == 14 + 24 + 12  # each to its other style; each of 12 cooks to 2 tones, and to the other gender
    for record in edits:
        before, after = pictures[record["image1"]], pictures[record["image2"]]
        assert record["caption"] == after.caption
        changed = {
            "style": before.style != after.style,
            "skin_tone": before.tone != after.tone,
            "gender": before.concept.split()[0] != after.concept.split()[0],
        }
        assert [name for name, differs in changed.items() if differs] == [record["task"]]
        wanted = {"style": after.style, "skin_tone": after.tone, "gender": after.concept.split()[0]}[record["task"]]
        assert wanted in record["edit"]


def test_answers_are_true(config: DemoTasksConfig) -> None:
    pictures = {picture.file: picture for picture in shown(set())}
    records = [record for record, _ in build_tasks(list(pictures.values()), config)]
    for record in records:
        if record["task"] == "category":
            assert record["answer"] == ("plant" if "apple" in pictures[record["image"]].concept else "person")
        if record["task"] == "which":
            asked = record["image1" if record["answer"] == "first" else "image2"]
            other = record["image2" if record["answer"] == "first" else "image1"]
            assert pictures[asked].concept == record["name"]
            assert pictures[other].family != pictures[asked].family
            assert pictures[other].style == pictures[asked].style
    answers = [record["answer"] for record in records if record["task"] == "which"]
    assert {"first", "second"} == set(answers)
    german = [record["caption"] for record in records if record.get("language") == "German"]
    assert "roter apfel" in german


def test_records_are_written_by_split_and_group_and_fit_the_templates(tmp_path: Path, config: DemoTasksConfig) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    pictures = shown({("red apple", "flat")})
    for split in ("train", "heldout"):
        chosen = [picture for picture in pictures if picture.heldout == (split == "heldout")]
        samples = [
            Sample(
                picture.key,
                (picture.caption, PictureFile(stream.getvalue(), "png", picture.key)),
                {"code_point": picture.code_point, "concept": picture.concept, "style": picture.style},
            )
            for picture in chosen
        ]
        write_shards(samples, tmp_path / "data" / split)
    counts = write_tasks(tmp_path / "data", tmp_path / "records", config)
    assert set(counts) == {
        f"{split}_{group}" for split in ("train", "heldout") for group in ("edits", "drawings", "texts")
    }
    path = tmp_path / "templates.yaml"
    path.write_text(read_packaged("templates.yaml"))
    templates = TaskTemplates.load(path)
    for name, count in counts.items():
        lines = (tmp_path / "records" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            record = json.loads(line)
            answer = templates.fill(record, name)["messages"][-1]["parts"]
            wanted = [{"text": record["caption"]}] if "edits" in name else []
            file = record.get("image2") or record["image"] if "texts" not in name else None
            said = record.get("answer", record.get("caption"))
            assert answer[-1] == ({"image": file} if file else {"text": said})
            assert answer[:-1] == wanted
            for part in answer:
                assert "image" not in part or (tmp_path / "records" / part["image"]).is_file()


def test_what_can_not_be_asked_is_named() -> None:
    with pytest.raises(ValueError, match="languages: 'xx' is unknown; take some of de"):
        DemoTasksConfig(languages=("xx",))
    with pytest.raises(ValueError, match=r"kinds.plant: '\(' is no regular expression"):
        DemoTasksConfig(kinds={"plant": "("})
    with pytest.raises(ValueError, match="comparisons is -1"):
        DemoTasksConfig(comparisons=-1)


def test_names_in_other_languages_are_those_of_the_fully_qualified_spelling() -> None:
    emoji = pytest.importorskip("emoji")

    found = find_translations(["de", "es"])
    assert found["1f34e"] == {"de": "roter apfel", "es": "manzana roja"}
    assert all(found.values())
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == 2 and "de" in entry:
            code_point = "-".join(f"{ord(one):x}" for one in characters if ord(one) != 0xFE0F)
            assert found[code_point]["de"] == entry["de"].strip(":").replace("_", " ").replace("\u2019", "'").lower()
    assert find_translations([]) == {}
