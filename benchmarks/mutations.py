"""Breaks the code in twenty places, one at a time, and says which of them the tests notice.

    python benchmarks/mutations.py

Each mutation is one replacement in a copy of the tree, and the tests that are run on it are those of its room, with the
marks of `make test`. One is caught where a test fails. Prints each, and records how many were caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from record import record

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mixmodal", "tests", "configs", "train", "sample", "tokenizers", "benchmarks", "docs", ".ci")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt")


class Mutation(NamedTuple):
    """A text of one file that is replaced, and the tests of its room."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "objectives/loss.py", "tokens.roll(-1, dims=1), target", "tokens.roll(0, dims=1), target", ("objectives",)
    ),
    Mutation("objectives/loss.py", " & (segment_ids[:, 1:] != 0)", "", ("objectives",)),
    Mutation("objectives/causal_masked.py", "weights[0] = 0", "weights[0] = 1", ("objectives",)),
    Mutation(
        "objectives/preference.py",
        "margin, share = chosen - rejected",
        "margin, share = rejected - chosen",
        ("objectives",),
    ),
    Mutation("data/packing.py", "ramp[: stop - start]", "ramp[start:stop]", ("data",)),
    Mutation("data/packing.py", "used + len(sample.ids) > seq_len", "used + len(sample.ids) >= seq_len", ("data",)),
    Mutation("models/attention.py", "value=-direction", "value=direction", ("models",)),
    Mutation("models/attention.py", "heads.float(), heads.shape[-1:]", "heads.float(), heads.shape[-2:]", ("models",)),
    Mutation(
        "document/turns.py",
        "closing = turn.is_answer and any(turn.loss)",
        "closing = any(turn.loss)",
        ("test_turns.py",),
    ),
    Mutation("document/turns.py", "np.concatenate([[False]", "np.concatenate([[True]", ("test_turns.py",)),
    Mutation("sampling/rules.py", "- probabilities >= top_p", ">= top_p", ("inference",)),
    Mutation(
        "sampling/rules.py", "logits / penalty, logits * penalty", "logits * penalty, logits / penalty", ("inference",)
    ),
    Mutation("sampling/guidance.py", "(without_text, image - text)", "(without_text, text - image)", ("inference",)),
    Mutation("sampling/guidance.py", "dim=1).values[:, -1:] * alpha", "dim=1).values[:, -1:]", ("inference",)),
    Mutation(
        "training/optimizer.py",
        "(step + 1) / config.warmup_steps",
        "step / config.warmup_steps",
        ("training/test_optimizer.py",),
    ),
    Mutation(
        "training/trainable.py", "kept[ids.start : ids.stop] = gradient", "kept[ids.start :] = gradient", ("training",)
    ),
    Mutation("retrieval/selection.py", "allowed[rows, place] = False", "pass", ("retrieval",)),
    Mutation("quickstart/scoring.py", "max(found, key=len", "min(found, key=len", ("quickstart",)),
    Mutation("quickstart/demo_tasks.py", "if not before.heldout:", "if True:", ("quickstart",)),
    Mutation("classification/units.py", "digit / 2", "digit / 3", ("classification",)),
)


def try_mutation(mutation: Mutation, folder: Path) -> bool:
    """Whether a test notices."""
    path = folder / "mixmodal" / mutation.file
    text = path.read_text(encoding="utf-8")
    if mutation.old not in text:
        raise ValueError(f"{mutation.file}: {mutation.old!r} is not there any more")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += [f"tests/{tests}" for tests in mutation.tests]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutation.file}: pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return done.returncode == 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in FILES:
            shutil.copy(ROOT / part, folder / part)
        caught: list[bool] = []
        for mutation in MUTATIONS:
            caught.append(try_mutation(mutation, folder))
            print(
                f"{'caught' if caught[-1] else 'MISSED'}  {mutation.file}: {mutation.old!r} -> {mutation.new!r}",
                flush=True,
            )
    record(
        "mutations",
        "caught",
        [sum(caught)],
        f"of {len(caught)}",
        "cpu",
        {"missed": [f"{one.file}: {one.old}" for one, found in zip(MUTATIONS, caught, strict=True) if not found]},
    )
