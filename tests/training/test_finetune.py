"""Tuning on conversations is pretraining, with loss on their answers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, write_conversations, write_shapes
from torch import Tensor, nn

from mixmodal.cli import main
from mixmodal.config import load_config
from mixmodal.data.conversations import Message
from mixmodal.data.converters import read_conversations
from mixmodal.data.packing import Batch
from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize
from mixmodal.data.shards import Sample, read_samples, write_shards
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.export import load_export, load_transformer
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig, lr_at
from mixmodal.training.plan import PlanConfig, build_plan, load_training
from mixmodal.training.pretrain import PretrainConfig, PretrainTask, pretrain
from mixmodal.training.sample_sheet import SampleSheet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations, others held out, and a base model that has seen pairs in one step."""
    folder = tmp_path_factory.mktemp("finetune")
    write_shapes(folder / "tokens", 20)
    pretrain(tiny_config(folder, max_steps=1))
    write_conversations(folder / "talk", 300)
    write_conversations(folder / "held_out", 60, seed=1)
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Tunes on the conversations, in a run folder of its own."""

    def build(max_steps: int = 1, data: dict[str, Any] | None = None, **trainer: Any) -> FinetuneConfig:
        settings = {"micro_batch_size": 4, "log_every": 1, "tensorboard": False, "run_dir": tmp_path / "run"}
        return FinetuneConfig(
            init_from=root / "run/export",
            data=FinetuneDataConfig(**{"tokens": root / "talk", "seq_len": 64, **(data or {})}),
            optimizer=OptimizerConfig(lr=5e-3, warmup_steps=5),
            trainer=TrainerConfig(max_steps=max_steps, **{**settings, **trainer}),
        )

    return build


def records(config: PretrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


def answers(batch: Batch, end_of_turn: int) -> Tensor:
    """Which tokens stand behind the first end of turn of their document, bool `(B, T)`."""
    found = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, (ids, segments) in enumerate(zip(batch.tokens.tolist(), batch.segment_ids.tolist())):
        ended: set[int] = set()
        for place, (token, segment) in enumerate(zip(ids, segments)):
            found[row, place] = segment in ended
            if segment and token == end_of_turn:
                ended.add(segment)
    return found


class Recording(nn.Module):
    """Keeps the hidden states from which a network's logits are made."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, **options: Any) -> Any:
        found = self.network(*inputs, **options)
        self.hidden = found[1]
        return found


def test_held_out_questions_are_answered(config: Callable[..., FinetuneConfig], root: Path) -> None:
    tuned = config(80, {"held_out_tokens": root / "held_out"}, log_every=20, eval_every=20)
    finetune(tuned)
    first, *_, last = [line for line in records(tuned) if "eval_loss" in line]
    assert first["eval_loss_text"] > 1.0  # nats a byte of names of colours; seen: 2.3
    assert last["eval_loss_text"] < 0.3  # 0.45 without a look at the picture; seen: 0.18
    assert last["eval_loss_image"] < 0.3  # nats a code, 0.52 without a look at the text; seen: 0.07
    asked = PretrainTask(replace(tuned, data=replace(tuned.data, tokens=root / "held_out")))
    batch = next(asked.build_loader(4, 1, 0, 1))
    network = load_transformer(tuned.trainer.run_dir / "export")
    with torch.no_grad():
        said = network(batch.tokens, batch.positions, batch.segment_ids)[:, :-1].argmax(-1)
    right = (said == batch.tokens[:, 1:])[batch.loss_weights[:, 1:] != 0]
    assert right.float().mean() > 0.97


@pytest.mark.parametrize("loss_on", ["flagged", "all"])
def test_logits_of_prompts_get_a_gradient_only_with_loss_on_all(
    config: Callable[..., FinetuneConfig], loss_on: str
) -> None:
    task = PretrainTask(config(data={"loss_on": loss_on}))
    batch = next(task.build_loader(4, 1, 0, 1))
    network = Recording(task.build_model())
    found = task.losses(network, batch, 0)
    (gradient,) = torch.autograd.grad(found.objective, network.hidden)
    learnt = answers(batch, task.vocabulary.end_of_turn)
    inner = (batch.segment_ids != 0) & (batch.positions > 0)
    assert 0 < learnt.sum() < inner.sum()
    expected = learnt if loss_on == "flagged" else inner
    assert torch.equal((gradient != 0).any(-1)[:, :-1], expected[:, 1:])
    kinds = {name: task.vocabulary.contains(name, batch.tokens) & expected for name in ("text", "image")}
    for name, kind in kinds.items():
        assert float(found.metrics[f"loss_{name}"].count) == kind.sum()  # type: ignore[union-attr, arg-type]


def test_held_out_losses_are_of_answers_whatever_is_trained_on(
    config: Callable[..., FinetuneConfig], root: Path
) -> None:
    found = []
    for loss_on in ("flagged", "all"):
        task = PretrainTask(config(data={"loss_on": loss_on, "held_out_tokens": root / "held_out"}))
        task.build_loader(4, 1, 0, 1)
        with torch.no_grad():
            found.append(task.evaluate(task.build_model().eval()))
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_goes_on_exactly(config: Callable[..., FinetuneConfig], stage: int) -> None:
    zero_file = ROOT / f"configs/deepspeed/zero{stage}.json"
    tuned = config(4, deepspeed=zero_file, save_every=2, keep_checkpoints=9)
    tuned = replace(tuned, model=replace(tuned.model, dropout=0.05))
    finetune(tuned)
    run = tuned.trainer.run_dir
    whole, lines = load_transformer(run / "export").state_dict(), records(tuned)
    (run / "checkpoints/latest").write_text("step_00000002\n")
    finetune(tuned)
    assert [line.get("loss") for line in records(tuned)] == [line.get("loss") for line in lines]
    assert all(torch.equal(load_transformer(run / "export").state_dict()[name], whole[name]) for name in whole)


def test_the_export_keeps_tokenizers_and_attribution_of_the_base_model(
    tmp_path: Path, tokenizers: Path, write_shape_shards: Callable[..., None]
) -> None:
    files = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    write_shape_shards(tmp_path / "shards", 12, 16)
    pretokenize(PretokenizeConfig(shards=(tmp_path / "shards",), out=tmp_path / "tokens", **files))
    base = tiny_config(tmp_path, max_steps=1, run_dir=tmp_path / "parrot")
    pretrain(replace(base, **files, card={"attribution": "Pictures by A. Painter.", "limits": "CC BY 4.0 only."}))
    folder = tmp_path / "parrot/export"
    tuned = FinetuneConfig(
        init_from=folder,
        data=FinetuneDataConfig(tokens=tmp_path / "tokens", seq_len=128),
        trainer=replace(base.trainer, run_dir=tmp_path / "tuned"),
        card={"attribution": "Conversations by B. Writer."},
    )
    finetune(tuned)
    out = tmp_path / "tuned/export"
    assert not load_export(out).codec.conversations  # pairs alone
    for name in ("text_tokenizer.model", "image_tokenizer/config.json", "image_tokenizer/model.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    talk = [{"role": "user", "content": "a red"}, {"role": "assistant", "content": "apple"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    samples = read_conversations(tmp_path / "talk.jsonl", SkipCounter(), SampleLimits())
    write_shards([replace(one, key="0") for one in samples], tmp_path / "talk")
    pretokenize(PretokenizeConfig(shards=(tmp_path / "talk",), out=tmp_path / "talk_tokens", **files))
    data = replace(tuned.data, tokens=tmp_path / "talk_tokens")
    talking = replace(tuned, data=data, trainer=replace(base.trainer, run_dir=tmp_path / "talking"))
    finetune(talking)
    assert load_export(tmp_path / "talking/export").codec.conversations
    more = replace(base, **files, init_from=tmp_path / "talking/export", model=TransformerConfig())
    pretrain(replace(more, trainer=replace(base.trainer, run_dir=tmp_path / "more")))
    assert load_export(tmp_path / "more/export").codec.conversations  # what it was tuned on before
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mixmodal\n")
    assert card.count("library_name") == 1
    made = "Of the model parrot, which it is made from:"
    assert f"## Attribution\n\nConversations by B. Writer.\n\n{made}\n\nPictures by A. Painter.\n" in card
    assert f"## Limits\n\n{made}\n\nCC BY 4.0 only.\n" in card
    (folder / "README.md").write_text("# A card without sections\n")
    finetune(replace(tuned, trainer=replace(tuned.trainer, run_dir=tmp_path / "again"), card={}))
    card = (tmp_path / "again/export/README.md").read_text()
    assert "## Attribution\n\nMade from the model parrot, whose card names nobody.\n" in card
    assert "## Limits\n\nNot stated.\n" in card


@pytest.mark.parametrize("sequence_format", ["cm3leon", "chameleon"])
def test_pictures_that_answer_held_out_texts_are_drawn(
    tmp_path: Path, tokenizers: Path, write_shape_shards: Callable[..., None], sequence_format: Any
) -> None:
    files = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    write_shape_shards(tmp_path / "pairs", 6, 16)
    turns = (Message("user", (False,)), Message("assistant", (True,)))
    asked = [Sample(pair.key, pair.parts, {}, "", turns) for pair in read_samples(tmp_path / "pairs")]
    write_shards(asked, tmp_path / "shards", 6)
    folders = {"shards": (tmp_path / "shards",), "out": tmp_path / "talk", "sequence_format": sequence_format}
    pretokenize(PretokenizeConfig(**folders, **files))
    held_out = TokenShards.open(tmp_path / "talk")
    sheet = SampleSheet(held_out, *files.values(), count=2, max_len=128)
    documents = [held_out[index].tolist() for index in range(6)]
    for pair in sheet.pairs:
        prompt = sheet.codec.format.spell_prompt(pair.prompt, "image").tolist()
        assert held_out.vocabulary.end_of_turn in prompt
        assert prompt in [ids[: len(prompt)] for ids in documents]
    config = tiny_config(tmp_path, max_steps=1)
    shape = replace(config.model, vocab_size=held_out.vocabulary.size)
    assert sheet.draw(Transformer(shape).eval()).size[0] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required: init_from"),
        (["--init_from", "BASE", "--data.image_first_share", "0.5"], "Set image_first_share from 0.5 to 0"),
        (["--init_from", "BASE", "--data.tokens", "PAIRS", "--data.loss_on", "all"], "loss_on all can not act"),
        (["--init_from", "BASE", "--model.dim", "32"], "model: dim is 32, not 64"),
        (["--init_from", "PAIRS"], "is not an exported model: config.json is missing"),
    ],
)
def test_what_can_not_be_tuned_is_told_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    given = ["--data.tokens", str(root / "talk"), "--data.seq_len", "64", "--trainer.run_dir", str(tmp_path / "run")]
    folders = {"BASE": str(root / "run/export"), "PAIRS": str(root / "tokens")}
    given += ["--trainer.max_steps", "1", "--trainer.micro_batch_size", "2"]
    with pytest.raises(SystemExit):
        main(["finetune", *given, *(folders.get(option, option) for option in options)])
    message = capsys.readouterr().err
    assert said in message
    assert message.startswith("mixmodal finetune: error: ")
    assert len(message.splitlines()) == 1


def test_nothing_has_to_be_switched_off_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "init_from: base\ndata: {tokens: talk, seq_len: 64}\n"
        "trainer: {run_dir: run, max_steps: 1, micro_batch_size: 1}\n"
    )
    found = load_config(FinetuneConfig, path)
    assert not found.objective.draws
    assert (found.data.image_first_share, found.data.caption_dropout, found.data.loss_on) == (0, 0, "flagged")
    path.write_text(path.read_text() + "objective: {max_masks: 4}\n")
    assert load_config(FinetuneConfig, path).objective.draws


@pytest.mark.parametrize(("objective", "kind"), [("max_masks: 0", FinetuneConfig), ("min_masks: 5", PretrainConfig)])
def test_the_plan_reads_both_kinds_of_config(tmp_path: Path, objective: str, kind: type[PretrainConfig]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"init_from: base\ndata: {{tokens: talk, seq_len: 64}}\nobjective: {{{objective}}}\n"
        "trainer: {run_dir: run, max_steps: 1, micro_batch_size: 1}\n"
    )
    assert type(load_training(path, ["--trainer.seed=3"])) is kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chameleon", "cm3leon"])
def test_recipes_are_those_of_the_papers_and_fit_the_machines_they_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    base = load_config(PretrainConfig, ROOT / f"configs/train/{name}_7b.yaml").model
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "model": asdict(base)}))
    path = ROOT / f"configs/train/finetune_{name}.yaml"
    header = re.search(
        r"For (\d+) GPUs of 80 GB.*?\((\S+) GPU-hours\) at 40 %.*?, (\d+) GB a GPU", path.read_text(), re.S
    )
    assert header
    training = load_training(path, [f"--init_from={tmp_path}"])
    assert isinstance(training, FinetuneConfig)
    gpus = int(header[1])
    trainer = training.trainer.shared(gpus)
    found = build_plan(replace(training, trainer=trainer), PlanConfig(training=path, gpus=gpus, mfu=0.4))
    assert found.fits
    assert found.budget is not None
    assert f"{found.budget.gpu_hours:,.0f}" == header[2]
    assert round(found.total_bytes / 1e9) == int(header[3])
    assert found.budget.tokens_per_step == {"chameleon": 128 * 4096, "cm3leon": 2**21}[name]
    assert found.budget.tokens == pytest.approx({"chameleon": 1.1029e9, "cm3leon": 30e9}[name], rel=1e-3)
    rates = [lr_at(step, training.optimizer, trainer.max_steps) for step in (0, 150, trainer.max_steps)]
    assert max(rates) == pytest.approx({"chameleon": 1e-5, "cm3leon": 5e-5}[name], rel=1e-6)
    assert (training.data.loss_on, training.objective.draws, training.model.dropout) == {
        "chameleon": ("flagged", False, 0.05),
        "cm3leon": ("all", True, 0.0),
    }[name]
