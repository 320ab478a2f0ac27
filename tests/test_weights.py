"""Foreign weights are read without running code, and only from where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixmodal.weights import read_weights

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
        ("x.ckpt", b"not a checkpoint", "x.ckpt"),
        ("x.ckpt", b"", "x.ckpt is not a whole file of torch.save"),
        ("x.safetensors.index.json", b"{", "not the index"),
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
