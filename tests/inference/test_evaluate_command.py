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
from mixmodal.pipeline.evaluating.image_to_text import ImageToTextOptions
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
        return found == pytest.approx(wanted, rel=1e-5)  # 6e-7 seen
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
    with pytest.raises(ValueError, match=r"question.text is 'what' *; it needs \{\}|question.text is 'what'; it needs"):
        QuestionOptions(text="what")
