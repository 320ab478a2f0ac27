"""Pretraining that starts from another model's weights, and takes its shape from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shapes import tiny_config, write_shapes
from test_launcher import pretrain_on_ranks

from mixmodal.config import parse
from mixmodal.data.packing import Batch
from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.export import ExportError, load_transformer
from mixmodal.models.transformer import TransformerConfig
from mixmodal.training.base_model import BaseModel
from mixmodal.training.plan import PlanConfig, build_plan, load_training
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token shards, and the base model `run/export` that has seen them for ten steps."""
    folder = tmp_path_factory.mktemp("base")
    write_shapes(folder / "tokens", 40)
    pretrain(tiny_config(folder, max_steps=10))
    return folder


@pytest.fixture
def base(root: Path, tmp_path: Path) -> Path:
    """A copy of the base model to change."""
    return Path(shutil.copytree(root / "run/export", tmp_path / "base"))


@pytest.fixture
def config(root: Path, tmp_path: Path, base: Path) -> Callable[..., PretrainConfig]:
    """Goes on from the base model, in a run folder of its own."""

    def build(max_steps: int = 2, name: str = "run", **trainer: Any) -> PretrainConfig:
        tiny = tiny_config(root, max_steps=max_steps, **{"run_dir": tmp_path / name, **trainer})
        return replace(tiny, model=TransformerConfig(), init_from=base)

    return build


def edit(folder: Path, section: str, value: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, section: value}))


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def plain_losses(folder: Path, config: PretrainConfig) -> dict[str, float]:
    """Mean cross-entropy of the folder's network over targets of text and of codes, of the run's first rows."""
    task = PretrainTask(config)
    batch: Batch = next(task.build_loader(4, 1, 0, 1))
    model = load_transformer(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, batch.segment_ids)[:, :-1]
    targets, weights = batch.tokens[:, 1:], batch.loss_weights[:, 1:]
    counted = (weights != 0) & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] != 0)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    kinds = {name: counted & task.vocabulary.contains(name, targets) for name in ("text", "image")}
    return {name: float(nll[kind].mean()) for name, kind in kinds.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_loss_is_that_of_the_base_model(
    config: Callable[..., PretrainConfig], base: Path, stage: int
) -> None:
    training = config(max_steps=1, deepspeed=ROOT / f"configs/deepspeed/zero{stage}.json")
    expected = plain_losses(base, training)
    pretrain(training)
    (found,) = records(training.trainer.run_dir)
    assert found["loss_text"] == pytest.approx(expected["text"], rel=1e-6)  # worst seen: 6e-8
    assert found["loss_image"] == pytest.approx(expected["image"], rel=1e-6)
    assert expected["text"] < 5.0  # it has learnt; the uniform loss is 5.8


def test_weights_come_bit_for_bit_and_in_float32(config: Callable[..., PretrainConfig], base: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = PretrainTask(config()).build_model()
    assert torch.equal(torch.get_rng_state(), before), "nothing is to be drawn"
    stored = load_file(base / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_weights_stored_in_bfloat16_are_trained_in_float32(config: Callable[..., PretrainConfig], base: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    model = PretrainTask(config()).build_model()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())
    expected = plain_losses(base, config(max_steps=1))
    pretrain(config(max_steps=1))
    (found,) = records(config().trainer.run_dir)
    assert found["loss_text"] == pytest.approx(expected["text"], rel=1e-6)


def test_a_run_goes_on_from_its_own_weights_exactly(config: Callable[..., PretrainConfig]) -> None:
    training = config(max_steps=4, save_every=2, keep_checkpoints=9, ema_decay=0.9)
    training = replace(training, model=TransformerConfig(dropout=0.1))
    pretrain(training)
    run = training.trainer.run_dir
    whole, lines = load_transformer(run / "export").state_dict(), records(run)
    (run / "checkpoints/latest").write_text("step_00000002\n")
    pretrain(training)
    assert [line["loss"] for line in records(run)] == [line["loss"] for line in lines]
    assert all(torch.equal(load_transformer(run / "export").state_dict()[name], whole[name]) for name in whole)
    assert load_transformer(run / "export").config.dropout == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_start_from_the_same_weights(
    config: Callable[..., PretrainConfig], tmp_path: Path, stage: int
) -> None:
    zero_file = ROOT / f"configs/deepspeed/zero{stage}.json"
    one = config(max_steps=3, deepspeed=zero_file)
    pretrain(one)
    two = config(max_steps=3, name="two", deepspeed=zero_file, micro_batch_size=2)
    pretrain_on_ranks(tmp_path, 2, two)
    names = ("loss", "loss_text", "loss_image", "grad_norm")
    for first, second in zip(records(one.trainer.run_dir), records(two.trainer.run_dir), strict=True):
        assert [first[name] for name in names] == pytest.approx([second[name] for name in names], rel=1e-5)


def test_the_shape_may_be_left_out_or_repeated(config: Callable[..., PretrainConfig], root: Path, base: Path) -> None:
    shape = load_transformer(base).config
    given = [TransformerConfig(), shape, replace(shape, vocab_size=0, num_kv_heads=2, head_dim=32)]
    for own in given:
        assert PretrainTask(replace(config(), model=own)).model_config == shape
    assert PretrainTask(replace(config(), model=TransformerConfig(dropout=0.2))).model_config.dropout == 0.2


def test_another_shape_is_refused_with_each_key_that_differs(config: Callable[..., PretrainConfig], base: Path) -> None:
    own = replace(load_transformer(base).config, num_layers=3, ffn_dim=96, dropout=0.3)
    with pytest.raises(ValueError, match="model: num_layers is 3, not 2, ffn_dim is 96, not 128 as in init_from"):
        PretrainTask(replace(config(), model=own))


def test_another_vocabulary_is_refused_with_both(config: Callable[..., PretrainConfig], base: Path) -> None:
    own = PretrainTask(config()).vocabulary
    edit(base, "vocabulary", own.to_dict())
    assert PretrainTask(config()).base
    edit(base, "vocabulary", {**own.to_dict(), "num_sentinels": 7, "num_reserved": 2})
    with pytest.raises(
        ValueError, match=f"'num_sentinels': 7.* have {own.digest[:12]}.*folder and tokens.num_sentinels 7"
    ):
        PretrainTask(config())
    edit(base, "vocabulary", {"num_words": 3})
    with pytest.raises(ExportError, match=r"config\.json: section 'vocabulary' can not be used"):
        PretrainTask(config())


def test_documents_that_are_spelled_otherwise_are_refused(config: Callable[..., PretrainConfig], base: Path) -> None:
    edit(base, "sequence_format", {"name": "cm3leon", "grids": {}})
    assert PretrainTask(config()).base
    edit(base, "sequence_format", {"name": "chameleon", "grids": {}})
    with pytest.raises(
        ValueError, match=r"as chameleon, and the token shards .*manifest\.json as cm3leon; prepare them"
    ):
        PretrainTask(config())


def test_tokenizers_of_the_base_model_are_exported(
    config: Callable[..., PretrainConfig], base: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PretrainTask(config()).config.text_tokenizer is None
    shutil.copyfile(tokenizers / "text.model", base / "text_tokenizer.model")
    shutil.copytree(tokenizers / "image", base / "image_tokenizer")
    monkeypatch.setattr(TokenShards, "check", lambda *_, **__: None)  # the shards name no real tokenizers
    monkeypatch.setattr(PretrainTask, "_build_text_bytes", lambda _: None)  # nor are ids theirs
    found = PretrainTask(config()).config
    assert (found.text_tokenizer, found.image_tokenizer) == (base / "text_tokenizer.model", base / "image_tokenizer")


def test_a_folder_without_vocabulary_needs_enough_rows(config: Callable[..., PretrainConfig], base: Path) -> None:
    edit(base, "model", {**asdict(load_transformer(base).config), "vocab_size": 300})
    with pytest.raises(ValueError, match=r"has 300 rows, but the vocabulary of .*tokens/manifest\.json 335 ids"):
        PretrainTask(config())


def test_shards_of_another_text_tokenizer_are_refused(
    config: Callable[..., PretrainConfig], base: Path, tokenizers: Path
) -> None:
    shutil.copyfile(tokenizers / "text.model", base / "text_tokenizer.model")
    with pytest.raises(ValueError, match=r"manifest\.json: text_tokenizer_sha256 is tttt"):
        PretrainTask(config())


def test_a_folder_that_is_no_model_is_named(config: Callable[..., PretrainConfig], base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors is missing"):
        PretrainTask(config()).build_model()
    with pytest.raises(ExportError, match="nowhere is not a folder"):
        BaseModel(base / "nowhere")


def test_the_plan_takes_the_shape_of_the_base_model(base: Path, root: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()  # of which the plan reads nothing
    file = tmp_path / "config.yaml"
    file.write_text(
        f"init_from: {base}\ndata: {{tokens: {tmp_path}/none, seq_len: 128}}\n"
        f"trainer: {{run_dir: {tmp_path}/run, max_steps: 1, micro_batch_size: 4}}\n"
    )
    training = load_training(file)
    assert isinstance(training, PretrainConfig)
    found = build_plan(training, PlanConfig(training=file))
    assert found.parameters == sum(p.numel() for p in load_transformer(root / "run/export").parameters())


@pytest.mark.parametrize("option", ["--init_from", "--init-from"])
def test_the_plan_takes_the_folder_as_an_option(option: str, base: Path) -> None:
    found = parse(PlanConfig, ["--config", "configs/train/anole.yaml", option, str(base), "--gpus", "8"])
    assert found.gpus == 8
    training = load_training(ROOT / found.training, found.overrides)
    assert isinstance(training, PretrainConfig)
    assert training.init_from == base
