"""Asking a model by templates, and telling right from wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixmodal.data.tasks import TasksConfig, TaskTemplates
from mixmodal.document import EndOfTurn
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.answers import Answered, AnswersConfig, Asker, Judge, name_of, summarise
from mixmodal.quickstart.demo import Demo
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.preprocessing import to_pictures

TASKS: dict[str, list[Any]] = {
    "style": [[{"user": "{image1} {edit}"}, {"assistant": "{caption} {image2}"}]],
    "drawing": [[{"user": "Draw {caption}"}, {"assistant": "{image}"}]],
    "category": [[{"user": "{image} What kind?"}, {"assistant": "{answer}"}]],
}
EDIT = {"key": "e", "task": "style", "image1": "a.png", "edit": "Outline it.", "caption": "b", "image2": "b.png"}
DRAWING = {"key": "d", "task": "drawing", "caption": "red square", "image": "a.png"}
QUESTION = {"key": "q", "task": "category", "image": "a.png", "answer": "light"}


@pytest.fixture
def asker(tmp_path: Path) -> Asker:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    return Asker(TaskTemplates(TasksConfig(tasks=TASKS)), tmp_path)


def test_a_prompt_is_the_users_turn_up_to_its_end(asker: Asker) -> None:
    asked = asker.prompt(EDIT)
    assert isinstance(asked.prompt[0], Image.Image)
    assert asked.prompt[1] == "Outline it."
    assert asked.prompt[2:] == [EndOfTurn()]
    assert [asker.prompt(record).output for record in (EDIT, DRAWING, QUESTION)] == ["mixed", "image", "text"]


def test_answers_stand_in_the_order_of_the_records_whatever_the_batch(asker: Asker, model: MixedModal) -> None:
    records = [QUESTION, DRAWING, EDIT, {**DRAWING, "key": "d2", "caption": "blue square"}]
    first = asker.ask(model, records, AnswersConfig(max_new_tokens=24), "asked", only_pictures=True)
    assert [answer.picture is not None for answer in first] == [False, True, True, True]
    second = asker.ask(model, records, AnswersConfig(max_new_tokens=24, batch_size=1), "asked", only_pictures=True)
    assert [answer.text for answer in first] == [answer.text for answer in second]
    for left, right in zip(first, second, strict=True):
        assert (left.picture is None) == (right.picture is None)
        assert left.picture is None or left.picture.tobytes() == right.picture.tobytes()


def test_all_that_is_said_of_sampling_acts(asker: Asker, model: MixedModal, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def generate_batch(prompts: list[Any], output: str, **options: Any) -> list[list[str]]:
        given.update(options)
        return [["light"] for _ in prompts]

    monkeypatch.setattr(model, "generate_batch", generate_batch)
    image, text = TokenSampling(min_p=0.1, top_k=3), TokenSampling(repetition_penalty=1.5)
    asker.ask(model, [DRAWING], AnswersConfig(image=image, text=text, guidance_scale=1.5, seed=7), "asked")
    for name in vars(image):
        assert given[name] == {"image": getattr(image, name), "text": getattr(text, name)}
    assert (given["guidance_scale"], given["seed"]) == (1.5, 7)


def test_records_are_chosen_by_task_and_language(asker: Asker) -> None:
    captions = [{"key": f"{i}{lang}", "task": "captions", "language": lang} for i in range(5) for lang in ("de", "es")]
    chosen = asker.choose([*captions, EDIT], AnswersConfig(per_task=2))
    assert [name_of(record) for record in chosen] == [
        "captions de",
        "captions de",
        "captions es",
        "captions es",
        "style",
    ]
    assert chosen == asker.choose([*captions, EDIT], AnswersConfig(per_task=2))


def test_a_picture_is_judged_by_the_nearest_one_and_none_is_wrong(
    tmp_path: Path, model: MixedModal, demo: Demo
) -> None:
    judge = Judge(model, demo)
    redrawn = to_pictures(judge._images)
    places = {label.key: place for place, label in enumerate(demo.labels)}
    right, wrong = redrawn[places["red_outline"]], redrawn[places["red_flat"]]
    record = {**EDIT, "target": "red_outline"}
    answers = [Answered("b", right), Answered("b", wrong), Answered("b", None)]
    items = judge.items([record] * 3, answers, True, tmp_path, "answers")
    assert [item["concept_right"] for item in items] == [True, True, False]
    assert [item["style_right"] for item in items] == [True, False, False]
    assert (tmp_path / items[0]["image"]).is_file()
    assert "image" not in items[2]
    found = summarise(items)["style"]
    assert found == {"concept": [2, 3], "style": [1, 3], "both": [1, 3]}


def test_words_are_right_when_they_are_the_very_words(tmp_path: Path, model: MixedModal, demo: Demo) -> None:
    records = [QUESTION, QUESTION, QUESTION, {**QUESTION, "answer": "dark"}]
    answers = [Answered(text, None) for text in ("light", "light", "Light", "light")]
    items = Judge(model, demo).items(records, answers, True, tmp_path, "answers")
    assert [item["right"] for item in items] == [True, True, False, False]
    found = summarise(items)["category"]
    assert found["right"] == [2, 4]
    assert found["balanced"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["majority"] == 0.75
