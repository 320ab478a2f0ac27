"""An adapter is trained and all else stays as it is; it is taken into the weights and out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_conversations, write_shapes
from torch import Tensor

from mixmodal.interop.adapter_files import load_adapter
from mixmodal.interop.adapters import merge, unmerge
from mixmodal.interop.export import load_transformer
from mixmodal.models.transformer import Transformer
from mixmodal.training.adapter import AdapterConfig, AdapterTask
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain

ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])
BASES = pytest.mark.parametrize("base", ["run", "tied"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations and two base models that have seen pairs: `run`, and `tied` with one matrix."""
    folder = tmp_path_factory.mktemp("adapter")
    write_shapes(folder / "tokens", 20)
    pretrain(tiny_config(folder, max_steps=5))
    tied = tiny_config(folder, max_steps=1, run_dir=folder / "tied")
    pretrain(replace(tied, model=replace(tied.model, tie_embeddings=True)))
    write_conversations(folder / "talk", 300)
    write_conversations(folder / "held_out", 60, seed=1)
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Tunes an adapter on the conversations, in a run folder of its own; weight decay is 0.1."""

    def build(max_steps: int = 3, base: str = "run", trainer: Any = None, **adapter: Any) -> FinetuneConfig:
        settings = {"micro_batch_size": 4, "log_every": 1, "tensorboard": False, "run_dir": tmp_path / "run"}
        return FinetuneConfig(
            init_from=root / base / "export",
            data=FinetuneDataConfig(tokens=root / "talk", seq_len=64),
            optimizer=OptimizerConfig(lr=5e-3, warmup_steps=2),
            adapter=AdapterConfig(**{"rank": 4, **adapter}),
            trainer=TrainerConfig(max_steps=max_steps, **{**settings, **(trainer or {})}),
        )

    return build


def stage(number: int) -> dict[str, Any]:
    return {"deepspeed": ROOT / f"configs/deepspeed/zero{number}.json"}


def records(config: PretrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_transformer(folder / "export").state_dict()


def task_of(config: FinetuneConfig) -> AdapterTask:
    assert config.adapter
    return AdapterTask(config, config.adapter)


def logits(model: Any) -> Tensor:
    tokens = torch.arange(60).reshape(2, 30) % 97
    with torch.no_grad():
        return model(tokens)


def stirred(config: FinetuneConfig) -> tuple[AdapterTask, Transformer]:
    """A task and its network, of which all that is trained is another by a lot."""
    task = task_of(config)
    model = task.build_model()
    assert isinstance(model, Transformer)
    torch.manual_seed(1)
    image = task.vocabulary.ids("image")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.requires_grad:
                parameter[image.start : image.stop] += 0.1 * torch.randn(len(image), parameter.shape[1])
    return task, model.eval()


@KINDS
@BASES
def test_a_new_adapter_changes_nothing(config: Callable[..., FinetuneConfig], kind: str, base: str) -> None:
    training = config(kind=kind, base=base)
    adapted = task_of(training).build_model().eval()
    assert torch.equal(logits(adapted), logits(load_transformer(training.init_from)))


@KINDS
@BASES
@pytest.mark.parametrize("rows", [["image"], []])
def test_merged_weights_compute_the_same(
    config: Callable[..., FinetuneConfig], kind: str, base: str, rows: list[str]
) -> None:
    training = config(kind=kind, base=base, rows=rows)
    task, adapted = stirred(training)
    plain = load_transformer(training.init_from)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    replaced = merge(plain, task.read_adapter(adapted))
    assert len(replaced) == 8 + len(rows) * (1 if base == "tied" else 2)
    torch.testing.assert_close(logits(plain), logits(adapted), atol=2e-5, rtol=0)  # seen: 5.1e-6, of logits up to 3
    assert (logits(plain) - logits(load_transformer(training.init_from))).abs().max() > 0.1
    unmerge(plain, replaced)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def assert_base_is_kept(config: FinetuneConfig) -> dict[str, Tensor]:
    """All but the adapter's targets and the image rows is the base model's, bit for bit; what was exported."""
    before, after = weights(config.init_from.parent), weights(config.trainer.run_dir)
    image = task_of(config).vocabulary.ids("image")
    for name, tensor in before.items():
        if name.endswith(("qkv.weight", "out.weight", "up.weight")):
            assert not torch.equal(after[name], tensor), name
        elif name in ("embedding.weight", "output.weight"):
            changed = (after[name] != tensor).any(dim=1).nonzero().squeeze(1).tolist()
            assert changed == list(image) or (
                name.startswith("emb") and len(changed) > 20 and set(changed) < set(image)
            )
        else:
            assert torch.equal(after[name], tensor), name
    return after


@KINDS
@BASES
def test_the_export_is_the_base_model_with_the_adapter(
    config: Callable[..., FinetuneConfig], kind: str, base: str
) -> None:
    training = config(kind=kind, base=base)
    finetune(training)
    exported = assert_base_is_kept(training)
    folder = training.trainer.run_dir / "adapter"
    adapter = load_adapter(folder)
    adapter.check_base(training.init_from)
    plain = load_transformer(training.init_from)
    merge(plain, adapter)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in plain.state_dict().items())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 0.6 * 4 * sum(t.numel() for t in exported.values())
    found = sorted(file.name for file in folder.iterdir())
    assert found == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "rows.safetensors",
    ]
    assert adapter.base_sha256 in (folder / "README.md").read_text()


@KINDS
def test_peft_reads_the_folder(config: Callable[..., FinetuneConfig], kind: str) -> None:
    from peft import PeftModel

    training = config(kind=kind, rows=[])
    finetune(training)
    theirs = PeftModel.from_pretrained(load_transformer(training.init_from), training.trainer.run_dir / "adapter")
    ours = load_transformer(training.trainer.run_dir / "export")
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), atol=2e-5, rtol=0)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_base_is_frozen_at_every_zero_stage(config: Callable[..., FinetuneConfig], number: int) -> None:
    training = config(trainer={"micro_batch_size": 2, "grad_accum_steps": 2, **stage(number)})
    finetune(training)
    exported = assert_base_is_kept(training)
    plain = load_transformer(training.init_from)
    merge(plain, load_adapter(training.trainer.run_dir / "adapter"))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("adapter", [{"dropout": 0.2}, {"kind": "dora"}])
def test_a_run_goes_on_exactly(config: Callable[..., FinetuneConfig], adapter: dict[str, Any]) -> None:
    training = config(4, trainer={"save_every": 2, "keep_checkpoints": 9, "ema_decay": 0.9}, **adapter)
    finetune(training)
    run = training.trainer.run_dir
    whole, lines = (run / "adapter/adapter_model.safetensors").read_bytes(), records(training)
    assert_base_is_kept(training)
    exported = weights(run)
    (run / "checkpoints/latest").write_text("step_00000002\n")
    finetune(training)
    assert [line["loss"] for line in records(training)] == [line["loss"] for line in lines]
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole
    assert all(torch.equal(tensor, exported[name]) for name, tensor in weights(run).items())
