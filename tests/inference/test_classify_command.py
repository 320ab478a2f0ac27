"""The classify command with a real model: what it writes, and that shards and batches give the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.cli import command
from mixmodal.config import UsageError, parse
from mixmodal.data.skipping import TooManySkipped
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.classify import ClassifyConfig, classify

CAPTIONS = ["a red apple", "a green apple", "blue"]


@pytest.fixture
def config(exported: Path, pictures: Path, tmp_path: Path) -> ClassifyConfig:
    (tmp_path / "classes.txt").write_text("red\ta red apple\ngreen\ta green apple\n\nblue\n")
    paths = {"data": pictures, "classes": tmp_path / "classes.txt", "out": tmp_path / "deep" / "out"}
    return ClassifyConfig(model=str(exported), device="cpu", **paths)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for path in folder.glob("records*.jsonl") for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_classify_records_every_picture_of_a_folder(
    config: ClassifyConfig, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"debias": 0.5, "length_normalise": True} if method == "text_given_image" else {}
    classify(replace(config, method=method, templates=["{}!"], **options))
    summary, rows = read(config.out / "summary.json"), records(config.out)
    assert (summary["data"]["num_pictures"], summary["data"]["num_labelled"]) == (7, 6)
    assert rows["red/0.png"]["label"] == "red"
    assert rows["unknown.png"]["label"] is None
    correct = sum(row["prediction"] == row["label"] for row in rows.values() if row["label"])
    assert summary["data"]["accuracy"]["value"] == pytest.approx(correct / 6)
    assert summary["data"]["evaluations"] == {"mean": 3, "min": 3, "max": 3, "total": 21}
    model = MixedModal.from_pretrained(config.model, "cpu")
    picture = PIL.open(config.data / "blue" / "1.png")
    found = model.score_classes([picture], [f"{caption}!" for caption in CAPTIONS], method, **options)
    np.testing.assert_allclose(rows["blue/1.png"]["scores"], found.scores[0], atol=5e-5)  # worst seen 6e-6
    np.testing.assert_allclose(
        rows["blue/1.png"]["probabilities"], found.probabilities[0], atol=1e-5
    )  # worst seen 1e-7
    likely = found.log_likelihoods
    np.testing.assert_allclose(rows["blue/1.png"]["log_likelihoods"], likely.totals[0], atol=5e-5)  # worst seen 6e-6
    assert rows["blue/1.png"]["num_tokens"] == likely.counts[0].tolist()
    assert {path.name for path in config.out.iterdir()} == {
        *("records.jsonl", "settings.json", "summary.json", "confusion.png", "reliability.png")
    }
    assert f"summary in {config.out / 'summary.json'}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_scores_are_means_over_templates(config: ClassifyConfig, method: str) -> None:
    templates = ["{}", "a red {} apple", "{} pear"]
    classify(replace(config, method=method, templates=templates))
    model = MixedModal.from_pretrained(config.model, "cpu")
    picture = PIL.open(config.data / "red" / "0.png")
    texts = [[template.replace("{}", caption) for caption in CAPTIONS] for template in templates]
    alone = [model.score_classes([picture], captions, method).scores[0] for captions in texts]
    row = records(config.out)["red/0.png"]
    np.testing.assert_allclose(row["scores"], np.mean(alone, axis=0), atol=5e-5)  # worst seen 6e-6
    assert row["evaluations"] == [3, 3, 3]


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_shards_and_batches_give_the_same_scores(config: ClassifyConfig, method: str, tmp_path: Path) -> None:
    whole = replace(config, method=method)
    classify(whole)
    parts = replace(whole, out=tmp_path / "parts", batch_size=1)
    for index in range(2):
        assert not (parts.out / "summary.json").exists()
        classify(replace(parts, shard=f"{index}/2"))
    first, second = records(whole.out), records(parts.out)
    assert first.keys() == second.keys()
    for key, row in first.items():
        np.testing.assert_allclose(row["scores"], second[key]["scores"], atol=5e-5)  # worst seen 6e-6
    summaries = read(whole.out / "summary.json"), read(parts.out / "summary.json")
    assert summaries[0]["data"]["confusion"] == summaries[1]["data"]["confusion"]
    assert summaries[0]["settings_sha256"] == summaries[1]["settings_sha256"]


def test_a_finished_job_loads_no_model(config: ClassifyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    classify(config)
    before = (config.out / "summary.json").read_bytes()

    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(MixedModal, "from_pretrained", load)
    classify(config)
    assert (config.out / "summary.json").read_bytes() == before


def test_another_model_is_another_hash(config: ClassifyConfig) -> None:
    classify(config)
    settings = read(config.out / "settings.json")
    (config.out / "settings.json").write_text(json.dumps({**settings, "model_sha256": "0"}))
    with pytest.raises(ValueError, match=r'settings\.json: model_sha256 was "0" when this was written and is "'):
        classify(config)


def test_broken_pictures_are_counted_and_too_many_fail(config: ClassifyConfig) -> None:
    (config.data / "red" / "2.png").write_bytes(b"no picture")
    with pytest.raises(TooManySkipped, match="1 broken picture"):
        classify(config)
    assert not (config.out / "summary.json").exists()
    classify(replace(config, max_skipped_share=0.2))
    assert read(config.out / "summary.json")["data"]["skipped"] == {"broken picture": 1}


@pytest.mark.parametrize(
    ("argv", "templates"),
    [
        (["--template", "a photo of {}", "--template=my {}"], ["a photo of {}", "my {}"]),
        (["--templates", '["the {}"]'], ["the {}"]),
        ([], ["{}"]),
    ],
)
def test_templates_may_be_given_one_by_one(argv: list[str], templates: list[str]) -> None:
    required = ["--model", "m", "--data", "d", "--classes", "c", "--out", "o"]
    assert parse(ClassifyConfig, [*required, *argv]).read_templates() == templates


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--template"], "--template needs a value"),
        (["--template", "{}", "--templates", "[]"], "either by --template or by --templates"),
        (["--template", "a {}", "--templates_file", "t.txt"], "either templates or templates_file"),
        (["--out", "report.json"], r"out is report\.json; it must be a folder"),
        (["--seed", "1"], "seed can not act on the method image_given_text"),
        (["--diffusion.policy", "full"], "diffusion can not act on the method image_given_text"),
        (["--method", "contrastive", "--dtype", "bfloat16"], "dtype can not act on the method contrastive"),
        (["--method", "diffusion", "--variants.flip", "true"], "variants can not act on the method diffusion"),
        (
            ["--method", "diffusion", "--diffusion.policy", "full", "--diffusion.cap", "4"],
            r"diffusion\.cap can not act on the policy full",
        ),
        (["--shard", "2/2"], "shard is '2/2'"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(argv: list[str], message: str) -> None:
    required = ["--model", "m", "--data", "d", "--classes", "c", "--out", "o"]
    with pytest.raises(UsageError, match=message):
        parse(ClassifyConfig, [*required, *argv])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("guess", "'guess' is unknown; choose image_given_text, text_given_image, diffusion, contrastive"),
    ],
)
def test_a_method_that_is_not_there_says_what_there_is(
    method: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--data", str(tmp_path), "--classes", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        command(ClassifyConfig, classify, ["--model", "m", "--method", method, *paths])
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_launcher_shares_the_pictures(config: ClassifyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        classify(config)
    assert len((config.out / "records.0-of-2.jsonl").read_text().splitlines()) == 4
    assert len((config.out / "records.1-of-2.jsonl").read_text().splitlines()) == 3
    assert read(config.out / "summary.json")["data"]["num_pictures"] == 7
