"""A folder of an adapter is used with its base model and no other, and nothing in it is trusted."""

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

import mixmodal
from mixmodal.cli import main
from mixmodal.interop.adapter_files import hash_adapter, load_adapter, save_adapter
from mixmodal.interop.adapters import PREFIX, Adapter, AdapterError, AdapterSettings, merge, weights_sha256
from mixmodal.interop.export import load_export, load_transformer
from mixmodal.pipeline import MixedModal
from mixmodal.weights import read_weights, write_weights

TARGETS = ("blocks.0.attention.qkv", "blocks.1.ffn.out")
QKV = f"{PREFIX}{TARGETS[0]}"


def draw_adapter(base: Path, kind: Any = "lora", base_name: str = "base") -> Adapter:
    """Of two layers and a few rows, as if it were trained."""
    model = load_transformer(base)
    settings = AdapterSettings(kind=kind, rank=2, alpha=8.0, targets=TARGETS)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: 0.3 * torch.randn(shape, generator=generator)
        for target in TARGETS
        for key, shape in settings.shapes(target, tuple(model.get_parameter(f"{target}.weight").shape)).items()
    }
    rows = {
        name: torch.randn(5, model.config.dim, generator=generator) for name in ("embedding.weight", "output.weight")
    }
    return Adapter(
        settings=settings,
        tensors=tensors,
        spans=(range(4, 7), range(9, 11)),
        rows=rows,
        base=base_name,
        base_sha256=weights_sha256(read_weights(base)),
    )


@pytest.fixture(params=["lora", "dora"])
def adapter(exported: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Its folder."""
    save_adapter(tmp_path / "adapter", draw_adapter(exported, request.param), "## Limits\n\nNone.")
    return tmp_path / "adapter"


@pytest.fixture
def lora(exported: Path, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "lora", draw_adapter(exported))
    return tmp_path / "lora"


@pytest.fixture
def other(exported: Path, tmp_path: Path) -> Path:
    """Another model of the same shape."""
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    return folder


def change(path: Path, **changes: Any) -> None:
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def same(first: Any, second: Any) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(one == two and torch.equal(tensor, wanted) for (one, tensor), (two, wanted) in pairs)


def test_a_folder_comes_back_as_it_was(exported: Path, adapter: Path) -> None:
    kind = load_adapter(adapter).settings.kind
    found, wanted = load_adapter(adapter), draw_adapter(exported, kind)
    assert (found.settings, found.spans, found.base_sha256) == (wanted.settings, wanted.spans, wanted.base_sha256)
    for kept, drawn in ((found.tensors, wanted.tensors), (found.rows, wanted.rows)):
        assert set(kept) == set(drawn)
        assert all(torch.equal(kept[name], drawn[name]) for name in drawn)
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mixmodal\nbase_model: ")
    assert card.endswith("## Limits\n\nNone.\n")


def test_a_model_with_an_adapter_is_the_merged_one(exported: Path, adapter: Path, tmp_path: Path) -> None:
    used = MixedModal.from_pretrained(exported, "cpu", adapter=adapter)
    plain = load_transformer(exported)
    merge(plain, load_adapter(adapter))
    assert same(used.model, plain)
    main(["export", str(exported), str(tmp_path / "merged"), "--adapter", str(adapter), "--to", "mixmodal"])
    merged = load_export(tmp_path / "merged")
    assert same(merged.model, plain)
    assert "## Adapter" in (tmp_path / "merged/README.md").read_text()
    assert used.codec.conversations is merged.codec.conversations is False
    used.save_pretrained(tmp_path / "saved")
    assert same(load_transformer(tmp_path / "saved"), plain)
    assert "## Adapter" in (tmp_path / "saved/README.md").read_text()


def test_an_adapter_of_conversations_makes_a_model_of_them(exported: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "talk", replace(draw_adapter(exported), conversations=True))
    used = MixedModal.from_pretrained(exported, "cpu", adapter=tmp_path / "talk")
    assert used.codec.conversations
    used.save_pretrained(tmp_path / "saved")
    main(["export", str(exported), str(tmp_path / "merged"), "--adapter", str(tmp_path / "talk"), "--to", "mixmodal"])
    assert all(load_export(tmp_path / name).codec.conversations for name in ("saved", "merged"))


def test_weights_of_16_bits_are_rounded_once(exported: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(exported, tmp_path / "half"))
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(narrow, base / "model.safetensors")
    drawn = draw_adapter(base)
    half, whole = load_transformer(base), load_transformer(base).float()
    merge(half, drawn)
    merge(whole, drawn)
    assert same(half, whole.bfloat16())


@pytest.mark.parametrize("command", ["generate", "classify", "match"])
def test_commands_take_an_adapter(exported: Path, lora: Path, tmp_path: Path, command: str) -> None:
    from PIL import Image

    for name in ("red", "blue"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), name).save(tmp_path / "pictures" / name / "a.png")
    (tmp_path / "classes.txt").write_text("red\ta red apple\nblue\ta blue pear\n")
    line = {"images": ["red/a.png", "blue/a.png"], "captions": ["a red apple", "a blue pear"], "true": [0, 1]}
    (tmp_path / "pictures/task.jsonl").write_text(json.dumps({"key": "1", **line}) + "\n")
    more = {
        "generate": ["--prompt", "a red apple", "--seed", "1"],
        "classify": ["--data", str(tmp_path / "pictures"), "--classes", str(tmp_path / "classes.txt")],
        "match": ["--task", str(tmp_path / "pictures/task.jsonl")],
    }[command]
    main(["export", str(exported), str(tmp_path / "merged"), "--adapter", str(lora), "--to", "mixmodal"])
    found = []
    for number, using in enumerate(([exported], [exported, "--adapter", lora], [tmp_path / "merged"])):
        out = tmp_path / f"out{number}"
        main([command, "--model", *map(str, using), "--out", str(out), "--device", "cpu", *more])
        told = (out / {"generate": "results.json"}.get(command, "summary.json")).read_text()
        assert (hash_adapter(lora) in told) == (number == 1)
        found.append(
            Image.open(out / "0000.png").tobytes() if command == "generate" else (out / "records.jsonl").read_text()
        )
    plain, adapted, merged = found
    assert adapted == merged
    assert adapted != plain


def test_the_page_is_served_with_an_adapter(exported: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmodal.serve import server

    served = []
    monkeypatch.setattr(server, "check_gradio", lambda: None)
    monkeypatch.setattr(server, "launch", lambda studio, config: served.append(studio))
    server.serve(server.ServeConfig(model=str(exported), adapter=lora, device="cpu"))
    plain = load_transformer(exported)
    merge(plain, load_adapter(lora))
    assert same(served[0].model.model, plain)


def test_transformers_layouts_get_the_merged_weights(exported: Path, lora: Path, tmp_path: Path) -> None:
    main(["export", str(exported), str(tmp_path / "merged"), "--adapter", str(lora), "--to", "mixmodal"])
    main(["export", str(exported), str(tmp_path / "one"), "--adapter", str(lora)])
    main(["export", str(tmp_path / "merged"), str(tmp_path / "two")])
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_of_another_model_is_refused(exported: Path, other: Path, lora: Path) -> None:
    said = r"an adapter of another base model: weights_sha256 is \w+\.\.\. of the model base; "
    with pytest.raises(AdapterError, match=f"{lora}/base_model.json: {said}{other}/model.safetensors has "):
        MixedModal.from_pretrained(other, "cpu", adapter=lora)


def test_the_digest_is_of_tensors_and_not_of_files(exported: Path, tmp_path: Path) -> None:
    found = read_weights(exported)
    write_weights(tmp_path, found.items(), shard_bytes=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weights_sha256(read_weights(tmp_path)) == weights_sha256(found)


@pytest.mark.parametrize(
    ("file", "name", "shape", "said"),
    [
        ("adapter_model.safetensors", f"{QKV}.lora_A.weight", (2, 5), "lora_A.weight has the shape (2, 5); "),
        ("adapter_model.safetensors", f"{QKV}.lora_B.weight", (5, 2), "lora_B.weight has the shape (5, 2); "),
        ("rows.safetensors", "embedding.weight", (5, 3), "embedding.weight has rows of 3 up to id 10; "),
    ],
)
def test_other_shapes_are_refused_before_anything_changes(
    exported: Path, lora: Path, file: str, name: str, shape: tuple[int, ...], said: str
) -> None:
    save_file({**load_file(lora / file), name: torch.zeros(shape)}, lora / file)
    model = load_transformer(exported)
    with pytest.raises(AdapterError, match="of another base model") as found:
        merge(model, load_adapter(lora))
    assert f"{lora / file}: " in str(found.value)
    assert said in str(found.value)
    assert same(model, load_transformer(exported))
    with pytest.raises(AdapterError) as found:
        MixedModal.from_pretrained(exported, "cpu", adapter=lora)
    assert str(exported / "model.safetensors") in str(found.value)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ("adapter_config.json", {"r": True}, "r is True"),
        ("adapter_config.json", {"r": 0}, "r is 0"),
        ("adapter_config.json", {"r": ...}, "r is None"),
        ("adapter_config.json", {"lora_alpha": "8"}, "lora_alpha is '8'"),
        ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ("adapter_config.json", {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ("adapter_config.json", {"use_dora": "yes"}, "use_dora is 'yes'"),
        ("adapter_config.json", {"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ("adapter_config.json", {"target_modules": [["x"]]}, "target_modules is [['x']]"),
        ("adapter_config.json", {"use_rslora": True}, "use_rslora is True"),
        ("adapter_config.json", {"modules_to_save": ["embedding"]}, "modules_to_save is ['embedding']"),
        ("adapter_config.json", {"rank_pattern": {"qkv": 4}}, "rank_pattern is {'qkv': 4}"),
        ("adapter_config.json", {"target_modules": [TARGETS[0]]}, "blocks.1.ffn.out.lora_A.weight' is not of"),
        ("adapter_config.json", {"use_dora": True}, "lora_magnitude_vector' is missing"),
        ("base_model.json", {"format_version": 2}, "needs format_version 1, base_model and weights_sha256"),
        ("base_model.json", {"conversations": "yes"}, "conversations is 'yes'; it must be true or false"),
        ("base_model.json", {"weights_sha256": 1}, "needs format_version 1, base_model and weights_sha256"),
        ("base_model.json", {"rows": [[9, 11], [4, 7]]}, "rows is [[9, 11], [4, 7]]"),
        ("base_model.json", {"rows": [[4, "7"]]}, "rows is [[4, '7']]"),
        ("base_model.json", {"rows": 3}, "rows is 3"),
        ("base_model.json", {"rows": [[0, 2**70]]}, "rows is [[0, 1180591620717411303424]]"),
        ("base_model.json", {"rows": ...}, "base_model.json names no rows, but rows.safetensors stands beside it"),
        ("base_model.json", {"rows": [[4, 8]]}, "embedding.weight' has the shape (5, "),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(lora: Path, file: str, changes: dict[str, Any], said: str) -> None:
    change(lora / file, **changes)
    with pytest.raises(AdapterError) as found:
        load_adapter(lora)
    assert said in str(found.value)
    assert str(lora) in str(found.value)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "rows.safetensors"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda tensor: tensor.to(torch.int8), "is of torch.int8; an adapter has float32, bfloat16, float16, float64"),
        (lambda tensor: tensor > 0, "is of torch.bool"),
        (lambda tensor: tensor.to(torch.complex64), "is of torch.complex64"),
        (lambda tensor: tensor.fill_(float("nan")), "holds values that are not finite"),
        (lambda tensor: tensor.fill_(-float("inf")), "holds values that are not finite"),
    ],
)
def test_what_is_no_number_is_refused(lora: Path, file: str, changed: Callable[..., Any], said: str) -> None:
    tensors = load_file(lora / file)
    name = next(iter(tensors))
    save_file({**tensors, name: changed(tensors[name])}, lora / file)
    with pytest.raises(AdapterError) as found:
        load_adapter(lora)
    assert f"{lora / file}: tensor {name!r} {said}" in str(found.value)


def test_rows_of_both_matrices_are_needed_where_there_are_two(exported: Path, lora: Path) -> None:
    rows = load_file(lora / "rows.safetensors")
    save_file({"embedding.weight": rows["embedding.weight"]}, lora / "rows.safetensors")
    with pytest.raises(AdapterError, match=r"rows.safetensors: .* output.weight, which the network has, is missing"):
        merge(load_transformer(exported), load_adapter(lora))


def test_what_peft_itself_saves_can_be_read(lora: Path) -> None:
    from peft import LoraConfig

    theirs = LoraConfig(r=2, lora_alpha=8, target_modules=list(TARGETS)).to_dict()
    theirs["target_modules"] = sorted(theirs["target_modules"])
    before = load_adapter(lora)
    (lora / "adapter_config.json").write_text(json.dumps({**theirs, "peft_type": "LORA"}))
    assert load_adapter(lora).settings == before.settings


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "base_model.json", "rows.safetensors"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"\x80\x04.")], ids=["gone", "broken"])
def test_a_file_that_is_missing_or_broken_is_named(lora: Path, name: str, damage: Callable[[Path], Any]) -> None:
    damage(lora / name)
    with pytest.raises(AdapterError, match=name):
        load_adapter(lora)


def test_options_that_can_not_act_are_named(exported: Path, lora: Path, tmp_path: Path) -> None:
    from mixmodal.interop.exporting import ExportConfig
    from mixmodal.pipeline.classify_config import ClassifyConfig
    from mixmodal.pipeline.match_config import MatchConfig

    with pytest.raises(ValueError, match="to is mixmodal, which merges an adapter: give --adapter DIR"):
        ExportConfig(model=str(exported), out=tmp_path / "new", to="mixmodal")
    with pytest.raises(ValueError, match="adapter can not act on the method contrastive"):
        ClassifyConfig(model="clip", data=tmp_path, out=tmp_path / "out", method="contrastive", adapter=lora)
    with pytest.raises(ValueError, match="adapter can not act on the method diffusion"):
        MatchConfig(model="sd", task=tmp_path, out=tmp_path / "out", method="diffusion", adapter=lora)


def test_a_base_without_a_row_for_each_token_is_refused(exported: Path, tmp_path: Path) -> None:
    drawn = replace(draw_adapter(exported), spans=(range(4, 7), range(9_000, 9_002)))
    with pytest.raises(AdapterError, match=r"embedding.weight has rows of .* up to id 9001; the network has the shape"):
        merge(load_transformer(exported), drawn)
    assert mixmodal.load_transformer(exported).config.vocab_size < 9_000
