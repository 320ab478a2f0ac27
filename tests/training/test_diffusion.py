"""Training a denoiser: a run that learns, resumes exactly and exports what it trained."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from denoiser_run import TEXT, build_config
from test_launcher import ROOT

from mixmodal.classification.denoiser import load_denoiser
from mixmodal.data.augment import AugmentConfig
from mixmodal.data.denoising import DenoisingBatch, DenoisingDataConfig
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import TooManySkipped
from mixmodal.data.synthetic import COLORS, all_scenes, draw
from mixmodal.models.denoiser import Denoiser, DenoiserConfig, build_scheduler, condition_inputs
from mixmodal.tokenization.conditions import ClassNames
from mixmodal.tokenization.text import train_text_tokenizer
from mixmodal.training.diffusion import DiffusionTask, DiffusionTrainingConfig, train_diffusion

TOLD = pytest.mark.parametrize("told", ["class", "text"])


def write(folder: Path, count: int, seed: int) -> None:
    """Single shapes; the label of each is its colour."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        scene = all_scenes(1)[int(rng.integers(30))]
        data = io.BytesIO()
        draw(scene, 16, rng).save(data, "png")
        parts = (scene.caption, PictureFile(data.getvalue(), "png", f"{number}.png"))
        samples.append(Sample(f"{number:04d}", parts, {"label": scene.first.color}))
    write_shards(samples, folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("denoising")
    write(folder / "train", 200, seed=0)
    write(folder / "held_out", 64, seed=1)
    train_text_tokenizer([scene.caption for scene in all_scenes(1)], folder / "text.model", 300)
    (folder / "classes.txt").write_text("".join(f"{color}\ta {color} shape\n" for color in COLORS))
    return folder


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def files(export: Path) -> dict[str, bytes]:
    return {str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()}


def build(folder: Path, told: str) -> tuple[DiffusionTask, Denoiser]:
    task = DiffusionTask(build_config(folder, told))
    torch.manual_seed(0)
    return task, task.build_model().eval()


def build_batch(task: DiffusionTask, count: int) -> DenoisingBatch:
    return next(task.build_loader(count, 1, 0, 1))


@TOLD
def test_a_run_leaves_a_folder_of_diffusers_without_pickles(folder: Path, told: str) -> None:
    config = build_config(folder, told, max_steps=2)
    result = train_diffusion(config)
    assert set(result.metrics) == {"loss", "loss_unconditional"}
    assert 0.5 < curve(folder / "run")[0] < 2  # noise is told from nothing at first
    found = set(files(folder / "run" / "export"))
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    text = {"text_tokenizer.model", "text_encoder.json", "text_encoder.safetensors"}
    assert found == unet | {"denoiser.json", "README.md"} | (text if told == "text" else {"classes.txt"})
    assert f"| loss | {result.metrics['loss']:.4f} |" in (folder / "run" / "export" / "README.md").read_text()


@TOLD
def test_what_is_exported_predicts_as_what_was_trained(folder: Path, told: str) -> None:
    task, model = build(folder, told)
    with torch.no_grad():
        task.export(model, folder / "export")
    loaded = load_denoiser(folder / "export")
    words = ["red", "a blue shape", ""] if told == "class" else ["a red circle", "a blue cross on nothing", ""]
    noisy, times = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    with torch.no_grad():
        wanted = model(noisy, times, task.conditions.encode(words))
        found = loaded.unet(noisy, times, **loaded.encode(words)).sample
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], loaded.unet(noisy, times, **loaded.encode(words[1:] + words[:1])).sample[0])
    assert torch.equal(loaded.scheduler.alphas_cumprod, task.scheduler.alphas_cumprod)
    assert (loaded.image_size, loaded.scheduler.config.prediction_type) == (16, "epsilon")
    assert [one.label for one in loaded.classes] == (list(COLORS) if told == "class" else [])


@TOLD
def test_a_resumed_run_ends_like_one_without_a_break(folder: Path, told: str) -> None:
    config = build_config(folder, told, {"dropout": 0.1}, save_every=2)
    config = replace(config, augment=AugmentConfig(flip_share=0.5), condition_dropout=0.5)
    train_diffusion(config)
    run = folder / "run"
    whole = files(run / "export")
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    (run / "export" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train_diffusion(config)
    assert files(run / "export") == whole


@pytest.mark.slow
@TOLD
def test_a_denoiser_learns_what_conditions_tell(folder: Path, told: str) -> None:
    options = {"max_steps": 150, "micro_batch_size": 32, "log_every": 50, "ema_decay": 0.98}
    scores = train_diffusion(build_config(folder, told, **options)).metrics
    print(scores, curve(folder / "run"))
    loss, untold = scores["loss"], scores["loss_unconditional"]
    assert loss is not None
    assert untold is not None
    assert loss < 0.14  # 0.123 to 0.126
    assert loss < 0.97 * untold


def test_losses_do_not_depend_on_how_rows_are_spread(folder: Path) -> None:
    """Noise and times belong to the picture, so that two ranks train as one."""
    task, model = build(folder, "text")
    whole = build_batch(task, 8)
    parts = [next(task.build_loader(4, 1, rank, 2)) for rank in (0, 1)]
    for name in ("noise", "times", "drops", "conditions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    together, *apart = (float(task.losses(model, batch, 0).objective.detach()) for batch in (whole, *parts))
    assert together == pytest.approx(sum(apart), rel=1e-5)  # worst seen: 2e-7
    assert whole.noise.std() == pytest.approx(1, abs=0.02)
    following = next(iter(task.build_loader(8, 1, 0, 1)))
    assert torch.equal(following.noise, whole.noise)


@TOLD
def test_dropped_conditions_say_nothing(folder: Path, told: str) -> None:
    task, model = build(folder, told)
    batch = build_batch(task, 8)
    nothing = batch._replace(conditions=task.conditions.encode([""] * 8))
    assert not torch.equal(batch.conditions, nothing.conditions)
    dropped = DiffusionTask(replace(task.config, condition_dropout=1.0))
    kept = DiffusionTask(replace(task.config, condition_dropout=0.0))
    found = [
        float(one.losses(model, given, 0).objective.detach()) for one, given in ((dropped, batch), (kept, nothing))
    ]
    assert found[0] == found[1]
    assert found[0] != float(kept.losses(model, batch, 0).objective.detach())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_schedule_says(folder: Path, prediction: str) -> None:
    """An oracle that is told noise and pictures has no loss."""
    task = DiffusionTask(build_config(folder, "class", {"prediction": prediction}))
    batch = build_batch(task, 4)
    images = batch.pixels.float() / 127.5 - 1
    alphas = task.scheduler.alphas_cumprod.double()[(batch.times * 1000).long()].view(-1, 1, 1, 1)
    scale, spread = alphas.sqrt(), (1 - alphas).sqrt()

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, times: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
            assert torch.allclose(noisy.double(), scale * images + spread * batch.noise, atol=1e-5)
            assert torch.equal(times, (batch.times * 1000).long())
            velocity = scale * batch.noise - spread * images
            return (batch.noise if prediction == "epsilon" else velocity).float()

    loss = float(task.losses(Oracle(), batch, 0).objective)
    assert loss == pytest.approx(0, abs=1e-9)  # worst seen: 1e-14


def test_the_padding_of_a_text_is_not_seen(folder: Path) -> None:
    task, model = build(folder, "text")
    tokens = task.conditions.encode(["a red circle"])
    length = int((tokens != 0).sum())
    noisy, times = torch.randn(1, 3, 16, 16), torch.tensor([300])
    with torch.no_grad():
        padded, short = model(noisy, times, tokens), model(noisy, times, tokens[:, :length])
        other = condition_inputs(tokens, model.text_encoder)
        other["encoder_hidden_states"][:, length:] = 7
        changed = model.unet(noisy, times, **other).sample
    assert torch.allclose(padded, short, atol=1e-5)  # worst seen: 2e-7
    assert torch.allclose(padded, changed, atol=1e-5)


def test_blocks_that_are_computed_again_change_nothing(folder: Path) -> None:
    train_diffusion(build_config(folder, "text", max_steps=2))
    train_diffusion(build_config(folder, "text", max_steps=2, run_dir=folder / "again", activation_checkpointing=True))
    assert curve(folder / "again") == curve(folder / "run")


@pytest.mark.slow
@TOLD
@pytest.mark.parametrize("precision", ["autocast_bfloat16", "bfloat16"])
def test_sixteen_bits_train(folder: Path, told: str, precision: str) -> None:
    train_diffusion(build_config(folder, told))
    train_diffusion(build_config(folder, told, run_dir=folder / "sixteen", precision=precision, ema_decay=0.5))
    assert curve(folder / "sixteen") == pytest.approx(curve(folder / "run"), rel=0.02)  # worst: 2e-3
    load_denoiser(folder / "sixteen" / "export")


@pytest.mark.slow
@TOLD
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_train_alike_and_resume_exactly(folder: Path, told: str, stage: int) -> None:
    train_diffusion(build_config(folder, told, run_dir=folder / "zero0"))
    config = build_config(folder, told, save_every=2, deepspeed=ROOT / f"configs/deepspeed/zero{stage}.json")
    train_diffusion(config)
    run = folder / "run"
    assert curve(run) == pytest.approx(curve(folder / "zero0"), rel=1e-5)
    whole = files(run / "export")
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    train_diffusion(config)
    assert files(run / "export") == whole


def test_pictures_without_a_class_end_the_job(folder: Path) -> None:
    (folder / "few.txt").write_text("red\nblue\n")
    config = build_config(folder, "class")
    few = replace(config, data=replace(config.data, classes=folder / "few.txt"))
    with pytest.raises(TooManySkipped, match="no class"):
        train_diffusion(few)


def test_classes_are_found_by_caption_where_there_is_no_label(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mixmodal.data.shards import read_samples

    plain = [Sample(one.key, one.parts) for one in read_samples(folder / "held_out")]
    write_shards(plain, folder / "plain")
    captions = [scene.caption for scene in all_scenes(1)]
    (folder / "captions.txt").write_text("".join(f"{number}\t{text}\n" for number, text in enumerate(captions)))
    config = build_config(folder, "class")
    data = replace(config.data, train=(folder / "plain",), held_out=(), classes=folder / "captions.txt")
    with caplog.at_level(logging.WARNING):
        batch = build_batch(DiffusionTask(replace(config, data=data)), 8)
    by_key = {f"{one.source}.png": captions.index(one.texts[0]) for one in read_samples(folder / "plain")}
    assert batch.conditions.tolist() == [by_key[key] for key in batch.keys]


def test_a_run_does_not_go_on_with_other_classes(folder: Path) -> None:
    config = build_config(folder, "class", max_steps=1)
    train_diffusion(config)
    (folder / "other.txt").write_text("".join(f"{color}\n" for color in reversed(COLORS)))
    trainer = replace(config.trainer, max_steps=2)
    with pytest.raises(ValueError, match=r"classes_sha256 is .* but the checkpoint was written with"):
        train_diffusion(replace(config, trainer=trainer, data=replace(config.data, classes=folder / "other.txt")))


def test_options_that_can_not_act_are_refused(folder: Path) -> None:
    config = build_config(folder, "class")
    with pytest.raises(ValueError, match=r"model\.text can not act where data\.classes"):
        replace(config, model=replace(config.model, text=TEXT))
    with pytest.raises(ValueError, match=r"condition_dropout is 2; it must lie in 0 \.\. 1"):
        replace(config, condition_dropout=2)
    with pytest.raises(ValueError, match=r"trainer\.peak_flops can not act"):
        replace(config, trainer=replace(config.trainer, peak_flops=1e12))
    with pytest.raises(ValueError, match=r"give either data\.classes.* or data\.text_tokenizer"):
        DenoisingDataConfig(train=(folder / "train",))
    with pytest.raises(ValueError, match=r"give either data\.classes.* or data\.text_tokenizer"):
        DenoisingDataConfig(train=(folder / "train",), classes=Path("a"), text_tokenizer=Path("b"))
    with pytest.raises(ValueError, match="denoisers train at ZeRO stages 0, 1 and 2"):
        train_diffusion(build_config(folder, "class", deepspeed=ROOT / "configs/deepspeed/zero3.json"))
    with pytest.raises(ValueError, match=r"missing\.txt"):
        train_diffusion(replace(config, data=replace(config.data, classes=folder / "missing.txt")))
    assert isinstance(config, DiffusionTrainingConfig)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 30}, r"model\.image_size is 30, which can not be halved 2 times.*multiple of 4"),
        ({"block_channels": ()}, r"model\.block_channels is empty"),
        (
            {"block_channels": (64, 100)},
            r"model\.block_channels has 100, which is not a multiple of model\.head_dim 32",
        ),
        ({"attention_levels": (3,)}, r"model\.attention_levels has 3; the levels are 0 \.\. 2"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
        ({"num_timesteps": 1, "norm_groups": 0}, r"model\.norm_groups is 0.*; model\.num_timesteps is 1"),
    ],
)
def test_shapes_that_can_not_be_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**given)  # type: ignore[arg-type]


def test_broken_folders_are_named(folder: Path) -> None:
    task, model = build(folder, "text")
    with pytest.raises(ValueError, match=r"denoiser\.json: there is no such file"):
        load_denoiser(folder / "nowhere")
    with torch.no_grad():
        task.export(model, folder / "export")
    with pytest.raises(ValueError, match="'green' is none of the 2 classes of the denoiser: red, blue"):
        ClassNames([["red"], ["blue"]]).encode(["red", "green"])
    (folder / "export" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="the U-Net or the scheduler can not be read"):
        load_denoiser(folder / "export")


def test_noise_grows_with_time() -> None:
    for schedule in ("linear", "squaredcos_cap_v2"):
        alphas = build_scheduler(DenoiserConfig(schedule=schedule)).alphas_cumprod
        assert (alphas.diff() < 0).all()
        assert alphas[0] > 0.999
        assert alphas[-1] < 1e-4
