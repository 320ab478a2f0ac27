"""Pretraining end to end on captioned shapes: it learns, splits exactly, and refuses data that does not fit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_shapes

from mixmodal.data.mixture import StageConfig
from mixmodal.data.source import SourceConfig
from mixmodal.interop.export import load_transformer
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.objectives.loss import target_weights
from mixmodal.training.base_model import fit_to_data
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, mean_norm, pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder with token shards of 40 documents to train on and 11 others held out."""
    write_shapes(tmp_path / "tokens", 40)
    write_shapes(tmp_path / "held_out", 11, seed=1)
    return tmp_path


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]


def with_held_out(config: PretrainConfig, root: Path, **trainer: Any) -> PretrainConfig:
    data = replace(config.data, held_out_tokens=root / "held_out")
    return replace(config, data=data, trainer=replace(config.trainer, **trainer))


def test_evaluations_need_something_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_every can not act without data\.held_out_tokens"):
        tiny_config(tmp_path, max_steps=3, eval_every=2)


def test_a_few_documents_are_learnt(tmp_path: Path) -> None:
    shards = write_shapes(tmp_path / "tokens", 8)
    config = tiny_config(tmp_path, max_steps=90, log_every=15)
    data = replace(config.data, image_first_share=0.0, caption_dropout=0.0)
    pretrain(replace(config, data=data, objective=CausalMaskedConfig(min_masks=0, max_masks=0, poisson_rate=0.0)))
    lines = [line for line in records(tmp_path) if "loss" in line]
    assert lines[0]["loss"] < 0.8 * math.log(shards.vocabulary.size)
    assert lines[-1]["loss"] < 0.5  # nats a token; the uniform loss is 5.8; seen: 0.25
    assert lines[-1]["loss_image"] < 0.5  # seen: 0.29


def test_a_run_writes_metrics_and_a_network_that_loads(shapes: Path) -> None:
    result = pretrain(with_held_out(tiny_config(shapes, max_steps=3, peak_flops=1e12), shapes, eval_every=2))
    *_, trained, evaluated = records(shapes)
    assert {"step", "wall_time_s", "loss", "z_loss", "loss_text", "loss_image", "loss_control"} <= set(trained)
    assert {"tokens_per_second", "mfu", "grad_norm", "lr", "logit_norm", "output_norm"} <= set(trained)
    assert evaluated["eval_loss"] == result.metrics["loss"]
    assert [line["step"] for line in records(shapes) if "eval_loss" in line] == [2, 3]
    assert isinstance(load_transformer(shapes / "run/export"), Transformer)


def test_evaluation_counts_each_held_out_token_once(shapes: Path) -> None:
    config = with_held_out(tiny_config(shapes, max_steps=1), shapes)
    one, few = PretrainTask(config), PretrainTask(replace(config, trainer=replace(config.trainer, micro_batch_size=1)))
    torch.manual_seed(0)
    model = one.build_model().eval()
    for task in (one, few):
        task.build_loader(1, 1, 0, 1)
    with torch.no_grad():
        assert few.evaluate(model) == pytest.approx(one.evaluate(model), rel=1e-6)  # worst seen: 8e-8


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("float32", None),
        ("bfloat16", None),
        ("float32", 3),
        pytest.param("autocast_bfloat16", None, marks=pytest.mark.slow),
        pytest.param("autocast_bfloat16", 3, marks=pytest.mark.slow),
        pytest.param("bfloat16", 3, marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(shapes: Path, precision: str, stage: int | None) -> None:
    zero_file = ROOT / f"configs/deepspeed/zero{stage}.json" if stage else None
    options: dict[str, Any] = {"deepspeed": zero_file, "precision": precision, "save_every": 2, "keep_checkpoints": 9}
    config = tiny_config(shapes, max_steps=4, **options)
    config = replace(config, model=replace(config.model, dropout=0.1))
    pretrain(config)
    whole = load_transformer(shapes / "run/export").state_dict()
    lines = records(shapes)
    (shapes / "run/checkpoints/latest").write_text("step_00000002\n")
    pretrain(config)
    resumed = load_transformer(shapes / "run/export").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [line["loss"] for line in records(shapes)] == [line["loss"] for line in lines]


def test_splitting_a_step_changes_nothing(shapes: Path) -> None:
    whole = tiny_config(shapes, max_steps=3)
    split = tiny_config(shapes, max_steps=3, micro_batch_size=1, grad_accum_steps=4)
    split = replace(split, trainer=replace(split.trainer, run_dir=shapes / "split/run"))
    pretrain(whole)
    pretrain(split)
    for name in ("loss", "loss_text", "loss_image", "z_loss", "grad_norm"):
        expected = [line[name] for line in records(shapes)]
        found = [line[name] for line in records(shapes / "split")]
        assert found == pytest.approx(expected, rel=1e-6), name  # worst seen: 1e-7


def test_a_mixture_in_stages_ends_with_a_source_and_resumes_exactly(shapes: Path) -> None:
    write_shapes(shapes / "more", 30, seed=2)
    config = with_held_out(tiny_config(shapes, max_steps=40, save_every=2, keep_checkpoints=99), shapes)
    sources = {"old": SourceConfig(tokens=shapes / "tokens"), "new": SourceConfig(tokens=shapes / "more", weight=0)}
    sources["old"] = replace(sources["old"], when_done="stop")
    stages = (StageConfig(from_step=1, weights={"new": 2}),)
    config = replace(config, data=replace(config.data, tokens=None, sources=sources, stages=stages))
    result = pretrain(config)
    assert result.finished
    lines = [line for line in records(shapes) if "loss" in line]
    assert lines[-1]["step"] == result.steps == 9
    assert lines[0]["documents/new"] == 0 < lines[1]["documents/new"]
    assert 0.9 < lines[-1]["epochs/old"] <= 1
    trained = {name: lines[-1][f"tokens/{name}"] - lines[0][f"tokens/{name}"] for name in sources}
    assert trained["new"] / trained["old"] == pytest.approx(2, abs=0.25)  # seen: 1.83; a document more is 0.1
    (shapes / "run/checkpoints/latest").write_text("step_00000002\n")
    pretrain(config)
    skipped = ("wall_time_s", "tokens_per_second")
    again = [line for line in records(shapes) if "loss" in line]
    for line, other in zip(lines, again, strict=True):
        assert {key: line[key] for key in line if key not in skipped} == {
            key: other[key] for key in other if key not in skipped
        }


def test_a_stage_that_never_begins_is_refused(shapes: Path) -> None:
    config = tiny_config(shapes, max_steps=5)
    sources = {"old": SourceConfig(tokens=shapes / "tokens")}
    stages = (StageConfig(from_step=5, weights={"old": 2}),)
    with pytest.raises(ValueError, match=r"data\.stages: from_step 5 is not below trainer\.max_steps 5"):
        PretrainTask(replace(config, data=replace(config.data, tokens=None, sources=sources, stages=stages)))


def test_the_loss_is_the_mean_with_the_weights_of_the_modalities(shapes: Path) -> None:
    config = tiny_config(shapes, max_steps=1)
    batch = next(PretrainTask(config).build_loader(4, 1, 0, 1))
    pretrain(config)
    (plain,) = records(shapes)
    factors = {"text": 0.0, "image": 3.0}
    weighed = replace(config, trainer=replace(config.trainer, run_dir=shapes / "weighed/run"), modality_weights=factors)
    pretrain(weighed)
    (found,) = records(shapes / "weighed")
    assert found["loss_text"] is None  # nothing counts
    for name in ("loss_image", "loss_control"):
        assert found[name] == pytest.approx(plain[name], rel=1e-6)  # worst seen: 4e-8
    vocabulary = PretrainTask(config).vocabulary
    predicted = target_weights(batch.segment_ids, batch.loss_weights)
    image = (predicted * vocabulary.contains("image", batch.tokens)).sum().item()
    control = (predicted * ~vocabulary.is_content(batch.tokens)).sum().item()
    mean = (3 * image * plain["loss_image"] + control * plain["loss_control"]) / (3 * image + control)
    assert found["loss"] == pytest.approx(mean, rel=1e-6)  # worst seen: 1.1e-7
    assert PretrainTask(weighed).batch_weight(batch).item() == pytest.approx(3 * image + control)
    with pytest.raises(ValueError, match=r"modality_weights\.audio"):
        PretrainTask(replace(config, modality_weights={"audio": 1.0}))


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_matrix_that_is_spread_over_ranks_learns_alike(shapes: Path, tied: bool) -> None:
    zero3, whole = ROOT / "configs/deepspeed/zero3.json", None
    curves = []
    for zero_file in (zero3, whole):
        config = tiny_config(shapes, max_steps=3, deepspeed=zero_file, run_dir=shapes / f"run_{zero_file is None}/run")
        pretrain(with_held_out(replace(config, model=replace(config.model, tie_embeddings=tied)), shapes))
        curves.append([line.get("loss") or line["eval_loss"] for line in records(config.trainer.run_dir.parent)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)  # worst seen: 0


@pytest.mark.parametrize(
    ("attention", "stage", "message"),
    [("documents", None, "attention documents does not give"), ("auto", 3, "ZeRO stage 3 does not keep")],
)
def test_what_can_not_be_compiled_is_named(shapes: Path, attention: Any, stage: int | None, message: str) -> None:
    zero_file = ROOT / f"configs/deepspeed/zero{stage}.json" if stage else None
    config = tiny_config(shapes, max_steps=1, compile=True, deepspeed=zero_file)
    with pytest.raises(ValueError, match=f"trainer.compile needs .*{message}"):
        pretrain(replace(config, attention=attention))


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_blocks_give_the_same_losses(shapes: Path) -> None:
    curves = []
    for compiled in (False, True):
        pretrain(tiny_config(shapes, max_steps=4, compile=compiled, run_dir=shapes / f"{compiled}/run"))
        curves.append([line["loss"] for line in records(shapes / str(compiled)) if "loss" in line])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)  # worst seen 6e-8


def test_attention_is_the_config_s_choice(shapes: Path) -> None:
    model = PretrainTask(replace(tiny_config(shapes, max_steps=1), attention="dense")).build_model()
    assert isinstance(model, Transformer)
    assert model.attention_kind == "dense"


def test_held_out_shards_of_other_tokenizers_are_refused(shapes: Path) -> None:
    write_shapes(shapes / "other/held_out", 5, text_sha256="x" * 64)
    with pytest.raises(ValueError, match=r"other/held_out/manifest\.json: text_tokenizer_sha256"):
        PretrainTask(with_held_out(tiny_config(shapes, max_steps=1), shapes / "other"))


def test_held_out_shards_of_another_format_are_refused(shapes: Path) -> None:
    path = shapes / "held_out/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sequence_format"]["grids"]["image"] = [2, 8]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"held_out/manifest\.json: sequence_format is .*\[2, 8\].*, not .*\[4, 4\]"):
        PretrainTask(with_held_out(tiny_config(shapes, max_steps=1), shapes))


def test_tokenizers_come_in_pairs(shapes: Path) -> None:
    with pytest.raises(ValueError, match="give both"):
        PretrainTask(replace(tiny_config(shapes, max_steps=1), text_tokenizer=Path("t.model")))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [({"vocab_size": 10}, r"model\.vocab_size is 10"), ({"max_seq_len": 64}, r"model\.max_seq_len is 64")],
)
def test_a_model_too_small_for_the_data_is_refused(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fit_to_data(TransformerConfig(**sizes), vocab_size=11, seq_len=128)


def test_the_vocabulary_comes_from_the_data() -> None:
    assert fit_to_data(TransformerConfig(), vocab_size=11, seq_len=128).vocab_size == 11
    assert fit_to_data(TransformerConfig(vocab_size=64), vocab_size=11, seq_len=128).vocab_size == 64


def test_norms_leave_padding_out() -> None:
    vectors = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [100.0, 0.0]]])
    sums = mean_norm(vectors, torch.tensor([[1, 2, 0]]))
    assert (sums.total.item(), sums.count.item()) == (15.0, 2.0)


def test_a_card_that_nobody_writes_is_refused(shapes: Path) -> None:
    with pytest.raises(ValueError, match="card: a model card is written with both tokenizers only"):
        PretrainTask(replace(tiny_config(shapes, max_steps=1), card={"title": "shapes"}))
