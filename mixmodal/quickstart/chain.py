"""What the chains of the quickstart share: a folder, a recipe, and stages that are done once."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixmodal.config import check_least
from mixmodal.quickstart.recipe import DEEPSPEED, LAUNCHED, Recipe, command_of, config_path
from mixmodal.quickstart.runner import Stage, StageRunner, write_json

ENVIRONMENT = "environment.json"
LINE_EVERY = 0.25
"""Share of the work after which progress is a line where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Trains a small model on the demo pictures, uses it, and writes `report.html` and `summary.json`; or tunes that
    model on tasks, and writes `finetune.html` and `finetune.json` beside them.

    Run again after an interruption, it goes on where it was; stages whose recipe is unchanged are skipped.

    Args:
        out: folder of the run.
        stage: `chain` is all from pictures to a trained model and its report; `finetune`, for which the chain must be
            there, tunes it on edits, questions and captions.
        recipe: folder with YAML files that take the place of the recipe's own, as `pretrain.yaml`. `out/configs` shows
            what there is: copy a file from there and change it; those there are written anew at each start.
        num_processes: processes of the pretraining or the tuning; on a machine with accelerators each takes one.
    """

    out: Path = Path("runs/quickstart")
    stage: Literal["chain", "finetune"] = "chain"
    recipe: Path | None = None
    num_processes: int = 1

    def __post_init__(self) -> None:
        check_least(self, 1, "num_processes")

    @property
    def command(self) -> str:
        """What a person types for this run."""
        own = f" --recipe {self.recipe}" if self.recipe else ""
        processes = f" --num_processes {self.num_processes}" if self.num_processes > 1 else ""
        stage = f" --stage {self.stage}" if self.stage != "chain" else ""
        return f"mixmodal quickstart --out {self.out}{stage}{own}{processes}"


def say(message: str) -> None:
    print(message, flush=True)


class Chain(ABC):
    """The stages of one run and what they share.

    Args:
        config: where the run goes.
        recipe: how each stage works.
    """

    def __init__(self, config: QuickstartConfig, recipe: Recipe) -> None:
        self.config, self.recipe, self.run = config, recipe, config.out
        self.export = self.run / "export"
        self.made: dict[str, Path] = {}
        self.setup_seconds = 0.0
        self.runner = StageRunner(self.run, self._stages())

    @abstractmethod
    def _stages(self) -> list[Stage]:
        """In their order."""

    def _stage(
        self,
        name: str,
        complete: Callable[[], None],
        results: list[str],
        files: Sequence[str],
        inputs: tuple[str, ...] = (),
    ) -> Stage:
        """A stage whose work follows from these files of the recipe; the last of them has its command."""
        settings = {file: self.recipe.settings[file] for file in files}
        if LAUNCHED & set(files):
            settings |= {DEEPSPEED: self.recipe.settings[DEEPSPEED], "num_processes": self.config.num_processes}
        by_hand = command_of(self.run, files[-1], self.config.num_processes) if files else ""
        return Stage(
            name=name,
            complete=complete,
            results=tuple(self.run / result for result in results),
            config=settings,
            inputs=inputs,
            command=by_hand or self.config.command,
        )

    def _launch(self, file: str, folder: str, what: str) -> None:
        """Trains by a file of the recipe through the deepspeed launcher, and notes with what; `folder` must be made.

        Raises:
            ValueError: where the training fails or is stopped.
        """
        from mixmodal import environment
        from mixmodal.quickstart.launch import deepspeed_command, launch

        about = {"commit": environment.commit(), "versions": {**environment.versions(), "device": environment.device()}}
        write_json((self.run / folder).parent / ENVIRONMENT, about)
        arguments = (file, "--config", str(config_path(self.run, file)))
        launch(deepspeed_command(self.config.num_processes, *arguments), self.config.num_processes)
        self._need(folder, what)

    def _need(self, folder: str, what: str) -> None:
        if not (self.run / folder / "config.json").exists():
            raise ValueError(f"{what} stopped before its end; run the quickstart again and it goes on")


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, plain lines elsewhere; gives a function of the numbers of finished and of all things."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(name, total=None)

        shown = 0.0

        def update(done: int, total: int) -> None:
            nonlocal shown
            progress.update(task, completed=done, total=total)
            if not progress.console.is_terminal and (done == total or done / total - shown >= LINE_EVERY):
                shown = done / total
                say(f"      {name}: {done:,} of {total:,}")

        yield update
