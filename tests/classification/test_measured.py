"""Weights of times and their density by the classify command: measured once, the same for all, never on the test."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.classification.adapters import Labelled
from mixmodal.classification.denoising import fit_weighting
from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer
from mixmodal.classification.loading import LoadedModel
from mixmodal.classification.measured import Measured, measuring_units, read_or_measure
from mixmodal.classification.units import fit_density, measure_spread
from mixmodal.config import UsageError, parse
from mixmodal.pipeline import classifiers
from mixmodal.pipeline.classifiers import DiffusionPictures
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.tokenization.preprocessing import open_picture

NUM_CLASSES, SIZE = 3, 4
LEVELS = (40, 128, 216)
UNIFORM = DiffusionOptions(policy="full", num_times=16)
IMPORTANCE = replace(UNIFORM, times="importance", pilot_pictures=4)


class ToyNetwork(torch.nn.Module):
    """Expects the red of the class late in the schedule; early, where errors are larger, a green that tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        options = {"num_class_embeds": NUM_CLASSES, "sample_size": SIZE, "in_channels": 3}
        self.config = SimpleNamespace(**options, get=options.get)

    def forward(self, z: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, **_: Any) -> Any:
        levels = torch.tensor(LEVELS)[class_labels] / 127.5 - 1
        found = torch.zeros_like(z)
        found[torch.arange(len(z)), (timestep < 500).long()] = levels[:, None, None].expand(-1, SIZE, SIZE)
        return (found,)


def build_adapter() -> Labelled:
    alphas = torch.linspace(0.95, 0.3, 1000)
    scheduler = SimpleNamespace(config={"prediction_type": "sample"}, alphas_cumprod=alphas)
    return Labelled(SimpleNamespace(unet=ToyNetwork(), scheduler=scheduler))


def save_pictures(folder: Path, number: int, seed: int) -> Path:
    """Red tells the class, green is as it falls, and blue is another for each."""
    generator = np.random.default_rng(seed)
    for place in range(number):
        label = place % NUM_CLASSES
        colour = (LEVELS[label], LEVELS[generator.integers(3)], 2 * place + seed)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / str(label) / f"{place}.png")
    return folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassifyConfig:
    monkeypatch.setattr(classifiers, "load_model", lambda *_: LoadedModel(build_adapter(), "toy", "1"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "classes.txt").write_text("0\n1\n2\n")
    return ClassifyConfig(
        model=str(tmp_path / "model"),
        data=save_pictures(tmp_path / "data", 24, seed=0),
        classes=tmp_path / "classes.txt",
        out=tmp_path / "out",
        method="diffusion",
        diffusion=UNIFORM,
        device="cpu",
    )


@pytest.fixture
def learned(tmp_path: Path) -> DiffusionOptions:
    fit = save_pictures(tmp_path / "fit", 45, seed=1)
    return replace(UNIFORM, weighting="learned", fit=fit, fit_pictures=10)


@pytest.fixture
def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of pictures of each measurement."""
    found, inner = [], DiffusionPictures.measure

    def measure(self: DiffusionPictures, chosen: Any, wanted: Any) -> Measured:
        found.append(len(chosen.pictures))
        return inner(self, chosen, wanted)

    monkeypatch.setattr(DiffusionPictures, "measure", measure)
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(config: ClassifyConfig, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary, and the costs by key."""
    config = replace(config, **changes)
    classify(config)
    lines = [json.loads(line) for path in config.out.glob("records*") for line in path.read_text().splitlines()]
    summary = config.out / "summary.json"
    return read(summary) if summary.exists() else {}, {one["key"]: one["costs"] for one in lines}


def test_learned_weights_tell_classes_that_uniform_ones_do_not(
    config: ClassifyConfig, learned: DiffusionOptions, tmp_path: Path
) -> None:
    plain, _ = run(config)
    summary, _ = run(config, diffusion=learned, out=tmp_path / "learned")
    assert plain["data"]["accuracy"]["value"] < 0.7
    assert summary["data"]["accuracy"]["value"] == 1
    kept = read(tmp_path / "learned" / "measured.json")
    assert summary["measured"] == {"pictures": 30, "evaluations": 30 * NUM_CLASSES * 40}
    assert summary["settings"]["measured"] == kept["settings"]["measured"]
    assert np.mean(kept["weighting"]["buckets"][10:]) > 2 * np.mean(np.abs(kept["weighting"]["buckets"][:10]))


def test_learned_weights_are_those_of_fit_weighting(
    config: ClassifyConfig, learned: DiffusionOptions, tmp_path: Path
) -> None:
    everything = replace(learned, fit_pictures=15)  # of each class all, so that any order will do
    run(config, diffusion=everything, out=tmp_path / "all")
    scorer = DiffusionScorer(build_adapter(), ["0", "1", "2"])
    paths = sorted(tmp_path.glob("fit/*/*.png"))
    scorer.set_pictures([open_picture(path, "") for path in paths])
    units, labels = measuring_units(0), np.array([int(path.parent.name) for path in paths])
    wanted = fit_weighting(scorer.error_table(units), np.array([unit.time for unit in units]), labels)
    np.testing.assert_allclose(
        read(tmp_path / "all" / "measured.json")["weighting"]["buckets"], wanted.buckets, atol=1e-5
    )


@pytest.mark.parametrize("both", [False, True])
def test_shards_batches_and_later_calls_share_one_measurement(
    config: ClassifyConfig, learned: DiffusionOptions, count_measured: list[int], tmp_path: Path, both: bool
) -> None:
    options = replace(learned, times="importance") if both else IMPORTANCE
    whole, costs = run(config, diffusion=options)
    assert len(count_measured) == 1
    records = (config.out / "records.jsonl").read_text().splitlines(keepends=True)
    (config.out / "records.jsonl").write_text("".join(records[:5]))
    assert run(config, diffusion=options) == (whole, costs)
    assert len(count_measured) == 1
    parts = {"diffusion": options, "out": tmp_path / "parts", "batch_size": 5}
    run(config, **parts, shard="1/2")
    summary, shared = run(config, **parts, shard="0/2")
    assert len(count_measured) == 2
    for key, found in costs.items():
        np.testing.assert_allclose(shared[key], found, rtol=1e-5)
    assert summary["settings_sha256"] == whole["settings_sha256"]
    assert summary["measured"] == whole["measured"]
    assert not list(config.out.glob(".*"))


def test_importance_leaves_the_mean_cost_as_it_is(config: ClassifyConfig, tmp_path: Path) -> None:
    _, uniform = run(config, diffusion=replace(UNIFORM, num_times=512))
    summary, found = run(config, diffusion=replace(IMPORTANCE, num_times=512), out=tmp_path / "importance")
    for key, costs in uniform.items():
        np.testing.assert_allclose(found[key], costs, rtol=0.02)  # worst seen 0.0056
    kept = read(tmp_path / "importance" / "measured.json")
    scorer = DiffusionScorer(build_adapter(), ["0", "1", "2"], config=DiffusionConfig())
    scorer.set_pictures([open_picture(path, "") for path in sorted(config.data.glob("*/*.png"))[:4]])
    units = measuring_units(0)
    wanted = fit_density(np.array([unit.time for unit in units]), measure_spread(scorer, range(4), 3, units))
    np.testing.assert_allclose(kept["density"], wanted.values, rtol=1e-4)
    assert kept["density"][100] > 2 * kept["density"][900]
    assert summary["measured"] == {"pictures": 4, "evaluations": 4 * 3 * 40}


def test_labels_of_the_data_play_no_part_in_a_pilot(config: ClassifyConfig, tmp_path: Path) -> None:
    rows = [path.relative_to(tmp_path) for path in sorted(config.data.glob("*/*.png"))]
    for name, label in (("one", "0"), ("other", "2"), ("none", "")):
        (tmp_path / f"{name}.csv").write_text(
            "".join(f"{row}\n" for row in ["path,label", *(f"{r},{label}" for r in rows)])
        )
        run(config, data=tmp_path / f"{name}.csv", out=tmp_path / name, diffusion=IMPORTANCE)
    one, other, none = (read(tmp_path / name / "measured.json") for name in ("one", "other", "none"))
    assert one == other == none


def test_pictures_that_are_learned_from_are_not_judged(
    config: ClassifyConfig, learned: DiffusionOptions, count_measured: list[int]
) -> None:
    assert learned.fit is not None
    copy = config.data / "1" / "1.png"
    Image.open(copy).save(learned.fit / "1" / "copy.bmp")  # another file of the same pixels
    with pytest.raises(ValueError, match=r"diffusion\.fit: 1 of its pictures, as 1/1\.png, are in data"):
        run(config, diffusion=replace(learned, fit_pictures=99))
    assert not count_measured
    assert not list(config.out.glob("*"))


def test_other_pictures_to_fit_on_are_other_settings(config: ClassifyConfig, learned: DiffusionOptions) -> None:
    run(config, diffusion=learned)
    (config.out / "records.jsonl").write_text("")
    assert learned.fit is not None
    for path in learned.fit.glob("2/*.png"):
        path.unlink()
    (learned.fit / "2").rmdir()
    with pytest.raises(ValueError, match=r"settings\.json: measured\.num_pictures was 30 .* and is 20 now"):
        run(config, diffusion=learned)
    (config.out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"measured\.json: settings\.measured\.num_pictures was 30 .* is 20 now"):
        run(config, diffusion=learned)


def test_of_two_that_measure_at_once_the_first_to_write_counts(tmp_path: Path) -> None:
    def build(density: int) -> Measured:
        return Measured(times=np.full(2, 0.5), weighting=None, density=None, num_pictures=density, num_evaluations=1)

    def slow() -> Measured:
        read_or_measure(tmp_path / "m.json", {"a": (1,)}, lambda: build(1))  # another process meanwhile
        return build(2)

    assert read_or_measure(tmp_path / "m.json", {"a": (1,)}, slow).num_pictures == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    (tmp_path / "m.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"m\.json: it can not be read .* remove it"):
        read_or_measure(tmp_path / "m.json", {"a": (1,)}, slow)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["weighting", "learned"], r"learned needs labelled pictures; give them as diffusion\.fit"),
        (["fit", "x"], r"diffusion\.fit can not act without weighting learned or times importance"),
        (["fit_pictures", "3", "times", "importance"], r"diffusion\.fit_pictures can not act without fit"),
        (["pilot_pictures", "3"], r"diffusion\.pilot_pictures can not act"),
        (["pilot_pictures", "3", "times", "importance", "fit", "x"], r"diffusion\.pilot_pictures can not act"),
        (["pilot_pictures", "0", "times", "importance"], r"diffusion\.pilot_pictures is 0; it must be at least 1"),
        (["times", "importance", "policy", "staged"], "importance can not act on the policy staged"),
    ],
)
def test_options_that_do_not_act_are_refused(argv: list[str], message: str) -> None:
    required = ["--model", "m", "--data", "d", "--classes", "c", "--out", "o", "--method", "diffusion"]
    options = [f"--diffusion.{name}={value}" for name, value in zip(argv[::2], argv[1::2])]
    with pytest.raises(UsageError, match=message):
        parse(ClassifyConfig, [*required, *options])
