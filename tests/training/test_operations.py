"""Operations of training: what a batch needs, and the MFU that the trainer makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shapes import tiny_config, write_shapes
from toy_task import ToyTask

from mixmodal.data.packing import TrainingDocument, build_batch
from mixmodal.models.transformer import TransformerConfig
from mixmodal.training.operations import Operations
from mixmodal.training.pretrain import PretrainTask
from mixmodal.training.task import Task

Fit = Callable[..., Any]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder with token shards."""
    write_shapes(tmp_path / "tokens", 4)
    return tmp_path


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("tied", [False, True])
def test_operations_count_the_matrices_and_attention(shapes: Path, tied: bool) -> None:
    config = tiny_config(shapes, max_steps=1)
    config = replace(config, model=replace(config.model, qk_norm=False, tie_embeddings=tied))
    vocab_size = PretrainTask(config).vocabulary.size
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + vocab_size * 64
    norms = 5 * 64
    assert PretrainTask(config).flops_per_token() == 6 * (matrices + norms) + 12 * 2 * 64 * 128


def document(num_tokens: int) -> TrainingDocument:
    return TrainingDocument(f"of{num_tokens}", np.arange(num_tokens), np.ones(num_tokens, dtype=np.float32))


def test_operations_of_a_batch_count_attention_within_documents(shapes: Path) -> None:
    config = tiny_config(shapes, max_steps=1)
    task = PretrainTask(replace(config, model=replace(config.model, qk_norm=False)))
    batch = build_batch([[document(3), document(5)], [document(4)], []], 128, pad=1)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + task.vocabulary.size * 64
    norms = 5 * 64
    assert task.batch_flops(batch) == 6 * (matrices + norms) * 12 + 12 * 2 * 64 * (3 * 3 + 5 * 5 + 4 * 4)


def test_a_document_that_fills_its_row_needs_what_a_plan_takes_a_token_to_need(shapes: Path) -> None:
    task = PretrainTask(tiny_config(shapes, max_steps=1))
    whole = build_batch([[document(128)], [document(128)]], 128, pad=1)
    assert task.batch_flops(whole) == 256 * task.flops_per_token()
    halves = build_batch([[document(64), document(64)]] * 2, 128, pad=1)
    assert task.batch_flops(halves) == 256 * (task.flops_per_token() - 12 * 2 * 64 * 64)


def test_operations_of_the_network_are_counted_once(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[TransformerConfig] = []
    monkeypatch.setattr(
        "mixmodal.training.pretrain.count_operations", lambda config: calls.append(config) or Operations(1.0, 0.0)
    )
    task = PretrainTask(tiny_config(shapes, max_steps=1))
    assert [task.batch_flops(build_batch([[document(3)]], 128, pad=1)) for _ in range(3)] == [3.0] * 3
    assert len(calls) == 1


def test_the_mfu_counts_what_the_batches_since_the_last_line_need(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("mixmodal.training.trainer.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    fit(peak_flops=1e3, log_every=2, max_steps=3, micro_batch_size=2, grad_accum_steps=2)
    first, last = records(tmp_path / "run")
    needed = [sum(range(8)), sum(range(8, 12))]  # of rows 0 to 7, and 8 to 11
    seconds = [first["wall_time_s"], last["wall_time_s"] - first["wall_time_s"]]
    assert [first["mfu"], last["mfu"]] == [n / s / 1e3 for n, s in zip(needed, seconds, strict=True)]
    assert [first["tokens_per_second"], last["tokens_per_second"]] == [8 / seconds[0], 4 / seconds[1]]


def test_a_batch_needs_by_default_what_its_tokens_do_and_unknown_operations_give_no_mfu(
    fit: Fit, tmp_path: Path
) -> None:
    class Known(ToyTask):
        batch_flops = Task.batch_flops

        def flops_per_token(self) -> float:
            return 100.0

    class Unknown(ToyTask):
        batch_flops = Task.batch_flops

    fit(task=Known(), max_steps=1, peak_flops=1e9)
    fit("unknown", task=Unknown(), max_steps=1, peak_flops=1e9)
    line = records(tmp_path / "run")[0]
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 100.0 / 1e9, rel=1e-12)
    assert records(tmp_path / "unknown")[0]["mfu"] is None
