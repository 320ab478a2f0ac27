"""An adapter is trained and all else stays as it is; it is taken into the weights and out of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import tiny_config, tiny_tuning, write_conversations, write_shapes
from test_launcher import pretrain_on_ranks
from torch import Tensor

from mixmodal.interop.adapter_files import load_adapter
from mixmodal.interop.adapters import merge, unmerge
from mixmodal.interop.export import load_transformer
from mixmodal.models.transformer import Transformer
from mixmodal.training.adapter import AdapterConfig, AdapterTask
from mixmodal.training.finetune import FinetuneConfig, finetune
from mixmodal.training.optimizer import parameter_groups
from mixmodal.training.plan import PlanConfig, build_plan
from mixmodal.training.pretrain import PretrainConfig, pretrain
from mixmodal.training.trainable import TrainableConfig

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
        options = {"init_from": root / base / "export", "adapter": AdapterConfig(**{"rank": 4, **adapter})}
        return tiny_tuning(root, tmp_path / "run", max_steps, trainer=trainer, **options)

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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"base": "other"},
            r"init_from is a model of weights_sha256 \w+, but the checkpoint's adapter was trained with",
        ),
        ({"alpha": 8}, "adapter.alpha is 8.0, but the checkpoint's adapter was trained with 32.0"),
        ({"rows": []}, r"adapter.rows is \[\], but the checkpoint's adapter was trained with \[\[4, 68\]\]"),
    ],
)
def test_a_run_does_not_go_on_with_another_adapter(
    config: Callable[..., FinetuneConfig], root: Path, changed: dict[str, Any], said: str
) -> None:
    finetune(config(1, rank=2, targets=["*.qkv"]))
    if "base" in changed and not (root / "other").exists():
        shutil.copytree(root / "run/export", root / "other/export")
        tensors = load_file(root / "other/export/model.safetensors")
        tensors["norm.weight"][0] += 1
        save_file(tensors, root / "other/export/model.safetensors")
    with pytest.raises(ValueError, match=said):
        finetune(config(2, rank=2, targets=["*.qkv"], **changed))


def test_what_is_trained_is_told_and_written(
    config: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    training = config(max_steps=1)
    finetune(training)
    base = sum(tensor.numel() for tensor in weights(training.init_from.parent).values())
    layers = 2 * 4 * sum((64 + 192, 64 + 64, 64 + 256, 128 + 64))  # rank 4: qkv, out, up and out of the feed-forward
    rows = 2 * 64 * 64
    assert f"trained: {layers + rows:,} of {base + layers:,} parameters\n" in capsys.readouterr().out
    told = json.loads((training.trainer.run_dir / "resources.json").read_text())
    assert (told["parameters"], told["trained_parameters"]) == (base + layers, layers + rows)
    assert told["peak_memory_bytes"] > 10**8
    assert told["device"] == "cpu"


def test_the_plan_counts_what_is_trained(config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    training = config()
    lora, whole = (
        build_plan(one, PlanConfig(training=tmp_path, device="cpu"))
        for one in (training, replace(training, adapter=None))
    )
    task = task_of(training)
    trained = [parameter for parameter in task.build_model().parameters() if parameter.requires_grad]
    assert lora.parameters == sum(parameter.numel() for parameter in trained)  # all rows have optimizer states
    assert lora.rows["optimizer"] == 8 * lora.parameters
    assert lora.rows["weights"] > whole.rows["weights"]
    assert lora.saved_bytes < whole.saved_bytes + 4 * 64 * 4 * 4 * 64 * 4
    assert lora.total_bytes < whole.total_bytes


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": ["head"]}, "adapter.targets: 'head' names no linear layer of a block; the network has blocks"),
        ({"targets": ["output"]}, "adapter.targets: 'output' names no linear layer of a block"),
        ({"targets": []}, "adapter.targets is empty"),
        ({"rows": ["audio"]}, "adapter.rows: vocabulary: no range or control token 'audio'; there are special"),
        ({"rank": 0}, "adapter.rank is 0 and adapter.alpha 32.0; both must be above 0"),
        ({"dropout": 1.0}, r"adapter.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"kind": "dora", "trainer": stage(3)}, "adapter.kind is dora, which needs whole weights"),
        ({"quantize": "nf4", "trainer": stage(3)}, "adapter.quantize is nf4, which needs whole weights"),
    ],
)
def test_what_can_not_act_is_named(config: Callable[..., FinetuneConfig], adapter: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task_of(config(**adapter)).build_model()


def test_parts_of_the_network_stay_trained_by_one_config_alone(config: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(ValueError, match="trainable can not act beside adapter"):
        replace(config(), trainable=TrainableConfig(parameters=["output"]))


def test_dora_refuses_rows_of_zeros(config: Callable[..., FinetuneConfig], root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "run/export", tmp_path / "zeros/export"))
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.1.ffn.out.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no direction for rows of zeros, as blocks\.1\.ffn\.out has"):
        task_of(replace(config(kind="dora"), init_from=folder)).build_model()


def test_targets_are_named_by_patterns(config: Callable[..., FinetuneConfig]) -> None:
    training = config(targets=["*.qkv", "blocks.1.ffn"], rows=["image", "end_of_span"])
    task = task_of(training)
    adapter = task.read_adapter(task.build_model())
    assert adapter.settings.targets == (
        "blocks.0.attention.qkv",
        "blocks.1.attention.qkv",
        "blocks.1.ffn.up",
        "blocks.1.ffn.out",
    )
    assert adapter.spans == (range(task.vocabulary.ids("image").start, task.vocabulary.end_of_span + 1),)


def test_trained_rows_are_not_decayed_and_thin_matrices_are(config: Callable[..., FinetuneConfig]) -> None:
    model = task_of(config(kind="dora")).build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert all("lora_A" in name or "lora_B" in name for name in decayed)
    assert others - {"embedding.weight", "output.weight"} == {name for name in names.values() if "magnitude" in name}


@pytest.mark.parametrize(("precision", "number"), [("bfloat16", 2), ("autocast_bfloat16", 0)])
def test_other_precisions_train_and_export(config: Callable[..., FinetuneConfig], precision: str, number: int) -> None:
    training = config(trainer={"precision": precision, **stage(number)})
    finetune(training)
    exported = weights(training.trainer.run_dir)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {tensor.dtype for tensor in exported.values()} == {dtype}
    plain = load_transformer(training.init_from)
    merge(plain, load_adapter(training.trainer.run_dir / "adapter"))
    assert all(torch.equal(tensor.to(dtype), exported[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3])
def test_two_processes_train_the_same_adapter(
    config: Callable[..., FinetuneConfig], tmp_path: Path, number: int
) -> None:
    one = config(trainer=stage(number))
    two = config(trainer={"micro_batch_size": 2, "run_dir": tmp_path / "two", **stage(number)})
    finetune(one)
    pretrain_on_ranks(tmp_path, 2, two, "finetune")
    found, wanted = (load_adapter(run.trainer.run_dir / "adapter") for run in (two, one))
    for first, second in zip(records(one), records(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, atol=1e-4, rtol=0)
    assert_base_is_kept(two)
