"""What the package itself is like: how long it takes to start, how much it weighs, and how much of it the tests run.

    python benchmarks/house.py start       # --help, import, the wheel
    python benchmarks/house.py coverage    # make test under coverage.py: about 15 minutes
    python benchmarks/house.py duplicates  # six lines or more that stand twice, by pylint (pip install pylint)

The share of lines is that of the tests' own process: lines which only processes run that tests start, such as those of
several ranks, count as not run. Lines stand twice where they are the same but for white space; imports, signatures,
comments and docstrings are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 7
LINES = 6
CODE = ("mixmodal", "train", "sample", "tokenizers", "benchmarks", "tests")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def measure_start() -> None:
    """Each command once before it is timed, so that files are in memory."""
    script = str(Path(sys.executable).parent / "mixmodal")
    commands = {
        "mixmodal --help": [script, "--help"],
        "mixmodal pretrain --help": [script, "pretrain", "--help"],
        "import mixmodal": [sys.executable, "-c", "import mixmodal"],
        "python alone": [sys.executable, "-c", ""],
    }
    for name, command in commands.items():
        seconds(command)
        record("house", name, [seconds(command) for _ in range(REPEATS)], "s", "cpu", {})
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, "."]
        subprocess.run(build, cwd=ROOT, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        record("house", "wheel", [wheel.stat().st_size / 1e6], "MB", "cpu", {})


def measure_coverage() -> None:
    """The tests of `make test`; the line says whether all of them pass."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data-file", str(Path(folder) / "data")]
        coverage, start = [sys.executable, "-m", "coverage"], time.perf_counter()
        tests = subprocess.run([*coverage, "run", *data, "--source", "mixmodal", "-m", "pytest", "-q"], cwd=ROOT)
        took = time.perf_counter() - start
        report = Path(folder) / "report.json"
        subprocess.run([*coverage, "json", *data, "-q", "-o", str(report)], cwd=ROOT, check=True)
        found = json.loads(report.read_text())
    lines = {"lines": found["totals"]["num_statements"], "seconds under coverage": round(took)}
    lines["all tests pass"] = tests.returncode == 0
    record("house", "lines that make test runs", [found["totals"]["percent_covered"] / 100], "share", "cpu", lines)
    least = sorted(found["files"].items(), key=lambda item: item[1]["summary"]["percent_covered"])
    for name, file in least[:15]:
        print(f"{file['summary']['percent_covered']:6.1f} %  {name}")


def measure_duplicates() -> None:
    """Prints each run."""
    options = ["ignore-imports", "ignore-signatures", "ignore-docstrings", "ignore-comments"]
    command = [sys.executable, "-m", "pylint", "--disable=all", "--enable=duplicate-code", "--output-format=json"]
    command += [f"--min-similarity-lines={LINES}", *(f"--{name}=y" for name in options), "--recursive=y", *CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not done.stdout.startswith("["):
        sys.exit(f"pylint: {done.stderr[-500:]}")
    found = [one["message"] for one in json.loads(done.stdout) if one["symbol"] == "duplicate-code"]
    print("\n\n".join(found))
    record("house", f"runs of {LINES} lines or more that stand twice", [len(found)], "", "cpu", {"in": CODE})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "coverage", "duplicates"))
    measures = {"start": measure_start, "coverage": measure_coverage, "duplicates": measure_duplicates}
    measures[parser.parse_args().what]()
