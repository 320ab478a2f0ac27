"""Evaluation while training: units that other models have, and sample sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapes import tiny_config, write_shapes

from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize
from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.export import load_transformer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain
from mixmodal.training.sample_sheet import SampleSheet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, tokenizers: Path, write_shape_shards: Callable[..., None]) -> PretrainConfig:
    """A tiny training with tokenizers, on 12 pairs, with 9 others held out."""
    files = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    for name, count, seed in (("tokens", 12, 0), ("held_out", 9, 1)):
        write_shape_shards(tmp_path / f"{name}_shards", count, 16, seed)
        pretokenize(PretokenizeConfig(shards=(tmp_path / f"{name}_shards",), out=tmp_path / name, **files))
    found = tiny_config(tmp_path, max_steps=4)
    data, trainer = replace(found.data, held_out_tokens=tmp_path / "held_out"), replace(found.trainer, eval_every=1)
    return replace(found, **files, data=data, trainer=trainer)


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]


def uniform(task: PretrainTask) -> torch.nn.Module:
    """A network of equal probabilities."""
    network = task.build_model().eval()
    torch.nn.init.zeros_(network.output.weight)  # type: ignore[union-attr]
    task.build_loader(1, 1, 0, 1)
    return network


@torch.no_grad()
def test_equal_probabilities_cost_the_log_of_the_vocabulary_a_piece(config: PretrainConfig) -> None:
    task = PretrainTask(config)
    found = task.evaluate(uniform(task))
    each = math.log(task.vocabulary.size)
    assert found["nats_per_image_code"] == pytest.approx(each, rel=1e-6)  # worst seen: 1.5e-7
    held_out, tokenizer = (
        TokenShards.open(config.data.held_out_tokens or ""),
        TextTokenizer.load(config.text_tokenizer or ""),
    )
    pieces = num_bytes = 0
    for index in range(len(held_out)):
        (text,) = [run.ids for run in held_out.build_format().split(held_out[index]) if run.modality == "text"]
        pieces += len(text)
        num_bytes += len(tokenizer.decode(task.vocabulary.from_ids("text", text)).encode())
    assert num_bytes > pieces
    expected = pieces * each / math.log(2) / num_bytes
    assert found["bits_per_text_byte"] == pytest.approx(expected, rel=1e-6)  # worst seen: 8e-8


@torch.no_grad()
def test_documents_that_are_too_long_count_neither_bits_nor_bytes(config: PretrainConfig) -> None:
    whole, short = PretrainTask(config), PretrainTask(replace(config, data=replace(config.data, seq_len=40)))
    held_out = TokenShards.open(config.data.held_out_tokens or "")
    assert any(len(held_out[index]) > 40 for index in range(len(held_out)))
    per_code = {task.evaluate(uniform(task))["nats_per_image_code"] for task in (whole, short)}
    assert len({round(value or 0, 4) for value in per_code}) == 1
    task, ids = short, [held_out[index] for index in range(len(held_out)) if len(held_out[index]) <= 40]
    text = np.concatenate([one[np.asarray(task.vocabulary.contains("text", one))] for one in ids])
    pieces = TextTokenizer.load(config.text_tokenizer or "").piece_bytes
    num_bytes = sum(pieces[piece] for piece in task.vocabulary.from_ids("text", text))
    expected = len(text) * math.log2(task.vocabulary.size) / num_bytes
    assert task.evaluate(uniform(task))["bits_per_text_byte"] == pytest.approx(expected, rel=1e-6)


def test_without_a_text_tokenizer_there_are_no_bits_per_byte(tmp_path: Path) -> None:
    write_shapes(tmp_path / "tokens", 8)
    config = tiny_config(tmp_path, max_steps=1)
    task = PretrainTask(replace(config, data=replace(config.data, held_out_tokens=tmp_path / "tokens")))
    assert "bits_per_text_byte" not in task.evaluate(uniform(task))


def test_sheets_come_every_so_many_evaluations_and_do_not_disturb_training(
    config: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(config, model=replace(config.model, dropout=0.1))
    pretrain(config)
    trainer = replace(config.trainer, run_dir=tmp_path / "drawn/run", tensorboard=True)
    pretrain(replace(config, trainer=trainer, sample_every=3, num_samples=2))
    assert [line.get("loss") for line in records(tmp_path / "drawn")] == [
        line.get("loss") for line in records(tmp_path)
    ]
    plain, drawn = (load_transformer(root / "run/export").state_dict() for root in (tmp_path, tmp_path / "drawn"))
    assert all(torch.equal(drawn[name], value) for name, value in plain.items())
    assert {"eval_nats_per_image_code", "eval_bits_per_text_byte"} <= set(records(tmp_path)[-1])
    assert pictures(trainer.run_dir) == [3, 4]  # the third evaluation, and the end


def pictures(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [event.step for event in events.Images("samples")]


def test_a_sheet_shows_each_caption_once_and_depends_on_the_weights_alone(
    config: PretrainConfig, tokenizers: Path
) -> None:
    held_out = TokenShards.open(config.data.held_out_tokens or "")
    files = tokenizers / "text.model", tokenizers / "image"
    sheet = SampleSheet(held_out, *files, count=4, max_len=128)
    captions = [pair.text.text for pair in sheet.pairs]
    assert len(set(captions)) == 4
    torch.manual_seed(0)
    network = PretrainTask(config).build_model().eval()
    first = sheet.draw(network)
    assert first.tobytes() == SampleSheet(held_out, *files, count=4, max_len=128).draw(network).tobytes()
    torch.nn.init.normal_(network.output.weight)  # type: ignore[union-attr]
    assert sheet.draw(network).tobytes() != first.tobytes()
    with pytest.raises(ValueError, match=r"num_samples is 99, but .*held_out holds \d pairs"):
        SampleSheet(held_out, *files, count=99, max_len=128)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"sample_every": 1},
            r"can not act without text_tokenizer, image_tokenizer, data\.held_out_tokens, trainer\.t",
        ),
        ({"num_samples": 3}, "num_samples can not act where sample_every is 0"),
        ({"sample_every": -1}, "sample_every is -1"),
    ],
)
def test_sheets_that_can_not_be_drawn_are_refused(tmp_path: Path, options: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(tiny_config(tmp_path, max_steps=1), **options)  # type: ignore[arg-type]


def test_sheets_need_whole_weights(config: PretrainConfig) -> None:
    trainer = replace(config.trainer, tensorboard=True, deepspeed=ROOT / "configs/deepspeed/zero3.json")
    with pytest.raises(ValueError, match="ZeRO stage 3 does not keep: set it to 0"):
        pretrain(replace(config, trainer=trainer, sample_every=1, num_samples=2))
