"""The match command with real models: what it writes, from one process or several, and published layouts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixmodal.classification.compositional import evaluate_compositions, read_compositions
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.classification.pair_scores import by_image_alone, by_likelihood, by_text_alone
from mixmodal.data.skipping import TooManySkipped
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.pipeline.match import match
from mixmodal.pipeline.match_config import MatchConfig

CAPTIONS = ["a red apple", "a blue pear"]


@pytest.fixture
def config(exported: Path, tmp_path: Path) -> MatchConfig:
    for place, pair in enumerate(synthetic_pairs(6, 20)):
        pair.picture.save(tmp_path / f"{place}.png")
    grids = [
        {"key": str(row), "kind": "ab"[row % 2], "images": [f"{2 * row}.png", f"{2 * row + 1}.png"], "true": [0, 1]}
        for row in range(3)
    ]
    rows = [*grids, {"key": "one", "kind": "choice", "images": ["0.png"], "true": [1]}]
    lines = "".join(json.dumps({**row, "captions": CAPTIONS}) + "\n" for row in rows)
    (tmp_path / "task.jsonl").write_text(lines)
    return MatchConfig(model=str(exported), task=tmp_path / "task.jsonl", out=tmp_path / "out", device="cpu")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for path in folder.glob("records*") for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def test_scores_are_those_of_the_functions(config: MatchConfig) -> None:
    match(config)
    model = MixedModal.from_pretrained(config.model, "cpu")
    scorer, task = SequenceScorer(model.model, model.format), read_compositions(config.task)
    pairs = by_likelihood(scorer, model.codec, "image_given_text")
    plain, rows, found = evaluate_compositions(task, pairs), records(config.out), read(config.out / "summary.json")
    assert [rows[one.key]["scores"] for one in task] == [line["scores"] for line in plain["lines"]]
    assert found["all"]["accuracy"]["hits"] == plain["all"]["num_correct"]
    assert (found["all"]["accuracy"]["total"], found["all"]["image"]["total"]) == (7, 3)
    less = evaluate_compositions(task, pairs, by_image_alone(scorer, model.codec))["all"]
    for name in ("image", "group"):
        assert found["all"][name]["hits"] == plain["all"][name]
        assert found["all"]["less_image_prior"][name]["hits"] == less[name]
    blind = evaluate_compositions(task, by_text_alone(scorer))["all"]
    assert found["blind"]["all"]["accuracy"]["hits"] == blind["num_correct"]
    assert set(found["kinds"]) == {"a", "b", "choice"}
    assert found["kinds"]["choice"]["group"] is None


def test_shards_and_a_call_that_goes_on_give_the_summary_of_one_process(config: MatchConfig, tmp_path: Path) -> None:
    config = replace(config, method="text_given_image", debias=0.5)
    match(config)
    parts = replace(config, out=tmp_path / "parts")
    for index in (1, 0):
        assert not (parts.out / "summary.json").exists()
        match(replace(parts, shard=f"{index}/2"))
    assert read(parts.out / "summary.json") == read(config.out / "summary.json")
    assert "less_image_prior" not in read(config.out / "summary.json")["all"]
    path = config.out / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # torn
    match(config)
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match=r"settings\.json: debias was 0\.5 when this was written and is 0\.0 now"):
        match(replace(config, debias=0.0))


def test_encoders_are_blind_by_another_model_alone(
    config: MatchConfig, tmp_path: Path, save_tiny_encoder: Callable[..., Path]
) -> None:
    encoder = replace(config, model=str(save_tiny_encoder("clip", tmp_path / "clip")), method="contrastive")
    match(encoder)
    assert "blind" not in read(config.out / "summary.json")
    match(config := replace(config, out=tmp_path / "ours"))
    match(replace(encoder, out=tmp_path / "beside", blind=config.model))
    assert read(tmp_path / "beside" / "summary.json")["blind"] == read(config.out / "summary.json")["blind"]


def test_a_diffusion_model_keeps_its_text_encoder_from_line_to_line(
    config: MatchConfig, tmp_path: Path, load: Callable[[str], Any]
) -> None:
    pytest.importorskip("diffusers")
    load("tiny_diffusion").build("sd_epsilon").save_pretrained(tmp_path / "pipeline")
    options = {"method": "diffusion", "diffusion": DiffusionOptions(policy="full", num_times=3)}
    config = replace(config, model=str(tmp_path / "pipeline"), **options)
    match(config)
    match(replace(config, out=tmp_path / "small", batch_size=2, shard="0/2"))
    for key, row in records(tmp_path / "small").items():
        for scores, wanted in zip(row["scores"], records(config.out)[key]["scores"]):
            assert scores == pytest.approx(wanted, rel=1e-5)


def test_lines_of_broken_pictures_are_counted_and_done_once_mended(config: MatchConfig, tmp_path: Path) -> None:
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(TooManySkipped, match="1 of 4 samples are bad"):
        match(config)
    match(replace(config, max_skipped_share=0.5))
    assert read(config.out / "summary.json")["skipped"] == {"broken picture": 1}
    (tmp_path / "2.png").write_bytes(whole)
    match(config)
    assert (read(config.out / "summary.json")["num_lines"], read(config.out / "summary.json")["skipped"]) == (4, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "x"}, "method 'x' is unknown"),
        ({"debias": 0.5}, "debias can not act on the method image_given_text"),
        ({"seed": 1}, "seed can not act"),
        ({"method": "diffusion", "diffusion": DiffusionOptions()}, "policy is adaptive; pictures are compared, too"),
        (
            {"method": "diffusion", "diffusion": DiffusionOptions(policy="full", times="importance")},
            "a task has no labelled pictures",
        ),
        ({"method": "contrastive", "dtype": "bfloat16"}, "dtype can not act"),
        ({"shard": "2/2"}, "shard is '2/2'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_can_not_act_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MatchConfig(**{"model": "m", "task": tmp_path / "t.jsonl", "out": tmp_path / "out", **change})


def test_published_layouts_are_read(config: MatchConfig, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for place in range(2):
        (tmp_path / f"{place}.png").rename(tmp_path / "images" / f"ex_0_img_{place}.png")
    names = {"image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": CAPTIONS[0], "caption_1": CAPTIONS[1]}
    (tmp_path / "examples.jsonl").write_text(json.dumps({"id": 0, **names, "tag": "x", "collapsed_tag": "Object"}))
    (one,) = read_compositions(tmp_path / "examples.jsonl")
    assert (one.key, one.kind, one.captions, one.true, one.is_grid) == ("0", "Object", tuple(CAPTIONS), (0, 1), True)
    assert [path.name for path in one.images] == ["ex_0_img_0.png", "ex_0_img_1.png"]
    entry = {"filename": "ex_0_img_1.png", "caption": "a", "negative_caption": "b"}
    (tmp_path / "swap.json").write_text(json.dumps({"7": entry}))
    (one,) = read_compositions(tmp_path / "swap.json", tmp_path / "images")
    assert (one.key, one.captions, one.true, one.images[0].name) == ("7", ("a", "b"), (0,), "ex_0_img_1.png")
    (tmp_path / "swap.json").write_text(json.dumps({"7": {"caption": "a"}}))
    with pytest.raises(ValueError, match=r"swap\.json, entry 7: there is no field 'filename'"):
        read_compositions(tmp_path / "swap.json")
    (tmp_path / "swap.json").write_text("[]")
    with pytest.raises(ValueError, match=r"swap\.json is no object of entries by key"):
        read_compositions(tmp_path / "swap.json")
