"""The swap test has stages whose configs load."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mixmodal.config import load_config
from mixmodal.training.diffusion import DiffusionTrainingConfig

Load = Callable[[str], ModuleType]


@pytest.fixture
def swaps(load: Load) -> ModuleType:
    return load("swap_test")


def test_every_stage_has_a_config_that_loads_and_steps_are_scaled(swaps: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(runs=tmp_path, scale=0.001, lines=2, seed=3)
    swaps.prepare(options)
    configs = {name: swaps.load(options, name) for name in swaps.CHANGES}
    assert configs["pretrain"].trainer.max_steps == configs["encoder"].trainer.max_steps == 4
    assert configs["pretrain"].trainer.seed == 3
    assert configs["encoder"].augment.max_hue == 0  # colours mean something
    assert configs["encoder"].data.caption_until is None
    assert configs["image_tokenizer"].data.train == (tmp_path / "data" / "train",)
    denoiser = load_config(DiffusionTrainingConfig, swaps.config_path(tmp_path, "diffusion"))
    assert (denoiser.trainer.max_steps, denoiser.trainer.seed) == (8, 3)
    assert denoiser.data.train == (tmp_path / "data" / "train",)
    swaps.prepare(options)  # what is drawn stays


def test_changes_act_at_any_depth(swaps: ModuleType) -> None:
    settings = {"a": {"b": 1, "c": 2}, "d": 3}
    assert swaps.merged(settings, {"a": {"b": 5}, "d": None, "e": {"f": 6}}) == {"a": {"b": 5, "c": 2}, "e": {"f": 6}}
    assert settings == {"a": {"b": 1, "c": 2}, "d": 3}
