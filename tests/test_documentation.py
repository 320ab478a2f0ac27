"""Every command that README.md, docs/ and the comments of configs/ show, against the parsers that would read it."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mixmodal import config as config_module
from mixmodal.cli import COMMANDS
from mixmodal.config import UsageError, build_parser, parse

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("mixmodal", "python", "deepspeed", "torchrun", "make", "pip", "docker")
STAND_INS = {
    "pretrain": "configs/train/tiny.yaml",
    "finetune": "configs/train/finetune_chameleon.yaml",
    "train-image-tokenizer": "configs/tokenizers/demo_32px_16.yaml",
    "prepare": "configs/data/folder.yaml",
    "plan": "configs/train/tiny.yaml",
    "evaluate": "configs/sample/evaluate.yaml",
}
"""What is read where a page says `--config FILE`, a file of the reader's own."""
LAUNCHER_VALUES = ("--num_gpus", "--hostfile", "--node_rank", "--master_addr", "--master_port", "--nproc_per_node")
"""Options of launchers that stand before the script and take a value; DeepSpeed and torchrun read them."""
EXCEPTIONS = {
    "docker build -t mixmodal .": "no docker here: the page says that nobody has run it",
    "docker run --gpus all --ipc host -v '$PWD:/work' mixmodal deepspeed --num_gpus 8 "
    "/opt/mixmodal/train/pretrain.py --config FILE": "likewise",
    "mixmodal COMMAND --help": "COMMAND is any of them",
    "python -m mixmodal.pipeline.lm_eval_model --model mixmodal --model_args pretrained=runs/NAME/export "
    "--tasks piqa --batch_size 64": "lm_eval's own options",
}
"""Commands that are not held to a parser, and why."""


class Shown(NamedTuple):
    """A command on a page: where, and its words."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of fenced and indented blocks of a page, or of the comments of a YAML file, with continued ones joined."""
    fenced, held, begun = False, "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if path.suffix == ".yaml":
            code = line[1:] if line.startswith("#") else None
        elif line.startswith("```"):
            fenced, code = not fenced, None
        else:
            code = line if fenced or line.startswith("    ") else None
        if code is None:
            continue
        begun, held = (begun if held else number), f"{held} {code.strip()}" if held else code.strip()
        if held.endswith("\\"):
            held = held[:-1].rstrip()
            continue
        yield begun, held
        held = ""


def spans(path: Path) -> Iterator[tuple[int, str]]:
    """What stands between backticks in the text of a page."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fenced ^= line.startswith("```")
        if not fenced:
            yield from ((number, code) for code in re.findall(r"`([^`]+)`", line))


def words_of(code: str) -> tuple[str, ...] | None:
    """The words of a command line without variables set before it; None for what is none."""
    if code.partition(" ")[0].partition("=")[0] not in (*PROGRAMS, "DS_ACCELERATOR"):
        return None
    words = shlex.split(code, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return tuple(words) if len(words) > 1 else None


@cache
def commands() -> list[Shown]:
    """All of them, each once; those of running text where they have options or a script."""
    found: dict[tuple[str, ...], Shown] = {}
    for path in [*PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))]:
        name = path.relative_to(ROOT).as_posix()
        lines = [(number, code, False) for number, code in code_lines(path)]
        lines += [(number, code, True) for number, code in spans(path)] if path.suffix == ".md" else []
        for number, code, in_text in lines:
            words = words_of(code)
            if words and not (in_text and words[0] != "mixmodal" and len(words) < 3):
                found.setdefault(words, Shown(name, number, words))
    return [*found.values()]


def known_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The subcommand that a command line comes to, and its arguments; None for `make`, `pip` and other scripts."""
    program, *rest = words
    if program == "mixmodal":
        return (rest[0], rest[1:]) if rest[0] in COMMANDS else pytest.fail(f"there is no command {rest[0]}")
    while rest and rest[0].startswith("--"):
        rest = rest[2:] if rest[0] in LAUNCHER_VALUES else rest[1:]
    script = ROOT / rest[0]
    assert script.is_file(), f"there is no script {rest[0]}"
    if script.parent.name not in ("tokenizers", "train", "sample"):
        return None
    names = {name.name for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)
             for name in node.names}  # fmt: skip
    (found,) = [command for command, entry in COMMANDS.items() if {entry.config, entry.function} <= names]
    return found, rest[1:]


def stand_in(command: str, arguments: Sequence[str]) -> list[str]:
    """Arguments in which a file or value of the reader's own is one that can be read."""
    found: list[str] = []
    for argument in arguments:
        value = bool(found) and found[-1].startswith("--")
        if argument in ("--help", "--print_config") or (argument == "..." and not value):
            continue
        own = value and found[-1] == "--config" and not argument.startswith("configs/")
        found.append(STAND_INS.get(command, argument) if own else argument)
    return found


def check(command: str, arguments: Sequence[str]) -> None:
    """Parses them as the command would; keys that a page leaves out and the config needs are filled in.

    Raises:
        UsageError: for a file of configs/ that is not there, an unknown key, or a value of another type.
    """
    entry = COMMANDS[command]
    config: Any = getattr(importlib.import_module(entry.module), entry.config)
    arguments = stand_in(command, arguments)
    if not arguments:
        return  # a command by its name alone, or its help
    if "--config" not in arguments and "--corpora" not in arguments and command in STAND_INS:
        arguments = ["--config", STAND_INS[command], *arguments]
    given = {argument[2:].partition("=")[0].partition(".")[0].replace("-", "_") for argument in arguments}
    if "--config" in arguments:
        given |= {*yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text()), "training"}
    for field in fields(config):
        if field.default is field.default_factory is MISSING and field.name not in given:
            arguments += [f"--{field.name}", "[given]" if "tuple" in str(field.type) else "given"]
    parse(config, arguments)


def ids(shown: Shown) -> str:
    return f"{shown.page}:{shown.line}"


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths as the pages give them; a parser is built once for each type, which takes longer than to use it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(config_module, "build_parser", parser_of)


@cache
def parser_of(config: type[Any], prog: str) -> Any:
    return build_parser(config, prog)


def test_the_commands_are_found() -> None:
    assert len(commands()) > 120
    assert set(EXCEPTIONS) <= {shown.text for shown in commands()}
    assert {shown.words[0] for shown in commands()} == set(PROGRAMS)


@pytest.mark.parametrize("shown", commands(), ids=ids)
def test_every_command_is_one(shown: Shown) -> None:
    program, *rest = shown.words
    if shown.text in EXCEPTIONS:
        return
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if re.fullmatch("[a-z]+", word)} <= set(targets)
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        wanted = [name for word in rest for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")]
        assert set(wanted) <= set(extras)
    elif (known := known_command(shown.words)) is not None:
        check(*known)
    else:
        script = next(ROOT / word for word in rest if word.endswith(".py"))
        options = [word for word in rest[1:] if word.startswith("--")]
        assert not [option for option in options if f'"{option}"' not in script.read_text()]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mixmodal generate --model DIR --promt TEXT", "no option --promt; did you mean --prompt"),
        ("mixmodal pretrain --config configs/train/gone.yaml", "configs/train/gone.yaml"),
        ("deepspeed --num_gpus 8 train/pretrain.py --config FILE --trainer.max_steps many", "max_steps"),
        ("python train/gone.py --config FILE", "there is no script train/gone.py"),
        ("mixmodal draw --model DIR", "there is no command draw"),
    ],
)
def test_a_wrong_command_is_told(line: str, said: str) -> None:
    words = words_of(line)
    assert words is not None
    with pytest.raises((UsageError, OSError, AssertionError, pytest.fail.Exception), match=said):
        check(*known_command(words))  # type: ignore[misc]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), f"{path.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name}: {link}"


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav:
        (value,) = entry.values()
        yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_site_has_every_page_of_the_folder_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_lists_the_options_of_every_command() -> None:
    page = (ROOT / "docs" / "api_configs.md").read_text()
    shown = set(re.findall(r'heading: "mixmodal ([\w-]+): (\w+)"', page))
    assert shown == {(name, entry.config) for name, entry in COMMANDS.items()}


def test_the_page_of_configs_lists_every_file() -> None:
    page = (ROOT / "docs" / "configs.md").read_text()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.*")}
    listed = set()
    for folder, names in re.findall(r"^\| `(configs/\w+/)` \| (.*?) \|", page, re.MULTILINE):
        listed |= {folder + name for name in re.findall(r"`([\w.-]+)`", names)}
    assert listed == files


def test_the_readme_names_tests_that_are_there() -> None:
    page = (ROOT / "README.md").read_text()
    table = page.partition("## Beside other projects")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`", row)
        folder = Path(named[0]).parent
        paths = [ROOT / (name if "/" in name else folder / name) for name in named]
        assert paths
        assert not [path for path in paths if not path.is_file()], row
