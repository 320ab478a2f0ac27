"""The evaluate command with a random model: what it writes, from one process or several, at once or in two goes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.config import save_config
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits
from mixmodal.data.synthetic import COLORS, SHAPES
from mixmodal.pipeline.evaluate import evaluate
from mixmodal.pipeline.evaluate_config import EvaluateConfig, TasksConfig
from mixmodal.pipeline.evaluating.hallucination import HallucinationOptions
from mixmodal.pipeline.evaluating.image_to_text import ImageToTextOptions
from mixmodal.pipeline.evaluating.memorisation import MemorisationOptions
from mixmodal.pipeline.evaluating.questions import QuestionsOptions
from mixmodal.pipeline.evaluating.text import TextOptions
from mixmodal.pipeline.evaluating.text_to_image import QuestionOptions, TextToImageOptions
from mixmodal.sampling.rules import TokenSampling

ROOT = Path(__file__).parents[2]
BROKEN = {"broken": b"no picture", "empty": b""}


@pytest.fixture
def config(
    exported: Path, shapes: Path, scenes: Path, write_tokens: Callable[..., Path], tmp_path: Path
) -> EvaluateConfig:
    (tmp_path / "long.txt").write_text("a red circle above a blue square. " * 40)
    training = write_tokens(tmp_path / "tokens", list(np.random.default_rng(0).integers(0, 75, (9, 4, 4))))
    drawn = TextToImageOptions(
        data=(shapes,),
        max_samples=5,
        features="none",
        question=QuestionOptions(turns=False),
        labelled=(shapes,),
        memorisation=MemorisationOptions(training=(training,), threshold=0.1),
    )
    names = dict.fromkeys((*COLORS, *SHAPES), ())
    tasks = TasksConfig(
        text_to_image=drawn,
        image_to_text=ImageToTextOptions(
            data=(shapes,), max_samples=5, max_new_tokens=8, objects=names, sampling=TokenSampling(temperature=1.0)
        ),
        questions=QuestionsOptions(
            data=(scenes / "held_out.jsonl",), training=(scenes / "training.jsonl",), max_samples=4, max_new_tokens=2
        ),
        text=TextOptions(data=(shapes, tmp_path / "long.txt")),
        hallucination=HallucinationOptions(data=(shapes,), max_samples=3, num_pairs=1, turns=False, max_new_tokens=2),
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
    repeats = {f"repeats_{name}{ending}" for name in ("exact", "near", "equal_codes") for ending in ("", "_held_out")}
    assert set(drawn) == {"vqa_score", "vqa_score_two_way", "right_concept", "right_style", *repeats}
    assert 0 < drawn["vqa_score_two_way"] < 1
    assert set(tasks["image_to_text"]["metrics"]) >= {"cider_d", "bleu_4", "rouge_l", "right_concept", "right_style"}
    assert tasks["text"]["metrics"]["bytes"] > 1300
    assert tasks["text"]["metrics"]["bits_per_byte"] > 0
    assert all(len(one["settings"]["samples_sha256"]) == 64 for one in tasks.values())
    assert page.count("data:image/png;base64,") == 5 * 2 + 5 + 4 + 3  # beside drawn pictures stand those of training
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
    for index in (1, 0):
        assert not (parts.out / "evaluation.json").exists()
        evaluate(replace(parts, shard=f"{index}/2"))
    lines = [path.read_text().splitlines() for path in sorted((parts.out / "text").glob("records*"))]
    assert [len(some) for some in lines] == [4, 4]  # each sample is measured once
    assert close(result(parts), result(config))


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["cm3leon"], indirect=True)
def test_two_launched_processes_give_the_result_of_one(config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config)
    launched = replace(config, out=tmp_path / "launched")
    save_config(launched, tmp_path / "evaluate.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "sample/evaluate.py"), "--config", str(tmp_path / "evaluate.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert close(result(launched), result(config))
    assert not list(launched.out.rglob(".?-of-2"))


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
    times = [path.stat().st_mtime_ns for path in sorted((config.out / "text_to_image").glob("??????.png"))]
    evaluate(replace(config, tasks=replace(config.tasks, text_to_image=replace(options, labelled=()))))
    assert "right_concept" not in result(config)["tasks"]["text_to_image"]["metrics"]
    assert [path.stat().st_mtime_ns for path in sorted((config.out / "text_to_image").glob("??????.png"))] == times


def test_broken_pictures_are_counted_and_too_many_fail(config: EvaluateConfig, shapes: Path, tmp_path: Path) -> None:
    broken = [Sample(name, ("a red circle", PictureFile(data, "png", name))) for name, data in BROKEN.items()]
    write_shards(broken, tmp_path / "broken")
    task = ImageToTextOptions(data=(shapes, tmp_path / "broken"), max_new_tokens=4)
    config = replace(config, tasks=TasksConfig(image_to_text=task), out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"tasks.image_to_text: 2 of 9 samples are bad \(2 broken picture\)"):
        evaluate(config)
    config = replace(config, limits=SampleLimits(max_skipped_share=0.5))
    evaluate(replace(config, out=tmp_path / "allowed"))
    found = result(replace(config, out=tmp_path / "allowed"))["tasks"]["image_to_text"]
    assert (found["num_samples"], found["skipped"], len(found["shown"])) == (7, {"broken picture": 2}, 7)


def test_bad_input_is_told_with_task_and_key(config: EvaluateConfig, tmp_path: Path) -> None:
    missing = replace(config, tasks=TasksConfig(text=TextOptions(data=(tmp_path / "none.txt",))))
    with pytest.raises(ValueError, match=r"tasks.text: data: there is no file .*none\.txt"):
        evaluate(missing)
    with pytest.raises(ValueError, match="tasks is empty; give at least one of text_to_image"):
        replace(config, tasks=TasksConfig())
    with pytest.raises(ValueError, match=r"question.text is 'what'; it needs"):
        QuestionOptions(text="what")
