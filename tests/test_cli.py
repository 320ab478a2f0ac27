"""The console command: quick help, config files with overrides, and one clear line for every mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mixmodal import cli
from mixmodal import config as configs


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Inner.

    Args:
        num_layers: layers.
        kind: which.
    """

    num_layers: int = 2
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}")


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """What the command under test does.

    Args:
        out: folder to write.
        model: the model.
        extra: further keys, any.
        maybe: an optional part.
        lr: peak learning rate.
        limit: most of them.
    """

    out: Path
    model: InnerConfig = field(default_factory=InnerConfig)
    extra: dict[str, int] = field(default_factory=dict)
    maybe: InnerConfig | None = None
    lr: float = 1e-3
    limit: int | None = None

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        if "--bad" in argv:
            raise ValueError("--bad needs a value")
        return ["--lr=5" if argument == "--five" else argument for argument in argv]


def call(*argv: str, function=lambda config: None) -> OuterConfig:
    """The config that `command` passes on."""
    seen = []
    cli.command(OuterConfig, lambda config: (seen.append(config), function(config)), argv, prog="mixmodal test")
    return seen[0]


def failure(capsys: pytest.CaptureFixture[str], *argv: str, function=lambda config: None) -> tuple[int, str]:
    """Exit code and the one line on the error stream."""
    with pytest.raises(SystemExit) as caught:
        call(*argv, function=function)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return int(caught.value.code or 0), lines[0]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_help_imports_no_torch_and_answers_at_once() -> None:
    program = (
        "import sys; from mixmodal.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'huggingface_hub', 'jsonargparse'}\n"
        "assert not heavy & set(sys.modules), 'heavy import'"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 2  # 0.1 s alone; the slack is for a machine that does other things too
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_config_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "out: runs/a\nlr: 3e-4\nmodel: {num_layers: 5, kind: b}\nextra: {image: 3}\n")
    config = call("--config", path, "--model.num_layers", "7")
    assert config == OuterConfig(
        out=Path("runs/a"), lr=3e-4, model=InnerConfig(num_layers=7, kind="b"), extra={"image": 3}
    )


def test_save_config_and_load_config_are_inverse(tmp_path: Path) -> None:
    config = OuterConfig(out=tmp_path, extra={"a": 1}, maybe=InnerConfig(kind="b"), lr=2.5e-05)
    configs.save_config(config, tmp_path / "configs" / "a.yaml")
    assert configs.load_config(OuterConfig, tmp_path / "configs" / "a.yaml") == config


def test_print_config_shows_the_resolved_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call("--out", "x", "--model.num_layers", "9", "--print_config")
    assert not caught.value.code
    assert "num_layers: 9" in capsys.readouterr().out


def test_a_config_type_may_read_its_arguments_itself() -> None:
    assert call("--out", "x", "--five").lr == 5


def test_launcher_rank_argument_is_dropped() -> None:
    assert call("--local_rank=0", "--out", "x").out == Path("x")


def test_hyphens_are_as_good_as_underscores(tmp_path: Path) -> None:
    assert call("--out", "a-b", "--model.num-layers", "7").model.num_layers == 7
    assert call("--out=--model.num-layers", "--model.num-layers=5") == OuterConfig(
        out=Path("--model.num-layers"), model=InnerConfig(num_layers=5)
    )


def test_deepspeed_is_the_trainers_file(tmp_path: Path) -> None:
    from mixmodal.training.image_tokenizer import ImageTokenizerTrainingConfig
    from mixmodal.training.pretrain import PretrainConfig

    required = ["--trainer.run_dir", "r", "--trainer.max_steps", "1", "--trainer.micro_batch_size", "1"]
    for kind, data in (
        (PretrainConfig, ["--data.tokens=d", "--data.seq_len=8"]),
        (ImageTokenizerTrainingConfig, ["--data.train=[d]", "--tokenizer.quantizer.levels=[8,5,5]"]),
    ):
        arguments = [*data, *required]
        for given in (["--deepspeed", "z.json"], ["--deepspeed=z.json"], ["--trainer.deepspeed", "z.json"]):
            assert configs.parse(kind, [*arguments, *given]).trainer.deepspeed == Path("z.json")
        with pytest.raises(configs.UsageError, match=r"--deepspeed and --trainer\.deepspeed are the same option"):
            configs.parse(kind, [*arguments, "--deepspeed", "a.json", "--trainer.deepspeed=b.json"])
    with pytest.raises(configs.UsageError, match="there is no option --deepspeed"):
        configs.parse(OuterConfig, ["--out", "x", "--deepspeed", "z.json"])


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--out", "x", "--model.num_layer", "3"], "no option --model.num_layer; did you mean --model.num_layers?"),
        (["--out", "x", "--num_layers=3"], "no option --num_layers; did you mean --model.num_layers?"),
        (["--out", "x", "--lr", "fast"], "lr: expected float, got fast"),
        (["--out", "x", "--model.kind", "c"], "model.kind: expected one of ['a', 'b'], got c"),
        (["--out", "x", "--maybe.kind", "c"], "error: maybe: kind: expected one of ['a', 'b'], got c"),
        (["--out", "x", "--maybe.num_layers", "0"], "error: num_layers is 0"),
        (["--out", "x", "--limit", "few"], "error: limit: expected int, got few"),
        ([], "required: out"),
        (["--bad"], "--bad needs a value"),
        (["--config", "absent.yaml"], "absent.yaml: No such file"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_key(
    argv: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = failure(capsys, *argv)
    assert code == 2
    assert line.startswith("mixmodal test: error: ")
    assert wanted in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("out: x\nmodle: {num_layers: 3}\n", "there is no key 'modle'; did you mean model?"),
        ("out: x\nmodel: {num_layer: 3}\n", "there is no key 'model.num_layer'; did you mean model.num_layers?"),
        ("out: x\nmaybe: {knd: a}\n", "there is no key 'maybe.knd'; did you mean maybe.kind?"),
        ("- out\n", "it holds a list"),
        ("out: [x\n", "not valid YAML"),
    ],
)
def test_mistakes_in_a_config_file_name_file_and_key(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.yaml", text)
    code, line = failure(capsys, "--config", path)
    assert code == 2
    assert path in line
    assert wanted in line


def test_failures_are_one_line_unless_debugged(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: OuterConfig) -> None:
        raise ValueError("shard a.tar: cut short\nat byte 7")

    assert failure(capsys, "--out", "x", function=fail) == (
        1,
        "mixmodal test: error: shard a.tar: cut short at byte 7",
    )
    with pytest.raises(ValueError, match="cut short"):
        call("--out", "x", "--debug", function=fail)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no-such-model" / "config.json"
    code, line = failure(capsys, "--out", "x", function=lambda config: missing.read_text())
    assert code == 1
    assert line == f"mixmodal test: error: {missing}: No such file or directory"


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrian"])
    assert caught.value.code == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_no_arguments_show_the_overview_as_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_config_and_function(name: str) -> None:
    import importlib

    entry = cli.COMMANDS[name]
    module = importlib.import_module(entry.module)
    keys = dict(configs.config_keys(getattr(module, entry.config)))
    assert keys
    assert callable(getattr(module, entry.function))
    assert configs.build_parser(getattr(module, entry.config), name).format_help()
