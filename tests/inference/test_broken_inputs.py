"""What the commands say of broken inputs: one line that names the file and the key, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PIL
from safetensors.torch import load_file, save_file

from mixmodal.cli import main

WITHOUT = "blocks.0.attention.out.weight"
GENERATE = ["generate", "--model", "MODEL", "--out", "out", "--prompt", "a"]
CLASSIFY = ["classify", "--model", "MODEL", "--data", "pictures", "--classes", "classes.txt", "--out", "out"]
MATCH = ["match", "--model", "MODEL", "--out", "out", "--task"]
PREFER = ["prefer", "--model", "MODEL", "--out", "out", "--judge", "likelihood", "--prompts"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path) -> Path:
    """The folder that commands are typed in, with `pictures` and some files that are no good."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("red\ta red apple\ngreen\nblue\n")
    (tmp_path / "binary").write_bytes(b'{"a": "\xff"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "list.yaml").write_text("- 1\n")
    return tmp_path


def tell(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command writes of its error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (1, 2)
    *_, last = capsys.readouterr().err.splitlines()
    assert "--debug" not in last
    return last.partition(": error: ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        ([*GENERATE, "--num", "0"], "num is 0; it must be at least 1"),
        ([*GENERATE, "--best_of", "0"], "best_of is 0; it must be at least 1"),
        ([*GENERATE, "--max_new_tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        ([*GENERATE, "--seed", "-1"], "seed is -1; it must be at least 0"),
        ([*GENERATE, "--out", "file"], "out is file, which is a file; give a folder for the samples"),
        ([*GENERATE, "--config"], "--config needs a value, a YAML file"),
        ([*GENERATE, "--config", "list.yaml"], "--config list.yaml: it holds a list; keys and values are expected"),
        ([*GENERATE[:-1], " "], "the prompt: there is nothing but white space"),
        ([*CLASSIFY, "--seed", "-1"], "seed is -1; it must be at least 0"),
        ([*CLASSIFY, "--max_skipped_share", "2"], "max_skipped_share is 2.0; it must lie in 0 .. 1"),
        ([*MATCH, "binary"], "task: binary is not UTF-8"),
        ([*PREFER, "none.jsonl", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["serve", "--model", "MODEL", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
    ],
)
def test_what_can_not_be_done_is_said_before_a_model_is_loaded(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tell(arguments, capsys).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--device", "nonsense"], "device is 'nonsense', which torch does not have here; it has cpu"),
        ([*GENERATE, "--device", "cuda:99"], "device is 'cuda:99', which torch"),
        ([*CLASSIFY, "--shift", "empty"], "shift: empty holds neither pictures"),
        ([*PREFER, "none.jsonl"], "none.jsonl: there is no conversation whose last answer is one picture alone"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    arguments: list[str], message: str, exported: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tell([str(exported) if one == "MODEL" else one for one in arguments], capsys)
    assert found.startswith(message)


def spoil(section: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[section] = {**config[section], key: value} if key else value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in weights.items() if name != WITHOUT}, folder / "model.safetensors")


EXPORT = ["export", "MODEL", "out", "--to", "transformers"]


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        (GENERATE, spoil("model", "dim", "x"), "broken/config.json: model.dim is 'x'; int is needed"),
        (EXPORT, spoil("model", "qk_norm", 1), "broken/config.json: model.qk_norm is 1; bool is needed"),
        (GENERATE, spoil("sequence_format", "", {"name": "no"}), "broken/config.json: section 'sequence_format' needs"),
        (GENERATE, drop_a_tensor, f"broken: tensor {WITHOUT} is missing"),
        (EXPORT, drop_a_tensor, f"broken: tensor {WITHOUT} is missing"),
    ],
)
def test_a_broken_model_is_named_with_the_key(
    command: list[str],
    change: Callable[[Path], None],
    message: str,
    exported: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(exported, place / "broken")
    change(place / "broken")
    assert tell(["broken" if one == "MODEL" else one for one in command], capsys).startswith(message)


def test_a_picture_of_the_command_line_that_is_none_is_named_with_its_part(
    exported: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PIL.new("RGB", (16, 16)).save(place / "a.png")
    start = ["generate", "--model", str(exported), "--out", "out", "--output", "infill", "--image", "a.png"]
    assert tell([*start, "--region", "file"], capsys).startswith("part 0 of the prompt (file): not a picture")
    message = "part 0 of the prompt: the box (0, 0, 99, 9) does not lie in the picture of 16x16 pixels"
    assert tell([*start, "--box", "0,0,99,9"], capsys) == message
