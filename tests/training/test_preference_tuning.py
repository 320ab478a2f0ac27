"""Tuning on pairs of answers, from a reference that is asked once."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import tiny_config, tiny_tuning, write_conversations, write_shapes
from test_launcher import pretrain_on_ranks

from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import TokenShards
from mixmodal.interop.export import load_transformer
from mixmodal.models.transformer import Transformer
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.training import adapter, preference
from mixmodal.training.adapter import AdapterConfig
from mixmodal.training.finetune import FinetuneConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.preference import PreferenceTask, PreferenceTuningConfig
from mixmodal.training.pretrain import PretrainTask, pretrain

ROOT = Path(__file__).parents[2]
Build = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs of answers, others held out, conversations, and a base model that has seen one step."""
    folder = tmp_path_factory.mktemp("preference")
    write_shapes(folder / "tokens", 20)
    pretrain(tiny_config(folder, max_steps=1))
    write_conversations(folder / "pairs", 300, pairs=True)
    write_conversations(folder / "held_out", 40, seed=1, pairs=True)
    write_conversations(folder / "talk", 20)
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Build:
    """Tunes on the pairs, in a run folder of its own."""

    def build(
        max_steps: int = 1, data: dict[str, Any] | None = None, beta: float = 0.1, reference: Path | None = None,
        **trainer: Any,
    ) -> FinetuneConfig:  # fmt: skip
        data = {"tokens": root / "pairs", "seq_len": 96, **(data or {})}
        options = {
            "optimizer": OptimizerConfig(lr=3e-3, warmup_steps=5),
            "preference": PreferenceTuningConfig(beta=beta, reference_file=reference),
            "z_loss_weight": 0.0,
        }
        return tiny_tuning(root, tmp_path / "run", max_steps, data, trainer, **options)

    return build


def records(config: FinetuneConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


def task_of(config: FinetuneConfig) -> PreferenceTask:
    assert config.preference
    return PreferenceTask(config, config.preference)


def test_the_reference_is_what_each_answer_has_by_itself(config: Build, root: Path) -> None:
    task = task_of(config())
    network = task.build_model().eval()
    batch = next(task.build_loader(4, 1, 0, 1))
    shards = TokenShards(root / "pairs")
    numbers = {shards.keys[index]: index for index in range(len(shards))}
    checked = 0
    for row, keys in enumerate(batch.rows.keys):
        for number, key in enumerate(keys):
            ids, loss = torch.from_numpy(shards[numbers[key]]), shards.loss(numbers[key])
            assert loss is not None
            second = int((ids == shards.vocabulary.bos).nonzero()[1])
            for answer, (start, stop) in enumerate([(0, second), (second, len(ids))]):
                with torch.no_grad():
                    logps = network(ids[None, start:stop])[0, :-1].log_softmax(-1)
                found = logps.gather(-1, ids[start + 1 : stop, None]).squeeze(-1)
                expected = found[torch.from_numpy(loss[start + 1 : stop])].sum()
                own = batch.reference[row, 2 * number + answer]
                assert own.item() == pytest.approx(expected.item(), abs=1e-4)
                checked += 1
    assert checked == 2 * sum(map(len, batch.rows.keys)) > 8


def test_each_source_has_its_own_reference(config: Build, root: Path, tmp_path: Path) -> None:
    """Both folders have the same keys, and the same pair has the same reference in either."""
    sources = {name: {"tokens": root / folder} for name, folder in (("one", "pairs"), ("two", "held_out"))}
    apart = {}
    for name, source in sources.items():
        task = task_of(config(data=source, run_dir=tmp_path / name))
        task.build_model()
        apart[name] = references(task)
    data = {"tokens": None, "sources": {name: SourceConfig(**source) for name, source in sources.items()}}
    task = task_of(config(data=data, run_dir=tmp_path / "both"))
    task.build_model()
    found = references(task)
    assert {key.partition(":")[0] for key in found} == {"one", "two"}
    for key, values in found.items():
        name, _, own = key.partition(":")
        if own in apart[name]:
            assert values == pytest.approx(apart[name][own], abs=1e-4)
    both = [key.partition(":")[2] for key in found if key.startswith("two:")]
    assert any(own in apart["one"] and apart["one"][own] != found[f"two:{own}"] for own in both)


def references(task: PreferenceTask) -> dict[str, list[float]]:
    """Log-probabilities of the pairs of eight batches, by key."""
    loader, found = task.build_loader(4, 1, 0, 1), {}
    for batch in (next(loader) for _ in range(8)):
        for keys, values in zip(batch.rows.keys, batch.reference.tolist()):
            found |= {key: values[2 * number : 2 * number + 2] for number, key in enumerate(keys)}
    return found


def test_the_first_loss_is_the_logarithm_of_two(config: Build, root: Path) -> None:
    tuned = config(data={"held_out_tokens": root / "held_out"})
    finetune(replace(tuned, optimizer=OptimizerConfig(lr=1e-12)))
    first, last = records(tuned)
    for prefix, line in (("", first), ("eval_", last)):
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(line[f"{prefix}kl_estimate"]) < 1e-6


def test_held_out_pairs_are_told_apart(config: Build, root: Path) -> None:
    tuned = config(80, {"held_out_tokens": root / "held_out"}, log_every=20)
    finetune(tuned)
    lines = records(tuned)
    first, last = lines[0], lines[-1]
    assert first["loss"] > 0.5  # of the first 20 steps
    assert last["eval_loss"] < 0.35  # seen: 0.21
    assert last["eval_accuracy"] > 0.85  # seen: 0.95
    assert min(last["eval_accuracy_text"], last["eval_accuracy_image"]) > 0.8  # seen: 0.90 and 1.00
    assert last["eval_reward_margin"] > 1.5  # seen: 2.4
    assert math.isfinite(last["eval_kl_estimate"])
    assert last["eval_log_ratio_chosen"] > last["eval_log_ratio_rejected"]
    assert last["eval_kl_estimate"] != 0


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_goes_on_exactly_and_asks_the_reference_once(
    config: Build, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = config(4, deepspeed=ROOT / f"configs/deepspeed/zero{stage}.json", save_every=2, keep_checkpoints=9)
    tuned = replace(tuned, model=replace(tuned.model, dropout=0.05))
    finetune(tuned)
    run = tuned.trainer.run_dir
    whole, lines = load_transformer(run / "export").state_dict(), records(tuned)
    (run / "checkpoints/latest").write_text("step_00000002\n")
    monkeypatch.setattr(preference.PreferenceTask, "_score", None)
    finetune(tuned)
    assert [line["loss"] for line in records(tuned)] == [line["loss"] for line in lines]
    assert len({line["loss"] for line in lines}) == 4
    found = load_transformer(run / "export").state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_weights_are_the_same_whether_the_reference_is_at_hand(config: Build, tmp_path: Path) -> None:
    shared = tmp_path / "shared/reference.safetensors"
    states = []
    for name in "ab":
        tuned = config(2, reference=shared, run_dir=tmp_path / name)
        finetune(tuned)
        assert not (tmp_path / name / "reference.safetensors").exists()
        states.append(load_transformer(tmp_path / name / "export").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_the_reference_draws_is_not_drawn_from_the_weights(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with new parts, as an adapter's, is built for the reference and again to be trained."""
    monkeypatch.setattr(PretrainTask, "restrict", lambda *_: torch.rand(3))
    found = []
    for _ in range(2):  # without a file, and with it
        torch.manual_seed(0)
        task_of(config(reference=tmp_path / "reference.safetensors")).build_model()
        found.append(torch.rand(1).item())
    assert found[0] == found[1]


def test_a_reference_of_another_model_or_other_shards_is_computed_anew(
    config: Build, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "reference.safetensors"
    tuned = config(reference=shared)
    finetune(tuned)
    written = json.loads(shared.with_suffix(".json").read_text())
    other = replace(tuned, init_from=tmp_path / "run/export", trainer=replace(tuned.trainer, run_dir=tmp_path / "b"))
    with caplog.at_level(logging.WARNING):
        finetune(other)
    assert "its model is another" in caplog.text
    assert json.loads(shared.with_suffix(".json").read_text())["model"] != written["model"]
    assert records(other)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    data = replace(tuned.data, tokens=root / "held_out")
    with caplog.at_level(logging.WARNING):
        finetune(replace(tuned, data=data, trainer=replace(tuned.trainer, run_dir=tmp_path / "c")))
    assert "its model, shards is another" in caplog.text
    shared.write_bytes(shared.read_bytes()[:-1] + b"\1")
    finetune(replace(tuned, data=data, trainer=replace(tuned.trainer, run_dir=tmp_path / "d")))
    assert "its sha256 is another" in caplog.text


def test_a_reference_of_whole_weights_is_none_of_rounded_ones(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(model: Transformer, precision: str) -> None:
        for name, parameter in model.blocks.named_parameters():
            if "norm" not in name:
                parameter.data = (8 * parameter.data).round() / 8

    monkeypatch.setattr(adapter, "quantize", quantize)
    shared = tmp_path / "reference.safetensors"
    for name, quantized in (("a", None), ("b", "nf4")):
        tuned = config(reference=shared, run_dir=tmp_path / name)
        finetune(replace(tuned, adapter=AdapterConfig(rank=2, targets=["*.qkv"], quantize=quantized)))
        assert records(tuned)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_no_reference_is_not_written_over(config: Build, root: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((root / "run/export/model.safetensors").read_bytes())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"notes")
    for path in (weights, broken):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"preference.reference_file {path} holds something else"):
            finetune(config(reference=path))
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"reference_file is config.json; its name must end in .safetensors"):
        PreferenceTuningConfig(reference_file=Path("config.json"))


def test_a_run_does_not_go_on_with_another_reference(config: Build, tmp_path: Path) -> None:
    tuned = config(1)
    finetune(tuned)
    longer = replace(tuned, init_from=tmp_path / "run/export", trainer=replace(tuned.trainer, max_steps=2))
    with pytest.raises(ValueError, match="init_from: reference_sha256 is"):
        finetune(longer)


def test_two_ranks_share_the_pairs_of_one(config: Build) -> None:
    """Losses and gradients are sums: those of two ranks' batches make up those of one."""
    task = task_of(config())
    network = task.build_model()
    whole = next(task.build_loader(4, 1, 0, 1))
    halves = [next(task_of(config()).build_loader(2, 1, rank, 2)) for rank in range(2)]
    assert [keys for half in halves for keys in half.rows.keys] == whole.rows.keys
    found = []
    for batches in ([whole], halves):
        total = sum(task.losses(network, batch, 0).objective for batch in batches)
        assert isinstance(total, torch.Tensor)
        gradients = torch.autograd.grad(total, list(network.parameters()))
        found.append((total.item(), gradients, sum(float(task.batch_weight(batch)) for batch in batches)))
    (one, gradients, pairs), (two, others, same) = found
    assert pairs == same > 4
    assert two == pytest.approx(one, rel=1e-6)
    assert max((a - b).abs().max().item() for a, b in zip(gradients, others)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_tune_as_one(config: Build, tmp_path: Path, stage: int) -> None:
    one = config(3)
    finetune(one)
    trainer = {"run_dir": tmp_path / "two", "deepspeed": ROOT / f"configs/deepspeed/zero{stage}.json"}
    two = replace(one, trainer=replace(one.trainer, micro_batch_size=2, **trainer))
    pretrain_on_ranks(tmp_path, 2, two, "finetune")
    for own, other in zip(records(two), records(one), strict=True):
        for name in ("loss", "accuracy", "reward_margin", "kl_estimate", "grad_norm"):
            assert own[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)  # worst seen: 4e-7
    weights = [load_transformer(run.trainer.run_dir / "export").state_dict() for run in (one, two)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-5  # 2e-7


def test_pairs_and_preference_need_each_other(config: Build, root: Path) -> None:
    tuned = config()
    with pytest.raises(ValueError, match=r"pairs/manifest\.json: .*set preference in a config of `mixmodal finetune`"):
        finetune(replace(tuned, preference=None))
    with pytest.raises(ValueError, match=r"talk/manifest\.json: .*which preference needs"):
        finetune(replace(tuned, data=replace(tuned.data, tokens=root / "talk")))
    with pytest.raises(ValueError, match=r"talk/manifest\.json: .*which preference needs"):
        finetune(replace(tuned, data=replace(tuned.data, held_out_tokens=root / "talk")))


def test_options_that_can_not_act_on_pairs_are_named_together(config: Build) -> None:
    tuned = config(data={"loss_on": "all", "first_part_weight": 0.5})
    masks = CausalMaskedConfig(min_masks=0, max_masks=1)
    said = (
        "with preference, set objective.max_masks to 0 (and min_masks), .*; data.loss_on to flagged, .*; "
        "data.first_part_weight to 1, .*; modality_weights to none, .*; z_loss_weight to 0"
    )
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        finetune(replace(tuned, objective=masks, modality_weights={"image": 0.5}, z_loss_weight=1e-5))


def test_keys_that_come_twice_are_named(config: Build, root: Path, tmp_path: Path) -> None:
    shards = TokenShards(root / "pairs")
    manifest = {**shards.manifest, "shards": shards.manifest["shards"] * 2}
    for path in root.glob("pairs/*"):
        (tmp_path / "twice").mkdir(exist_ok=True)
        (tmp_path / "twice" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "twice/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'twice'}: the key 0#0 comes twice")):
        finetune(config(data={"tokens": tmp_path / "twice"}))


def test_a_plain_task_refuses_pairs_too(config: Build) -> None:
    with pytest.raises(ValueError, match="pairs of a chosen and a rejected answer"):
        PretrainTask(config())
