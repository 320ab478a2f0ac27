"""An exported folder is whole or not there, and says what is wrong with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixmodal
from mixmodal.interop import export as module
from mixmodal.interop.export import ExportError, load_export, load_transformer, save_export


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


def save_again(folder: Path, tokenizers: Path, **changes: Any) -> None:
    found = load_export(folder)
    with torch.no_grad():
        found.model.norm.weight.fill_(7)
    arguments: dict[str, Any] = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    save_export(folder, found.model, found.format, card={}, **{**arguments, **changes})


def test_an_export_comes_back_as_it_was(exported: Path) -> None:
    found = load_export(exported)
    weights = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    again = load_export(exported)
    assert again.vocabulary.digest == found.vocabulary.digest
    assert again.format.name in str(exported)
    assert again.format.grids == {"image": (4, 4)}
    assert not again.model.training
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_the_folder_holds_the_promised_files_and_no_pickle(exported: Path) -> None:
    files = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    image = ["image_tokenizer/config.json", "image_tokenizer/model.safetensors"]
    assert files == ["README.md", "config.json", *image, "model.safetensors", "text_tokenizer.model"]
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_the_card_has_its_sections(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for wanted in (
        "# A test",
        "- coloured shapes",
        "## Attribution\n\nnobody",
        "- loss: 1.5",
        "## Limits\n\nNot stated.",
    ):
        assert wanted in card


def test_the_bare_network_needs_no_tokenizer(folder: Path) -> None:
    (folder / "text_tokenizer.model").unlink()
    shutil.rmtree(folder / "image_tokenizer")
    model = mixmodal.load_transformer(folder)
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, model.config.vocab_size)
    assert load_transformer(folder, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_a_second_export_replaces_the_first(folder: Path, tokenizers: Path) -> None:
    (folder / "leftover.txt").write_text("from before")
    save_again(folder, tokenizers)
    assert load_transformer(folder).norm.weight.eq(7).all()
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_full_disk_leaves_the_old_export_in_force(
    folder: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(model: torch.nn.Module, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_weights", write_half)
    with pytest.raises(OSError, match="No space left"):
        save_again(folder, tokenizers)
    assert not load_transformer(folder).norm.weight.eq(7).any()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_failed_rename_puts_the_old_export_back(
    folder: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = module.os.rename

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        save_again(folder, tokenizers)
    assert not load_transformer(folder).norm.weight.eq(7).any()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "text_tokenizer.model", "image_tokenizer/model.safetensors"]
)
def test_a_missing_file_is_named_with_its_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ExportError, match=name) as caught:
        load_export(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_and_a_run_folder_are_told_apart(folder: Path) -> None:
    with pytest.raises(ExportError, match="nowhere is not a folder; give the folder of an exported model"):
        load_export(folder / "nowhere")
    with pytest.raises(ExportError, match=r"did you mean .*/export"):
        load_transformer(folder.parent)


def edit(folder: Path, section: str | None, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_of_other_shapes_name_the_tensor(folder: Path) -> None:
    edit(folder, "model", ffn_dim=48)
    with pytest.raises(
        ExportError, match=r"model\.safetensors: tensor blocks\.0\.ffn\.up\.weight has shape \(128, 32\)"
    ):
        load_transformer(folder)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"depth": 3}, r"config\.json: section 'model' has unknown keys \['depth'\]"),
        ("model", {"num_heads": 5}, r"config\.json: section 'model' can not be used"),
        (None, {"conversations": 1}, r"config\.json: conversations is 1; it must be true or false"),
        (None, {"format_version": 2}, r"config\.json: format_version is not 1"),
        (None, {"vocabulary": {"num_words": 3}}, "can not be loaded: .*num_words"),
        ("sequence_format", {"name": "emu"}, "'emu' is unknown"),
        ("sequence_format", {"grids": {"image": [2, 2]}}, r"the tokenizer has image grid \(4, 4\)"),
        ("vocabulary", {"num_text_pieces": 9}, "the tokenizer has text pieces"),
        ("vocabulary", {"codebook_sizes": {"image": 60}}, "the tokenizer has image codes 75, .* hold 60; give the"),
        ("vocabulary", {"num_reserved": 99}, r"vocab_size is \d+, the vocabulary"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder: Path, section: str | None, changes: dict, message: str) -> None:
    edit(folder, section, **changes)
    with pytest.raises(ExportError, match=message):
        load_export(folder)


def test_a_whole_number_stands_for_a_fraction(folder: Path) -> None:
    edit(folder, "model", rope_theta=10_000, norm_eps=1e-5)
    assert load_transformer(folder).config.rope_theta == 10_000


def test_a_model_of_a_training_that_has_diverged_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ExportError, match=r"norm\S* holds values that are not finite; the training has diverged"):
        load_export(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "text_tokenizer.model"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(ExportError, match=name.replace(".", r"\.")):
        load_export(folder)


def test_missing_tokenizers_and_unknown_card_fields_are_refused(folder: Path, tokenizers: Path) -> None:
    with pytest.raises(ExportError, match="text tokenizer is not at /nowhere"):
        save_again(folder, tokenizers, text_tokenizer="/nowhere")
    with pytest.raises(ExportError, match=r"image tokenizer is not at /nowhere/config\.json"):
        save_again(folder, tokenizers, image_tokenizer="/nowhere")
    found = load_export(folder)
    with pytest.raises(ExportError, match=r"unknown fields \['licence'\]"):
        save_export(folder, found.model, found.format, "a", "b", {"licence": "?"})
