"""Diffusion models and CLIP by the classify command: what their scorers find, however pictures are shared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer
from mixmodal.classification.loading import load_model
from mixmodal.classification.policies import Full
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.tokenization.preprocessing import open_picture

CLASSES = ["a red apple", "green pears", "two"]
TEMPLATES = ["{}", "a photo of {}"]


@pytest.fixture
def config(tmp_path: Path) -> ClassifyConfig:
    for number, pair in enumerate(synthetic_pairs(5, 20)):
        folder = tmp_path / "data" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pair.picture.save(folder / f"{number}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    paths = {"data": tmp_path / "data", "classes": tmp_path / "classes.txt", "out": tmp_path / "out"}
    return ClassifyConfig(model="m", method="contrastive", templates=TEMPLATES, **paths)


def run(config: ClassifyConfig, **changes: Any) -> dict[str, dict[str, Any]]:
    """Records by key."""
    options = {**vars(config), **changes}
    classify(ClassifyConfig(**options))
    lines = [json.loads(line) for path in options["out"].glob("records*") for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def test_contrastive_scores_are_those_of_the_classifier(config: ClassifyConfig, encoder: Path) -> None:
    found = run(config, model=str(encoder))
    classifier = ContrastiveClassifier(load_encoder(encoder), CLASSES, TEMPLATES)
    for key, line in found.items():
        wanted = classifier.score([open_picture(config.data / key, key)])
        assert line["scores"] == wanted.scores[0].tolist()
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["data"]["num_pictures"] == len(found) == 5


def test_diffusion_scores_are_the_mean_costs_of_all_units(config: ClassifyConfig, pipeline: Path) -> None:
    options = {"method": "diffusion", "model": str(pipeline), "seed": 3}
    found = run(config, **options, diffusion=DiffusionOptions(policy="full", num_times=6, loss="l1"))
    scorer = DiffusionScorer(load_model(pipeline).adapter, CLASSES, TEMPLATES, DiffusionConfig(loss="l1", seed=3))
    units = Full(num_times=6).build_units(seed=3, num_templates=2)
    for key, line in found.items():
        scorer.set_pictures([open_picture(config.data / key, key)])
        costs = [scorer.cost([0] * 6, [number] * 6, units).mean() for number in range(3)]
        np.testing.assert_allclose(line["costs"], costs, rtol=1e-5)
        np.testing.assert_allclose(line["scores"], -scorer.scale * np.array(costs), rtol=1e-5)
        assert line["evaluations"] == [6, 6, 6]


def test_shards_and_batches_of_diffusion_find_the_same(config: ClassifyConfig, pipeline: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "diffusion",
        "model": str(pipeline),
        "diffusion": DiffusionOptions(min_times=2, max_times=5, p_value=0.3),
    }
    whole = run(config, **options)
    for index in range(2):
        shared = run(config, **options, out=tmp_path / "shared", shard=f"{index}/2", batch_size=2)
    for key, line in whole.items():
        assert (shared[key]["evaluations"], shared[key]["prediction"]) == (line["evaluations"], line["prediction"])
        np.testing.assert_allclose(shared[key]["scores"], line["scores"], rtol=1e-5)
    assert sum(sum(line["evaluations"]) for line in whole.values()) < 5 * 3 * 9  # some classes went
    (summary,) = [json.loads((folder / "summary.json").read_text()) for folder in [tmp_path / "shared"]]
    assert summary["data"]["accuracy"] == json.loads((config.out / "summary.json").read_text())["data"]["accuracy"]


def test_a_model_that_is_none_is_named(config: ClassifyConfig, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"diffusion model .*nothing: there is neither model_index\.json"):
        run(config, method="diffusion", model=str(tmp_path / "nothing"))
    assert not list(config.out.glob("*"))  # the next call may have another model
