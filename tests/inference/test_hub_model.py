"""A model goes to a folder and to the hub, and comes back as it was; nothing here leaves the machine."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from mixmodal import MixedModal
from mixmodal.interop.card import split_front_matter, with_front_matter
from mixmodal.interop.export import EXPORT_FILES, ExportError
from mixmodal.pipeline import hub_model

FILES = [
    "README.md",
    "config.json",
    "image_tokenizer/config.json",
    "image_tokenizer/model.safetensors",
    "model.safetensors",
    "text_tokenizer.model",
]


@pytest.fixture
def model(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, device="cpu")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(split_front_matter((folder / "README.md").read_text())[0])


def same(first: MixedModal, second: MixedModal) -> bool:
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_saved_model_comes_back_with_its_tensors_and_its_samples(model: MixedModal, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # the weights in memory count, not those of the folder
    model.save_pretrained(tmp_path / "new" / "model")
    again = MixedModal.from_pretrained(tmp_path / "new" / "model", device="cpu")
    assert same(again, model)
    options: dict[str, Any] = {"output": "mixed", "seed": 3, "max_new_tokens": 30}
    drawn, drawn_again = (each.generate(["pear"], **options)[0] for each in (model, again))
    assert [part if isinstance(part, str) else part.tobytes() for part in drawn] == [
        part if isinstance(part, str) else part.tobytes() for part in drawn_again
    ]
    assert files(tmp_path / "new" / "model") == FILES
    assert model.folder is not None
    for name in ("text_tokenizer.model", "image_tokenizer/model.safetensors", "image_tokenizer/config.json"):
        assert (model.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_weights_are_saved_in_their_dtype(exported: Path, tmp_path: Path) -> None:
    narrow = MixedModal.from_pretrained(exported, device="cpu", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "model")
    again = MixedModal.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert same(again, narrow)
    assert (tmp_path / "model/model.safetensors").stat().st_size < 0.6 * (exported / "model.safetensors").stat().st_size


def test_a_model_without_a_folder_saves_its_tokenizers(model: MixedModal, tmp_path: Path) -> None:
    MixedModal(model.model, model.codec).save_pretrained(tmp_path / "model")
    again = MixedModal.from_pretrained(tmp_path / "model", device="cpu")
    assert same(again, model)
    assert again.codec.text_tokenizer.sha256 == model.codec.text_tokenizer.sha256
    assert "# A mixmodal model" in (tmp_path / "model" / "README.md").read_text()


def test_the_card_is_kept_and_gets_what_the_hub_asks_for(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [pears]  # mine\n---\n\n# My pears\n")
    MixedModal.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\ntags: [pears]  # mine\n")
    assert card.endswith("---\n\n# My pears\n")
    wanted = {"license": "mit", "tags": ["pears"], "library_name": "mixmodal", "pipeline_tag": "any-to-any"}
    assert front_matter(tmp_path / "model") == wanted
    assert with_front_matter(card) == card


def test_an_exported_card_has_its_front_matter(exported: Path) -> None:
    found = front_matter(exported)
    assert found["library_name"] == "mixmodal"
    assert found["pipeline_tag"] == "any-to-any"
    assert "mixmodal" in found["tags"]
    assert split_front_matter((exported / "README.md").read_text())[1].startswith("\n# A test\n")


def test_a_broken_front_matter_is_named(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    (folder / "README.md").write_text("---\ntags: [pears\n---\n")
    model = MixedModal.from_pretrained(folder, device="cpu")
    with pytest.raises(ExportError, match="front matter is not YAML"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_into_its_own_folder_keeps_the_tokenizers(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    model = MixedModal.from_pretrained(folder, device="cpu")
    model.save_pretrained(folder)
    assert files(folder) == FILES
    assert same(MixedModal.from_pretrained(folder, device="cpu"), model)


@pytest.mark.parametrize("name", [".git", "notes.txt", "config.json", "README.md"])
def test_a_folder_with_other_things_is_not_replaced(model: MixedModal, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(ExportError, match=f"mine holds {name}, which is not of an exported model"):
        model.save_pretrained(folder)
    assert (folder / name).read_text() == "{}"
    model.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / name).write_text((tmp_path / "empty" / "README.md").read_text())
    if name in (".git", "notes.txt"):
        with pytest.raises(ExportError, match=f"holds {name}"):
            model.save_pretrained(tmp_path / "empty")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What an account's uploads would have been; their files are kept under `hub`."""
    found: list[dict[str, Any]] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            found.append({"repo_id": repo_id, "private": private, "token": self.token})
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            found.append({"repo_id": repo_id, **{name: value for name, value in options.items() if value}})
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    return found


def test_push_to_hub_uploads_the_exported_folder(
    model: MixedModal, uploads: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert isinstance(model, ModelHubMixin)
    address = model.push_to_hub("someone/pears", private=True, token="secret", commit_message="Pears", branch="v1")
    assert address == "https://huggingface.co/someone/pears/commit/1"
    made, uploaded = uploads
    assert made == {"repo_id": "someone/pears", "private": True, "token": "secret"}
    assert uploaded == {
        "repo_id": "someone/pears",
        "repo_type": "model",
        "commit_message": "Pears",
        "revision": "v1",
    }
    assert files(tmp_path / "hub") == FILES
    assert "# A test" in (tmp_path / "hub" / "README.md").read_text()
    assert same(MixedModal.from_pretrained(tmp_path / "hub", device="cpu"), model)


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required,\n but none found"),
        HfHubHTTPError.__bases__[0]("[Errno 111] Connection\n refused"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message(
    model: MixedModal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, **options: Any) -> str:
            raise error

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    said = re.escape(" ".join(str(error).split()))
    with pytest.raises(ValueError, match=f"can not be pushed to someone/pears: {said}"):
        model.push_to_hub("someone/pears")


def test_a_hub_id_is_fetched_with_its_options(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda source, **options: wanted.append((source, options)) or exported
    )
    options: dict[str, Any] = {"token": False, "cache_dir": tmp_path, "force_download": True}
    model = MixedModal.from_pretrained("someone/pears", "cpu", torch.bfloat16, 7, revision="v1", **options)
    assert wanted == [("someone/pears", {"revision": "v1", "allow_patterns": EXPORT_FILES, **options})]
    assert model.batch_size == 7
    assert model.model.embedding.weight.dtype == torch.bfloat16
    MixedModal.from_pretrained("someone/pears@v2", "cpu", local_files_only=True, token=None)
    assert wanted[1][1] == {"revision": "v2", "allow_patterns": EXPORT_FILES, "local_files_only": True}
    with pytest.raises(ExportError, match="someone/pears@v2 names a revision, and so does the option revision v1"):
        MixedModal.from_pretrained("someone/pears@v2", revision="v1")


def test_local_files_only_takes_what_was_fetched_before(exported: Path, tmp_path: Path) -> None:
    kept = tmp_path / "models--someone--pears"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(exported, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    options: dict[str, Any] = {"device": "cpu", "cache_dir": tmp_path, "local_files_only": True}
    model = MixedModal.from_pretrained("someone/pears", **options)
    assert model.folder == kept / "snapshots" / commit
    assert same(model, MixedModal.from_pretrained(exported, device="cpu"))
    with pytest.raises(ExportError, match="no folder someone/plums, and the Hugging Face hub does not give it"):
        MixedModal.from_pretrained("someone/plums", **options)


@pytest.mark.parametrize(
    "options", [{"revision": "v1"}, {"force_download": True}, {"cache_dir": "x"}, {"token": False}]
)
def test_options_that_can_not_act_on_a_folder_are_named(exported: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=f"{next(iter(options))} can not act on the local folder"):
        MixedModal.from_pretrained(exported, **options)
    assert MixedModal.from_pretrained(exported, "cpu", local_files_only=True, revision=None, token=None)


def test_the_mixin_can_not_write_a_config_of_its_own(model: MixedModal, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config and model_card_kwargs can not act"):
        model.save_pretrained(tmp_path / "model", config={})  # type: ignore[arg-type]


def test_without_the_library_a_model_is_saved_but_not_pushed(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("hub_model_alone", hub_model.__file__)
    assert spec
    assert spec.loader
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)

    class Alone(alone.HubModel):
        def __init__(self, model: MixedModal) -> None:
            self.model, self.codec, self.format, self.folder = model.model, model.codec, model.format, model.folder

    loaded = MixedModal.from_pretrained(exported, device="cpu")
    model = Alone(loaded)
    model.save_pretrained(tmp_path / "model")
    assert same(MixedModal.from_pretrained(tmp_path / "model", device="cpu"), loaded)
    with pytest.raises(ValueError, match="to push a model to someone/pears, install huggingface_hub"):
        model.push_to_hub("someone/pears")
