"""What the package costs before it does anything, and what its tests hold: start-up, import, size, coverage.

    python benchmarks/measure_package.py [--coverage coverage.json] [--mutations mutations.jsonl]
        [--duplicates duplicates.jsonl]

`coverage.json` is of the fast tests, which are run by hand as they take minutes (`pip install pytest-cov`):

    python -m pytest --cov=mixmodal --cov-report=json

`mutations.jsonl` says of each place that was broken by hand whether the tests noticed, a JSON object a line with the
keys `file`, `change`, `caught` (true or false) and `by` (the test that did). `duplicates.jsonl` says of each run of six
lines or more that stands twice where (`places`) and why (`reason`, empty where there is none).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from record import record

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = "package"
HELP = "from mixmodal.cli import main; main(['--help'])"


def seconds(program: str, repeats: int) -> list[float]:
    """Of fresh processes of Python; the first, which reads from disk, is left out."""
    found: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return found[1:]


def installed_bytes(folder: Path) -> int:
    """Of the files of the wheel, unpacked; it is built from a copy, as setuptools writes beside its sources."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "mixmodal", folder / "mixmodal", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        return sum(file.file_size for file in files.infolist())


def covered(report: Path) -> float:
    """Percent of the lines."""
    return float(json.loads(report.read_text())["totals"]["percent_covered"])


def read_findings(path: Path, keys: tuple[str, ...]) -> list[dict[str, object]]:
    """What was found by hand, a JSON object a line.

    Raises:
        SystemExit: a line has other keys.
    """
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if wrong := [one for one in found if {*one} != {*keys}]:
        raise SystemExit(f"{path}: a line has the keys {', '.join(keys)}: {wrong[0]}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--coverage", type=Path, help="JSON report of coverage.py")
    parser.add_argument("--mutations", type=Path, help="JSON lines of places that were broken by hand")
    parser.add_argument("--duplicates", type=Path, help="JSON lines of runs that stand twice")
    arguments = parser.parse_args()
    record(BENCHMARK, "mixmodal --help", seconds(HELP, arguments.repeats), "s", "cpu", {})
    record(BENCHMARK, "import mixmodal", seconds("import mixmodal", arguments.repeats), "s", "cpu", {})
    with tempfile.TemporaryDirectory() as name:
        record(BENCHMARK, "the wheel, installed", [installed_bytes(Path(name)) / 1e6], "MB", "cpu", {})
    if arguments.coverage is not None:
        record(BENCHMARK, "lines that the fast tests run", [covered(arguments.coverage)], "%", "cpu", {})
    if arguments.mutations is not None:
        trials = read_findings(arguments.mutations, ("file", "change", "caught", "by"))
        number = sum(one["caught"] is True for one in trials)
        record(BENCHMARK, "broken places that tests noticed", [number], f"of {len(trials)}", "cpu", {"places": trials})
    if arguments.duplicates is not None:
        runs = read_findings(arguments.duplicates, ("places", "reason"))
        number = sum(not one["reason"] for one in runs)
        subject = "runs of lines that stand twice without a reason"
        record(BENCHMARK, subject, [number], f"of {len(runs)}", "cpu", {"runs": runs})
