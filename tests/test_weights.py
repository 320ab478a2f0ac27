"""Foreign weights are read without running code, and only from where they should be."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixmodal import weights
from mixmodal.weights import read_weights, save_tensors, write_weights

A, B = torch.arange(3.0), torch.ones(2, 2)


class Code:
    """What a pickle can not hold without code."""


@pytest.mark.parametrize("container", ["state_dict", "model", "ema", "module", None])
def test_weights_are_found_in_their_container(container: str | None, tmp_path: Path) -> None:
    state = {"a": A, "b": B}
    torch.save({container: state, "step": 3} if container else state, tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert set(found) == {"a", "b"}
    assert torch.equal(found["a"], A)


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    torch.save({"model": {"a": A}, "ema": {"a": A + 1}, "optimizer": {}}, tmp_path / "x.pt")
    assert torch.equal(read_weights(tmp_path / "x.pt")["a"], A + 1)


def test_a_folder_and_shards_are_read(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    found = read_weights(tmp_path)
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert torch.equal(found["b"], B)
    (tmp_path / names["b"]).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds model-00001-of-00002.safetensors, and no index of the shards"):
        read_weights(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "x.pkl", "..", ""])
def test_an_index_can_not_lead_out_of_its_folder(shard: str, tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="same folder"):
        read_weights(tmp_path / "in")


def test_a_pickle_that_needs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": A}, "callbacks": Code()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt can not be read without running code") as caught:
        read_weights(tmp_path / "x.ckpt")
    assert "save its tensors alone" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{}", "not a whole safetensors file"),
        ("x.ckpt", b"not a checkpoint", "x.ckpt is no file of weights: neither of torch.save nor named .safetensors"),
        ("x.ckpt", b"", "x.ckpt is empty"),
        ("x.safetensors", b"", "x.safetensors is empty"),
        ("x.ckpt", b"PK\x03\x04 and no more", r"x.ckpt is not a whole file of torch.save \([^.]*\)$"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1", "x.safetensors is a pointer of Git LFS"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1", "pytorch_model.bin is a pointer of Git"),
        ("x.safetensors.index.json", b"{", "not the index"),
        ("x.safetensors.index.json", b'{"weight_map": ' + b"[" * 200_000, "not the index"),
        ("x.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        ("x.safetensors.index.json", b'{"weight_map": [1]}', "not the index"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path / name)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(1000)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x\.pt is not a whole file of torch.save"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{"a": 1}, [A], A, {"state_dict": {}}])
def test_a_file_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds no named tensors"):
        read_weights(tmp_path / "x.pt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no checkpoint of a known name \(model.safetensors, "):
        read_weights(tmp_path)


def test_broken_pickles_give_one_kind_of_error(tmp_path: Path) -> None:
    """Whatever byte is wrong, in the new format and in that before torch 1.6."""
    rng = random.Random(0)
    for is_zip in (True, False):
        torch.save({"a": A, "b": B}, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
        whole = (tmp_path / "whole.pt").read_bytes()
        for number in range(100):
            changed = bytearray(whole)
            changed[rng.randrange(len(changed))] = rng.randrange(256)
            path = tmp_path / f"{number}-{is_zip}.pt"
            path.write_bytes(changed)
            with contextlib.suppress(ValueError):
                found = read_weights(path)
                assert [found[name].shape for name in found]


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_that_are_stored_once_or_as_views_are_read_alone(is_zip: bool, tmp_path: Path) -> None:
    """A tied output, a stretch of a larger tensor, and one in another order of memory can all be written again."""
    state = {"a": B, "tied": B, "part": torch.arange(1000.0)[3:5], "turned": torch.arange(6.0).view(2, 3).T}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    found = read_weights(tmp_path / "x.pt")
    write_weights(tmp_path, ((name, found[name]) for name in found))
    assert (tmp_path / "model.safetensors").stat().st_size < 1000
    again = read_weights(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    again["a"].zero_()
    assert torch.equal(again["a"], B)


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(1 << 20, 1 << 20), torch.eye(3).to_sparse()])
def test_a_tensor_larger_than_its_file_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """It would take 4 TB."""
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: tensor a is sparse, or an expanded view"):
        read_weights(tmp_path / "x.pt")["a"]


def test_a_picture_tokenizer_beside_a_model_is_not_taken_for_it(tmp_path: Path) -> None:
    torch.save({"picture": A}, tmp_path / "vqgan.ckpt")
    assert list(read_weights(tmp_path)) == ["picture"]
    torch.save({"model": A}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"model": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert list(read_weights(tmp_path)) == ["model"]


def test_files_are_closed_when_enough_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a mapped file counts as memory while it is open."""
    monkeypatch.setattr(weights, "READ_BYTES", 10)
    opened: list[Path] = []
    open_safetensors = weights.open_safetensors
    monkeypatch.setattr(weights, "open_safetensors", lambda path: opened.append(path) or open_safetensors(path))
    save_file({"a": A, "b": B}, tmp_path / "x.safetensors")
    found = read_weights(tmp_path / "x.safetensors")
    assert [torch.equal(found["a"], A) for _ in range(4)] == [True] * 4
    assert len(opened) == 4
    monkeypatch.setattr(weights, "READ_BYTES", 100)
    opened.clear()
    found = read_weights(tmp_path / "x.safetensors", num_beside=10)
    assert [torch.equal(found["a"], A) for _ in range(4)] == [True] * 4
    assert len(opened) == 4  # ten files share what may be in memory


def test_whoever_may_read_other_files_may_read_weights(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_tensors({"a": A}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_shards_have_at_most_so_many_bytes_unless_one_tensor_has_more(tmp_path: Path) -> None:
    tensors = {"large": torch.rand(100), "a": torch.rand(10), "b": torch.rand(10), "c": torch.rand(10)}
    total = write_weights(tmp_path, tensors.items(), shard_bytes=80)
    assert total == 4 * 130
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))
    assert index == {
        "metadata": {"total_size": total},
        "weight_map": {"large": first, "a": second, "b": second, "c": third},
    }
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [first, second, third]
    assert not list(tmp_path.glob("*.partial"))
    found = read_weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found.shape("b") == (10,)
    assert found.path("c") == tmp_path / third
