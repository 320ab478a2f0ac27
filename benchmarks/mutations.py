"""Breaks the code in twenty places, one at a time, and says which of them the tests notice.

    python benchmarks/mutations.py              # twenty places chosen by hand, where a mistake would be quiet
    python benchmarks/mutations.py --random 20  # as many that a seed chooses in the whole package

Each mutation is one replacement in a copy of the tree, and the tests that are run on it are those of its room, with the
marks of `make test`. One is caught where a test fails or does not end. Prints each, and records how many were caught.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from record import record

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mixmodal", "tests", "configs", "train", "sample", "tokenizers", "benchmarks", "docs", ".ci")
TIMEOUT = 1200
"""Seconds after which tests of a room count as not ending."""
TESTS = {
    "document": ("test_document.py", "test_turns.py", "test_lumina_format.py"),
    "pipeline": ("inference", "evaluation"),
    "sampling": ("inference",),
    "interop": ("interop", "inference/test_export.py"),
    "mixmodal": ("test_cli.py", "test_files.py", "test_ragged.py", "test_vocabulary.py", "test_weights.py"),
}
"""Of rooms whose tests do not lie in a folder of the same name; the last are those of files outside any room."""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
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
    Mutation("data/packing.py", "used + len(document.ids) > seq_len", "used + len(document.ids) >= seq_len", ("data",)),
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
    Mutation("evaluation/captioning.py", "max(found, key=len", "min(found, key=len", ("evaluation",)),
    Mutation("quickstart/demo_tasks.py", "if not before.heldout:", "if True:", ("quickstart",)),
    Mutation("classification/units.py", "digit / 2", "digit / 3", ("classification",)),
)


def random_mutations(count: int, seed: int) -> list[Mutation]:
    """Operators of the package that become others; messages of errors, annotations and assertions are left out."""
    found = [one for path in sorted((ROOT / "mixmodal").rglob("*.py")) for one in mutations_of(path)]
    return random.Random(seed).sample(found, count)


def mutations_of(path: Path) -> Iterator[Mutation]:
    """One for each operator that can be swapped, by the line that it stands in where no other line is the same."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT / "mixmodal")
    room = name.parts[0] if len(name.parts) > 1 else "mixmodal"
    for node in acting(ast.parse(text)):
        segment = ast.get_source_segment(text, node)
        swapped = copy.deepcopy(node)
        if isinstance(swapped, ast.Compare):
            swapped.ops[0] = swap(swapped.ops[0])
        elif isinstance(swapped, (ast.BinOp, ast.BoolOp)):
            swapped.op = swap(swapped.op)
        if segment and text.count(segment) == 1:
            yield Mutation(name.as_posix(), segment, f"({ast.unparse(swapped)})", TESTS.get(room, (room,)))


def acting(node: ast.AST) -> Iterator[ast.AST]:
    """Comparisons and operations that a run comes to."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return
    operators = node.ops if isinstance(node, ast.Compare) else [getattr(node, "op", None)]
    if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp)) and type(operators[0]) in SWAPPED and not is_path(node):
        yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from acting(child)


def is_path(node: ast.AST) -> bool:
    """Whether a quotient is of a folder and a name, which fails in any test that comes to it."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return False
    name = ast.unparse(node.right)
    return name.startswith(("'", '"', "f'", 'f"')) or name.isupper()


def swap(operator: ast.AST) -> ast.AST:
    return SWAPPED[type(operator)]()


def try_mutation(mutation: Mutation, folder: Path) -> bool:
    """Whether a test notices."""
    path = folder / "mixmodal" / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += [f"tests/{tests}" for tests in mutation.tests]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1, 2, 4):  # 2 and 4: what can not be imported
        raise RuntimeError(f"{mutation.file}: pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return done.returncode != 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, help="number of mutations that the seed chooses")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = random_mutations(arguments.random, arguments.seed) if arguments.random else MUTATIONS
    if gone := [one for one in chosen if one.old not in (ROOT / "mixmodal" / one.file).read_text(encoding="utf-8")]:
        raise SystemExit(f"{gone[0].file}: {gone[0].old!r} is not there any more")
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in FILES:
            shutil.copy(ROOT / part, folder / part)
        for mutation in chosen:
            caught, what = try_mutation(mutation, folder), f"{mutation.file}: {mutation.old!r} -> {mutation.new!r}"
            missed += [] if caught else [what]
            print(f"{'caught' if caught else 'MISSED'}  {what}", flush=True)
    subject = f"caught of {len(chosen)} " + (f"at random, seed {arguments.seed}" if arguments.random else "by hand")
    record("mutations", subject, [len(chosen) - len(missed)], "", "cpu", {"missed": missed})
