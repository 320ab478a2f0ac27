"""Some parameters are trained, or some rows of a matrix, and all else stays as it is bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import tiny_config, write_shapes
from test_launcher import pretrain_on_ranks
from torch import Tensor

from mixmodal.interop.export import load_transformer
from mixmodal.training.checkpoint import load_tensors
from mixmodal.training.optimizer import OptimizerConfig, parameter_groups
from mixmodal.training.plan import PlanConfig, build_plan
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain
from mixmodal.training.trainable import TrainableConfig, choose_rows

ROOT = Path(__file__).parents[2]
CODES = TrainableConfig(parameters=["output"], rows=["image", "end_of_span"])
"""Anole's: the rows of the output of image codes and of the end of a picture."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token shards, and the model `run/export` that has seen them for ten steps."""
    folder = tmp_path_factory.mktemp("base")
    write_shapes(folder / "tokens", 40)
    pretrain(tiny_config(folder, max_steps=10))
    tied = tiny_config(folder, max_steps=3, run_dir=folder / "tied")
    pretrain(replace(tied, model=replace(tied.model, tie_embeddings=True)))
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Goes on from that model; weight decay is 0.1."""

    def build(max_steps: int = 3, trainable: TrainableConfig = CODES, base: str = "run", **trainer: Any) -> Any:
        tiny = tiny_config(root, max_steps=max_steps, **{"run_dir": tmp_path / "run", **trainer})
        own = replace(tiny.model, tie_embeddings=base == "tied")
        assert tiny.optimizer.weight_decay == 0.1
        return replace(tiny, model=own, init_from=root / base / "export", trainable=trainable)

    return build


def stage(number: int) -> dict[str, Any]:
    return {"deepspeed": ROOT / f"configs/deepspeed/zero{number}.json"}


def records(config: PretrainConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (config.trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_transformer(folder / "export").state_dict()


def assert_only_rows_changed(config: PretrainConfig, name: str = "output.weight") -> None:
    """Each row of a code and of the end of a picture differs, and nothing else."""
    assert config.init_from
    before, after = weights(config.init_from.parent), weights(config.trainer.run_dir)
    vocabulary = PretrainTask(config).vocabulary
    named = sorted([*vocabulary.ids("image"), vocabulary.end_of_span])
    for key, tensor in before.items():
        if key == name:
            assert (after[key] != tensor).any(dim=1).nonzero().squeeze(1).tolist() == named
        else:
            assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_exactly_the_named_rows_change(config: Callable[..., PretrainConfig], number: int) -> None:
    training = config(micro_batch_size=2, grad_accum_steps=2, **stage(number))
    pretrain(training)
    assert_only_rows_changed(training)


@pytest.mark.parametrize(("precision", "number"), [("bfloat16", 2), ("bfloat16", 3), ("autocast_bfloat16", 2)])
def test_weights_stored_in_bfloat16_stay_what_they_are(
    config: Callable[..., PretrainConfig], tmp_path: Path, precision: str, number: int
) -> None:
    training = config(precision=precision, **stage(number))
    narrow = Path(shutil.copytree(training.init_from, tmp_path / "narrow/export"))  # type: ignore[arg-type]
    stored = {name: tensor.bfloat16() for name, tensor in load_file(narrow / "model.safetensors").items()}
    save_file(stored, narrow / "model.safetensors")
    training = replace(training, init_from=narrow)
    pretrain(training)
    assert_only_rows_changed(training)


def test_tied_weights_are_kept_by_rows_too(config: Callable[..., PretrainConfig]) -> None:
    training = config(trainable=replace(CODES, parameters=["embedding"]), base="tied")
    pretrain(training)
    assert_only_rows_changed(training, "embedding.weight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3])
def test_two_processes_change_the_same_rows(config: Callable[..., PretrainConfig], tmp_path: Path, number: int) -> None:
    one, two = config(**stage(number)), config(micro_batch_size=2, run_dir=tmp_path / "two", **stage(number))
    pretrain(one)
    pretrain_on_ranks(tmp_path, 2, two)
    assert_only_rows_changed(two)
    for first, second in zip(records(one), records(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)


def test_codes_are_learnt_by_their_rows_alone(config: Callable[..., PretrainConfig]) -> None:
    training = config(max_steps=30)
    pretrain(training)
    lines = records(training)
    first, last = (sum(line["loss_image"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < first - 0.2  # nats a code
    assert_only_rows_changed(training)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_the_norm_is_that_of_the_trained_rows(config: Callable[..., PretrainConfig], number: int) -> None:
    training = config(max_steps=1, **stage(number))
    task = PretrainTask(training)
    batch = next(task.build_loader(4, 1, 0, 1))
    model = load_transformer(training.init_from).train()  # type: ignore[arg-type]
    losses = task.losses(model, batch, 0)
    (losses.objective / task.batch_weight(batch)).backward()
    gradient = model.output.weight.grad[[*task.vocabulary.ids("image"), task.vocabulary.end_of_span]]  # type: ignore[union-attr,index]
    pretrain(training)
    assert records(training)[0]["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_run_with_averages_goes_on_exactly(config: Callable[..., PretrainConfig]) -> None:
    training = config(max_steps=4, save_every=2, keep_checkpoints=9, ema_decay=0.9)
    pretrain(training)
    run = training.trainer.run_dir
    whole, lines = weights(run), records(training)
    assert_only_rows_changed(training)
    (run / "checkpoints/latest").write_text("step_00000002\n")
    pretrain(training)
    assert [line["loss"] for line in records(training)] == [line["loss"] for line in lines]
    assert all(torch.equal(weights(run)[name], whole[name]) for name in whole)


def test_frozen_parameters_have_no_optimizer_states(config: Callable[..., PretrainConfig]) -> None:
    training = config(trainable=TrainableConfig(parameters=["blocks.1", "norm", "blocks.0.ffn*.up.*"]))
    pretrain(training)
    before, after = weights(training.init_from.parent), weights(training.trainer.run_dir)  # type: ignore[union-attr]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {name for name in before if name.startswith(("blocks.1.", "norm.", "blocks.0.ffn.up."))}
    assert changed == wanted
    saved = load_tensors(training.trainer.run_dir / "checkpoints/step_00000003/model_00000.pt")["fragments"]
    assert {name for name, fragment in saved.items() if "exp_avg" in fragment} == wanted


def test_a_matrix_with_frozen_rows_is_not_decayed(config: Callable[..., PretrainConfig]) -> None:
    for rows, decay in ((CODES.rows, 0.0), ([], 0.1)):
        model = PretrainTask(config(trainable=TrainableConfig(parameters=["output"], rows=rows))).build_model()
        (group,) = parameter_groups(model, OptimizerConfig().weight_decay)
        assert group["weight_decay"] == decay
        assert [tuple(parameter.shape) for parameter in group["params"]] == [(335, 64)]


def test_the_plan_counts_what_is_trained(config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    one, all_of_it = (
        build_plan(config(trainable=trainable), PlanConfig(training=tmp_path))
        for trainable in (CODES, TrainableConfig())
    )
    assert one.parameters == 335 * 64
    assert one.rows["weights"] == all_of_it.rows["weights"] == 4 * all_of_it.parameters
    assert one.rows["optimizer"] == 8 * one.parameters
    assert one.rows["gradients"] == 4 * one.parameters
    assert one.saved_bytes < 0.5 * all_of_it.saved_bytes  # nothing is kept for a backward through frozen blocks
    third = one.stages[3]
    assert third["weights"] == all_of_it.stages[3]["weights"]  # stage 3 cuts frozen weights as well


def test_ranges_and_tokens_make_stretches(config: Callable[..., PretrainConfig]) -> None:
    vocabulary = PretrainTask(config()).vocabulary
    image, end = vocabulary.ids("image"), vocabulary.end_of_span
    assert choose_rows(vocabulary, ["end_of_span", "image"]) == [range(image.start, end + 1)]
    assert choose_rows(vocabulary, ["break", "bos", "eos"]) == [range(1), range(2, 3), range(end + 1, end + 2)]
    assert choose_rows(vocabulary, ["special", "pad", "image"]) == [range(image.stop)]


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        (
            {"parameters": ["head"]},
            "'head' names no parameter; the network has embedding, blocks, norm, output",
        ),
        ({"parameters": []}, "trainable.parameters is empty"),
        (
            {"rows": ["audio"]},
            "trainable.rows: vocabulary: no range or control token 'audio'; there are special",
        ),
        ({"parameters": ["blocks"], "rows": ["image"]}, r"trainable.rows \['image'\] can not act"),
    ],
)
def test_what_can_not_act_is_named(config: Callable[..., PretrainConfig], trainable: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainTask(config(trainable=TrainableConfig(**trainable))).build_model()
