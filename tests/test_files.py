"""Files are whole or absent, and a full disk names the file."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixmodal.config import save_config
from mixmodal.files import read_object, replacing, write_whole
from mixmodal.models.transformer import save_weights
from mixmodal.quickstart.runner import write_json
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.training.checkpoint import save_tensors
from mixmodal.training.metrics import MetricsLog, drop_later

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full")


@dataclass
class Sizes:
    dim: int = 8


def save_text(path: Path) -> None:
    TextTokenizer.save(SimpleNamespace(_model=b"pieces"), path)  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[Path], Any]] = {
    "write_whole": lambda path: write_whole(path, b"new"),
    "config": lambda path: save_config(Sizes(), path),
    "text_tokenizer": save_text,
    "quickstart": lambda path: write_json(path, {"a": 1}),
    "metrics": lambda path: drop_later(path, 1),
}


@needs_full
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    path = tmp_path / "file"
    path.write_text('{"step": 1}\n')
    (tmp_path / "file.part").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == '{"step": 1}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_is_written_waits_for_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    write_whole(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "old")]
    with replacing(path) as part:
        part.write_text("new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "new")]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/file'"):
        write_whole(tmp_path / "nowhere/file", b"new")


@needs_full
def test_a_metrics_line_that_does_not_fit_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    log = MetricsLog.__new__(MetricsLog)
    log._active, log._path = True, tmp_path / "metrics.jsonl"
    log._file = log._path.open("a", encoding="utf-8")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        log.write({"step": 1})
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        log.close()


@pytest.mark.parametrize("save", [save_weights, lambda model, path: save_tensors(model.state_dict(), path)])
def test_weights_that_do_not_fit_name_their_file(
    tmp_path: Path, save: Callable[..., None], no_file_above: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "model.safetensors"
    model = torch.nn.Linear(1000, 1000)
    with pytest.raises(OSError, match=r": '.*model\.safetensors'$") as caught, no_file_above(1_000_000):
        save(model, path)
    assert caught.value.errno in (errno.EFBIG, errno.EIO)


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' + "[" * 200_000, "\xff"])
def test_what_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    """Nor is what Python's own reader can not follow."""
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.json"):
        read_object(tmp_path / "x.json")
