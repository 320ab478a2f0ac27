"""Tuning on two processes is tuning on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_conversations, write_shapes
from test_launcher import ROOT, pretrain_on_ranks

from mixmodal.interop.export import load_transformer
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import pretrain

LOSSES = ("loss", "loss_text", "loss_image", "grad_norm")


def records(config: FinetuneConfig) -> list[dict[str, Any]]:
    lines = (config.trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_tune_as_one(tmp_path: Path, stage: int) -> None:
    write_shapes(tmp_path / "tokens", 20)
    pretrain(tiny_config(tmp_path, max_steps=1))
    write_conversations(tmp_path / "talk", 60)
    given = {"log_every": 1, "tensorboard": False, "deepspeed": ROOT / f"configs/deepspeed/zero{stage}.json"}
    balance = {"text": 0.75, "image": 0.25}
    one = FinetuneConfig(
        init_from=tmp_path / "run/export",
        data=FinetuneDataConfig(tokens=tmp_path / "talk", seq_len=64, modality_balance=balance),
        optimizer=OptimizerConfig(lr=5e-3),
        trainer=TrainerConfig(max_steps=4, micro_batch_size=4, run_dir=tmp_path / "one", **given),
    )
    finetune(one)
    two = replace(one, trainer=replace(one.trainer, micro_batch_size=2, run_dir=tmp_path / "two"))
    pretrain_on_ranks(tmp_path, 2, two, "finetune")
    for first, second in zip(records(one), records(two), strict=True):
        assert [first[name] for name in LOSSES] == pytest.approx([second[name] for name in LOSSES], rel=1e-5)
        for record in (first, second):
            assert record["answer_share/text"] == pytest.approx(0.75, abs=0.05)
            assert record["documents/text"] + record["documents/image"] > 0
        assert first["answer_share/text"] == second["answer_share/text"]
    weights = [load_transformer(config.trainer.run_dir / "export").state_dict() for config in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)
