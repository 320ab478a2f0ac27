"""An adapter beside frozen weights of 4 bits (QLoRA)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, tiny_tuning, write_conversations, write_shapes

from mixmodal.interop.adapter_files import load_adapter
from mixmodal.interop.adapters import merge
from mixmodal.interop.export import load_transformer
from mixmodal.training.adapter import AdapterConfig, AdapterTask
from mixmodal.training.finetune import FinetuneConfig, finetune
from mixmodal.training.plan import PlanConfig, build_plan
from mixmodal.training.pretrain import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    write_shapes(folder / "tokens", 20)
    pretrain(tiny_config(folder, max_steps=5))
    write_conversations(folder / "talk", 300)
    return folder


def config(root: Path, run_dir: Path, max_steps: int = 4, trainer: Any = None, **adapter: Any) -> FinetuneConfig:
    config = AdapterConfig(**{"rank": 4, "quantize": "nf4", **adapter})
    return tiny_tuning(root, run_dir, max_steps, trainer=trainer, adapter=config)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_without_the_library_it_says_how_to_get_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft  # noqa: F401 - which looks for bitsandbytes once

    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    training = config(root, tmp_path / "run")
    assert training.adapter
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'mixmodal\[qlora\]'"):
        AdapterTask(training, training.adapter).build_model()


def test_a_plan_refuses_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leave it out of the plan, and count 0\.52 bytes"):
        build_plan(config(root, tmp_path / "run"), PlanConfig(training=tmp_path))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base_trains_an_adapter_of_the_stored_one(root: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    training = config(root, tmp_path / "run", kind=kind, trainer={"save_every": 2, "keep_checkpoints": 9})
    assert training.adapter
    model = AdapterTask(training, training.adapter).build_model()
    packed = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 8
    assert 2 * sum(p.numel() for p in packed.values()) == 2 * 64 * (192 + 64 + 256 + 128)
    assert not any(p.requires_grad for p in packed.values())
    finetune(training)
    finetune(
        replace(
            training,
            adapter=replace(training.adapter, quantize=None),
            trainer=replace(training.trainer, run_dir=tmp_path / "whole"),
        )
    )
    for own, whole in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert own != whole
        assert abs(own - whole) < 0.1
    plain = load_transformer(training.init_from)
    merge(plain, load_adapter(tmp_path / "run/adapter"))
    exported = load_transformer(tmp_path / "run/export").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in plain.state_dict().items())
    before = losses(tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text("step_00000002\n")
    finetune(training)
    assert losses(tmp_path / "run") == before
    assert all(
        torch.equal(t, exported[name]) for name, t in load_transformer(tmp_path / "run/export").state_dict().items()
    )


@pytest.mark.parametrize(("precision", "stage"), [("bfloat16", 2), ("autocast_bfloat16", 1)])
def test_other_precisions_train_beside_it(root: Path, tmp_path: Path, precision: str, stage: int) -> None:
    pytest.importorskip("bitsandbytes")
    files = Path(__file__).parents[2] / "configs/deepspeed"
    trainer = {"precision": precision, "deepspeed": files / f"zero{stage}.json"}
    finetune(config(root, tmp_path / "run", trainer=trainer))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
