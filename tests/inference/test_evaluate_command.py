"""The evaluate command with a random model: what it writes, from one process or several, at once or in two goes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.pipeline.evaluate import evaluate
from mixmodal.pipeline.evaluate_config import EvaluateConfig, TasksConfig
from mixmodal.pipeline.evaluating.hallucination import HallucinationOptions
from mixmodal.pipeline.evaluating.image_to_text import ImageToTextOptions
from mixmodal.pipeline.evaluating.questions import QuestionsOptions
from mixmodal.pipeline.evaluating.text import TextOptions
from mixmodal.pipeline.evaluating.text_to_image import QuestionOptions, TextToImageOptions


def pair(key: str, data: bytes, caption: str, **metadata: Any) -> Sample:
    return Sample(key, (caption, PictureFile(data, "png", key)), metadata)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    samples = []
    for one in synthetic_pairs(7, 16, two_things_share=0.0):
        one.picture.save(tmp_path / "one.png")
        color, shape = one.caption.split()[1:]
        samples.append(pair(one.key, (tmp_path / "one.png").read_bytes(), one.caption, concept=shape, style=color))
    write_shards(samples, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def config(exported: Path, data: Path, tmp_path: Path) -> EvaluateConfig:
    (tmp_path / "long.txt").write_text("a red circle above a blue square. " * 40)
    drawn = TextToImageOptions(
        data=(data,), max_samples=5, features="none", question=QuestionOptions(turns=False), labelled=(data,)
    )
    tasks = TasksConfig(
        text_to_image=drawn,
        image_to_text=ImageToTextOptions(data=(data,), max_samples=5, max_new_tokens=8),
        text=TextOptions(data=(data, tmp_path / "long.txt")),
    )
    return EvaluateConfig(model=str(exported), out=tmp_path / "out", tasks=tasks, device="cpu")


def result(config: EvaluateConfig) -> dict[str, Any]:
    return json.loads((config.out / "evaluation.json").read_text())


def close(found: Any, wanted: Any) -> bool:
    """Equal up to the rounding of float32."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, float):
        return found == pytest.approx(wanted, rel=1e-5)
    return found == wanted


def test_one_json_has_settings_digests_and_metrics_and_one_page_shows_them(config: EvaluateConfig) -> None:
    evaluate(config)
    found, page = result(config), (config.out / "evaluation.html").read_text()
    assert {"model", "model_sha256", "seed", "commit", "versions", "dtype", "tasks"} == set(found)
    tasks = found["tasks"]
    drawn = tasks["text_to_image"]["metrics"]
    assert set(drawn) == {"vqa_score", "vqa_score_two_way", "right_concept", "right_style"}
    assert 0 < drawn["vqa_score_two_way"] < 1
    assert set(tasks["image_to_text"]["metrics"]) >= {"cider_d", "bleu_4", "rouge_l", "right_concept", "right_style"}
    assert tasks["text"]["metrics"]["bytes"] > 1300
    assert tasks["text"]["metrics"]["bits_per_byte"] > 0
    assert all(len(one["settings"]["samples_sha256"]) == 64 for one in tasks.values())
    assert page.count("data:image/png;base64,") == 10
    assert 'src="text_to_image' not in page
    assert format(drawn["vqa_score_two_way"], ",.4g") in page


def test_results_are_the_same_at_any_batch_size(config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config)
    other = replace(config, out=tmp_path / "small", batch_size=2)
    evaluate(other)
    assert close(result(other), result(config))


def test_shards_give_the_result_of_one_process(config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config)
    parts = replace(config, out=tmp_path / "parts")
    for index in (1, 0, 2):
        assert not (parts.out / "evaluation.json").exists()
        evaluate(replace(parts, shard=f"{index}/3"))
    assert close(result(parts), result(config))


def test_a_killed_evaluation_goes_on_and_gives_the_same(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config)
    records = config.out / "image_to_text" / "records.jsonl"
    broken = replace(config, out=tmp_path / "broken")
    append, count = "mixmodal.records.RecordLines.append", [0]
    write: Callable[..., None] = __import__("mixmodal.records").records.RecordLines.append

    def fail(self: Any, entry: Any) -> None:
        count[0] += 1
        if count[0] == 8:  # in the second task
            raise KeyboardInterrupt
        write(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(append, fail)
        with pytest.raises(KeyboardInterrupt):
            evaluate(broken)
    assert len((broken.out / "image_to_text" / "records.jsonl").read_text().splitlines()) == 2
    evaluate(broken)
    assert close(result(broken), result(config))
    assert len((broken.out / "image_to_text" / "records.jsonl").read_text().splitlines()) == 5
    before = records.stat().st_mtime_ns
    evaluate(config)  # finished tasks are skipped
    assert records.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"tasks.text_to_image: .*settings\.json: seed was 0 when"):
        evaluate(replace(config, seed=1))


def test_what_only_judges_may_change_without_drawing_again(config: EvaluateConfig) -> None:
    evaluate(config)
    options = config.tasks.text_to_image
    assert options is not None
    times = [path.stat().st_mtime_ns for path in sorted((config.out / "text_to_image").glob("0*.png"))]
    evaluate(replace(config, tasks=replace(config.tasks, text_to_image=replace(options, labelled=()))))
    assert "right_concept" not in result(config)["tasks"]["text_to_image"]["metrics"]
    assert [path.stat().st_mtime_ns for path in sorted((config.out / "text_to_image").glob("0*.png"))] == times


def test_broken_pictures_are_counted_and_too_many_fail(config: EvaluateConfig, data: Path, tmp_path: Path) -> None:
    samples = [pair("broken", b"no picture", "a red circle"), pair("empty", b"", "a red square")]
    write_shards(samples, tmp_path / "broken")
    task = ImageToTextOptions(data=(data, tmp_path / "broken"), max_new_tokens=4)
    config = replace(config, tasks=TasksConfig(image_to_text=task), out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"tasks.image_to_text: 2 of 9 samples are bad \(2 broken picture\)"):
        evaluate(config)


def test_bad_input_is_told_with_task_and_key(config: EvaluateConfig, tmp_path: Path) -> None:
    missing = replace(config, tasks=TasksConfig(text=TextOptions(data=(tmp_path / "none.txt",))))
    with pytest.raises(ValueError, match=r"tasks.text: data: there is no file .*none\.txt"):
        evaluate(missing)
    with pytest.raises(ValueError, match="tasks is empty; give at least one of text_to_image"):
        replace(config, tasks=TasksConfig())
    with pytest.raises(ValueError, match=r"question.text is 'what'; it needs"):
        QuestionOptions(text="what")


def test_questions_are_asked_with_and_without_the_picture(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in synthetic_pairs(3, 16):
        one.picture.save(tmp_path / f"{one.key}.png")
    lines = [
        {
            "messages": [
                {"role": "user", "parts": [{"image": f"{place:06d}.png"}, {"text": "Which color?"}]},
                {"role": "assistant", "parts": [{"text": "Red."}]},
            ],
            "kind": "color" if place else "other",
            "answers": ["red"] * 9 + ["dark red"],
        }
        for place in range(3)
    ]
    lines.append({"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]})
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = QuestionsOptions(data=(tmp_path / "asked.jsonl",), max_new_tokens=3)
    config = replace(config, tasks=TasksConfig(questions=task), out=tmp_path / "asked")
    evaluate(config)
    found = result(config)["tasks"]["questions"]
    assert found["num_samples"] == 3
    wanted = {f"vqa_accuracy{sort}{blind}" for sort in ("", "_color", "_other") for blind in ("", "_blind")}
    assert set(found["metrics"]) == wanted
    (config.out / "questions" / "summary.json").unlink()
    path = config.out / "questions" / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["question"] for record in records} == {"Which color?"}
    for record in records:  # what the model says blind depends on the question alone
        record |= {"answer": "a red" if record["kind"] == "color" else "blue", "blind": "blue"}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate(config)
    metrics = result(config)["tasks"]["questions"]["metrics"]
    assert (metrics["vqa_accuracy_color"], metrics["vqa_accuracy_other"], metrics["vqa_accuracy_blind"]) == (1, 0, 0)
    assert metrics["vqa_accuracy"] == pytest.approx(2 / 3)


def test_objects_are_asked_for_by_all_three_kinds_of_negatives(config: EvaluateConfig, tmp_path: Path) -> None:
    names = ["cat", "dog", "car", "tree", "sun"]
    samples = []
    for place, one in enumerate(synthetic_pairs(4, 16)):
        one.picture.save(tmp_path / "one.png")
        shown = names[place : place + 2]
        samples.append(pair(one.key, (tmp_path / "one.png").read_bytes(), one.caption, objects=shown))
    write_shards(samples, tmp_path / "objects")
    task = HallucinationOptions(data=(tmp_path / "objects",), num_pairs=2, turns=False, max_new_tokens=2)
    config = replace(config, tasks=TasksConfig(hallucination=task), out=tmp_path / "asked")
    for index in (0, 1):  # questions are of all pictures, whichever shard asks them
        evaluate(replace(config, shard=f"{index}/2"))
    metrics = result(config)["tasks"]["hallucination"]["metrics"]
    kinds = ("random", "popular", "adversarial")
    assert [metrics[f"pope_{kind}_num_questions"] for kind in kinds] == [16, 16, 16]
    assert {f"pope_random_{name}" for name in ("accuracy", "f1", "yes")} <= set(metrics)
    files = (config.out / "hallucination").glob("records*")
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    asked = [row for line in lines for row in line["asked"]]
    assert sum(row["answer"] == "yes" for row in asked) == sum(row["answer"] == "no" for row in asked) == 24
