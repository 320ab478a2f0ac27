"""What README.md, docs/ and the comments of configs/ show: commands, and blocks of Python and of data."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from mixmodal.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROGRAMS = ("mixmodal", "python", "deepspeed", "torchrun", "make", "pip", "docker")
LAUNCHER_VALUES = ("--num_gpus", "--hostfile", "--node_rank", "--master_addr", "--master_port", "--nproc_per_node")
"""Options of launchers that stand before the script and take a value; DeepSpeed and torchrun read them."""


class Shown(NamedTuple):
    """A command on a page.

    Args:
        page: path from the top.
        line: of it, from 1 on.
        words: without variables set before it.
        variables: these, `NAME=VALUE`.
        in_text: whether it stands between backticks in the text, and not in a block.
    """

    page: str
    line: int
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()
    in_text: bool = False

    @property
    def text(self) -> str:
        return shlex.join(self.words)


class Block(NamedTuple):
    """A fenced block of a page: the page, the line behind its fence, its language and its text."""

    page: str
    line: int
    language: str
    text: str


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


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: one.start(2)].count("\n") + 1, one[1], one[2]) for one in found]


def split_variables(code: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Variables set before a command, and its words; None for what is no command."""
    if code.partition(" ")[0].partition("=")[0] not in (*PROGRAMS, "DS_ACCELERATOR"):
        return None
    words = shlex.split(code, comments=True)
    count = next((number for number, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return (tuple(words[:count]), tuple(words[count:])) if len(words) > count + 1 else None


def words_of(code: str) -> tuple[str, ...] | None:
    """The words of a command line without variables set before it; None for what is none."""
    found = split_variables(code)
    return found and found[1]


@cache
def commands_of(page: str) -> tuple[Shown, ...]:
    """Those of a page or config, each once, in order; those of running text where they have options or a script."""
    path = ROOT / page
    found: dict[tuple[str, ...], Shown] = {}
    lines = [(number, code, False) for number, code in code_lines(path)]
    lines += [(number, code, True) for number, code in spans(path)] if path.suffix == ".md" else []
    for number, line, in_text in lines:
        for code in line.split("; ") if in_text else [line]:
            variables, words = split_variables(code) or ((), ())
            if words and not (in_text and words[0] != "mixmodal" and len(words) < 3):
                found.setdefault(words, Shown(page, number, words, variables, in_text))
    return tuple(sorted(found.values(), key=lambda shown: shown.line))


def names_of_pages() -> list[str]:
    """All pages and configs, as paths from the top."""
    return [path.relative_to(ROOT).as_posix() for path in (*PAGES, *CONFIGS)]


@cache
def commands() -> list[Shown]:
    """All of them, each once."""
    found: dict[tuple[str, ...], Shown] = {}
    for page in names_of_pages():
        for shown in commands_of(page):
            found.setdefault(shown.words, shown)
    return [*found.values()]


def script_of(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The script that a launcher or Python runs, and its arguments."""
    rest = [*words[1:]]
    while rest and rest[0].startswith("--"):
        rest = rest[2:] if rest[0] in LAUNCHER_VALUES else rest[1:]
    script = ROOT / rest[0]
    assert script.is_file(), f"there is no script {rest[0]}"
    return script, rest[1:]


def known_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The subcommand that a command line comes to, and its arguments; None for `make`, `pip` and other scripts."""
    program, *rest = words
    if program == "mixmodal":
        return (rest[0], rest[1:]) if rest[0] in COMMANDS else pytest.fail(f"there is no command {rest[0]}")
    script, rest = script_of(words)
    if script.parent.name not in ("tokenizers", "train", "sample"):
        return None
    names = {name.name for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)
             for name in node.names}  # fmt: skip
    (found,) = [command for command, entry in COMMANDS.items() if {entry.config, entry.function} <= names]
    return found, rest
