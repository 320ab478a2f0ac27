"""Training a two-tower encoder: a run that learns, resumes exactly and exports what it trained."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoder_run import build_config
from test_launcher import HERE, ROOT, environment, free_port

from mixmodal.data.augment import AugmentConfig
from mixmodal.data.pairs import PairBatch
from mixmodal.data.shards import Sample, read_samples, write_shards
from mixmodal.data.skipping import TooManySkipped
from mixmodal.training import contrastive
from mixmodal.training.contrastive import EncoderTask, train_encoder
from mixmodal.training.trainer import TrainerConfig

WriteShards = Callable[..., None]
KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])


@pytest.fixture(scope="module")
def shards(write_splits: Callable[[int, int], Path]) -> Path:
    return write_splits(400, 100)


def curve(run: Path, *names: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line for name in names]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "export" / "model.safetensors")


@KINDS
def test_a_run_logs_its_health_and_leaves_a_folder_of_transformers(folder: Path, kind: str) -> None:
    from transformers import AutoModel, AutoProcessor

    config = build_config(folder, kind, max_steps=2)
    result = train_encoder(config)
    temperature = {"clip": 0.07, "siglip": 0.1}[kind]
    assert curve(folder / "run", "temperature")[0] == pytest.approx(temperature, rel=1e-5)
    if kind == "siglip":
        assert curve(folder / "run", "logit_bias")[0] == pytest.approx(-10)
    scores = {f"recall{k}_{way}" for k in (1, 5) for way in ("text_to_image", "image_to_text")}
    assert set(result.metrics) == scores | {"chance1", "chance5"}
    assert result.metrics["chance1"] >= 0.01
    export = folder / "run" / "export"
    assert f"| chance1 | {result.metrics['chance1']:.4f} |" in (export / "README.md").read_text()
    model, processor = (auto.from_pretrained(export) for auto in (AutoModel, AutoProcessor))
    (sample,) = [next(iter(read_samples(folder / "held_out")))]
    padding = True if kind == "clip" else "max_length"
    picture = sample.pictures[0].open(1000)
    inputs = processor(text=sample.texts, images=[picture], padding=padding, return_tensors="pt")
    assert model(**inputs).logits_per_text.shape == (1, 1)


@KINDS
def test_a_resumed_run_ends_like_one_without_a_break(folder: Path, kind: str) -> None:
    config = replace(build_config(folder, kind, save_every=2), augment=AugmentConfig(flip_share=0.5))
    train_encoder(config)
    run = folder / "run"
    whole = (run / "export" / "model.safetensors").read_bytes()
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    (run / "export" / "model.safetensors").unlink()
    train_encoder(config)
    assert (run / "export" / "model.safetensors").read_bytes() == whole


def test_a_run_whose_pointer_is_lost_keeps_its_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(folder, save_every=2)
    train_encoder(config)
    (folder / "run" / "checkpoints" / "latest").unlink()
    monkeypatch.setattr(contrastive, "train_caption_tokenizer", None)
    assert train_encoder(config).finished


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_train_alike_and_resume_exactly(folder: Path, stage: int) -> None:
    train_encoder(build_config(folder, run_dir=folder / "zero0"))
    zero = ROOT / f"configs/deepspeed/zero{stage}.json"
    config = build_config(folder, save_every=2, deepspeed=zero)
    train_encoder(config)
    # worst seen: 6e-8
    assert curve(folder / "run", "loss", "grad_norm") == pytest.approx(
        curve(folder / "zero0", "loss", "grad_norm"), rel=1e-5
    )
    whole = weights(folder / "run")
    (folder / "run" / "checkpoints" / "latest").write_text("step_00000002\n")
    train_encoder(config)
    assert all(torch.equal(weights(folder / "run")[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_pairs_together(folder: Path) -> None:
    runs = []
    for kind in ("clip", "siglip"):
        train_encoder(build_config(folder, kind, run_dir=folder / f"one_{kind}"))
        runs.append({"kind": kind, "run_dir": str(folder / f"two_{kind}"), "micro_batch_size": 4})
    zero = str(ROOT / "configs/deepspeed/zero2.json")
    runs.append({"kind": "clip", "run_dir": str(folder / "zero2_clip"), "micro_batch_size": 4, "deepspeed": zero})
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(HERE / "encoder_run.py"), str(folder), json.dumps(runs)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for run, one in (("two_clip", "one_clip"), ("two_siglip", "one_siglip"), ("zero2_clip", "one_clip")):
        names = ("loss", "grad_norm", "temperature")
        assert curve(folder / run, *names) == pytest.approx(curve(folder / one, *names), rel=1e-5), (
            run
        )  # worst seen: 7e-7


@pytest.mark.slow
@KINDS
def test_an_encoder_learns_to_find_held_out_shapes(folder: Path, kind: str) -> None:
    config = build_config(folder, kind, max_steps=300, micro_batch_size=64, log_every=50)
    scores = train_encoder(replace(config, optimizer=replace(config.optimizer, lr=2e-3))).metrics
    print(scores)
    for way in ("text_to_image", "image_to_text"):
        assert scores[f"recall1_{way}"] > 10 * scores["chance1"]
        assert scores[f"recall5_{way}"] > 5 * scores["chance5"]


def build_batch(task: EncoderTask, count: int) -> PairBatch:
    return next(task.build_loader(count, 1, 0, 1))


def test_micro_batches_are_sets_of_negatives_of_their_own(folder: Path) -> None:
    """Accumulation adds losses of batches: neither of them has the negatives of the other."""
    task = EncoderTask(build_config(folder))
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), build_batch(task, 8)
    halves = [PairBatch(*(entry[part] for entry in batch)) for part in (slice(0, 4), slice(4, 8))]
    whole, *parts = (task.losses(model, part, 0) for part in (batch, *halves))
    assert float(whole.weight) == sum(float(part.weight) for part in parts) == 8
    # log 8 of chance against log 4
    assert float(whole.objective.detach()) > sum(float(part.objective.detach()) for part in parts) + 2


@pytest.mark.parametrize("mask", [True, False])
def test_pairs_of_one_caption_are_negatives_only_if_asked(folder: Path, mask: bool) -> None:
    task = EncoderTask(replace(build_config(folder), mask_same_captions=mask))
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), build_batch(task, 4)
    twice = PairBatch(*(entry[[0, 0]] if isinstance(entry, torch.Tensor) else entry[:1] * 2 for entry in batch))
    loss = float(task.losses(model, twice, 0).objective.detach())
    assert loss == pytest.approx(0.0 if mask else 2 * torch.tensor(2.0).log().item(), abs=1e-5)


def test_pictures_are_augmented_as_the_config_says(folder: Path) -> None:
    task = EncoderTask(replace(build_config(folder), augment=AugmentConfig(flip_share=1.0)))
    model, batch = task.build_model().eval(), build_batch(task, 4)
    seen = []
    model.encoder.vision_model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["pixel_values"]), with_kwargs=True
    )
    task.losses(model, batch, 0)
    assert torch.equal(seen[0], (batch.pixels.float() / 127.5 - 1).flip(-1))


def test_training_without_held_out_pairs_evaluates_nothing(folder: Path) -> None:
    config = build_config(folder, max_steps=1)
    result = train_encoder(replace(config, data=replace(config.data, held_out=())))
    assert result.metrics == {}


def test_shards_without_captions_end_the_job_before_it_begins(folder: Path, tmp_path: Path) -> None:
    samples = [Sample(sample.key, tuple(sample.pictures)) for sample in read_samples(folder / "held_out")]
    write_shards(samples, tmp_path / "silent")
    config = build_config(folder)
    with pytest.raises(TooManySkipped, match=r"100 of 100 samples are bad .100 no pair"):
        train_encoder(replace(config, data=replace(config.data, train=(tmp_path / "silent",))))
    assert not (folder / "run" / "checkpoints").exists()


def test_a_run_does_not_go_on_with_another_size_of_vocabulary(folder: Path) -> None:
    config = build_config(folder, max_steps=1)
    train_encoder(config)
    more = replace(config, trainer=replace(config.trainer, max_steps=2), model=replace(config.model, vocab_size=400))
    with pytest.raises(ValueError, match="vocab_size is 400, but the checkpoint was written with 320"):
        train_encoder(more)


def test_options_that_can_not_act_are_refused(folder: Path) -> None:
    config = build_config(folder)
    with pytest.raises(ValueError, match=r"trainer\.peak_flops can not act"):
        replace(config, trainer=replace(config.trainer, peak_flops=1e12))
    zero3 = ROOT / "configs/deepspeed/zero3.json"
    with pytest.raises(ValueError, match="encoders train at ZeRO stages 0, 1 and 2"):
        train_encoder(build_config(folder, deepspeed=zero3))
    with pytest.raises(ValueError, match=r"trainer\.micro_batch_size is 1"):
        train_encoder(build_config(folder, micro_batch_size=1))
    with pytest.raises(ValueError, match=r"trainer\.compile can not act"):
        train_encoder(build_config(folder, compile=True))
    assert isinstance(config.trainer, TrainerConfig)


def test_blocks_that_are_computed_again_change_nothing(folder: Path) -> None:
    train_encoder(build_config(folder, max_steps=2))
    train_encoder(build_config(folder, max_steps=2, run_dir=folder / "again", activation_checkpointing=True))
    assert curve(folder / "again", "loss") == curve(folder / "run", "loss")


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("precision", ["autocast_bfloat16", "bfloat16"])
def test_sixteen_bits_train_and_leave_features_of_length_one(folder: Path, kind: str, precision: str) -> None:
    from transformers import AutoModel

    train_encoder(build_config(folder, kind, max_steps=2))
    run = folder / "sixteen"
    train_encoder(build_config(folder, kind, max_steps=2, run_dir=run, precision=precision, ema_decay=0.5))
    assert curve(run, "loss") == pytest.approx(curve(folder / "run", "loss"), rel=0.1)  # worst seen: 0.04
    model = AutoModel.from_pretrained(run / "export")
    tokens, pixels = torch.ones(1, 12, dtype=torch.int64), torch.zeros(1, 3, 16, 16)
    features = model(input_ids=tokens, pixel_values=pixels)
    assert float(features.text_embeds.detach().float().norm()) == pytest.approx(1, abs=0.02)  # worst seen: 0.003


@pytest.mark.parametrize(("kind", "expected"), [("clip", 0.01), ("siglip", math.exp(-6))])
def test_the_temperature_of_clip_has_a_least_value_in_training_and_export(
    folder: Path, kind: str, expected: float
) -> None:
    task = EncoderTask(build_config(folder, kind))
    model, batch = task.build_model().eval(), build_batch(task, 4)
    with torch.no_grad():
        model.encoder.logit_scale.fill_(6.0)
        total, count = task.losses(model, batch, 0).metrics["temperature"]
        task.export(model, folder / "run" / "export")
    assert float(total / count) == pytest.approx(expected, rel=1e-5)
    assert float(weights(folder / "run")["logit_scale"]) == pytest.approx(-math.log(expected), rel=1e-5)
