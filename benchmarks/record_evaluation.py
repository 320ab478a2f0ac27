"""Records what `mixmodal evaluate` has found.

python benchmarks/record_evaluation.py runs/quickstart/evaluation configs/sample/evaluate.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from record import append

from mixmodal.environment import device

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    found = json.loads((Path(sys.argv[1]) / "evaluation.json").read_text(encoding="utf-8"))
    for task, summary in found["tasks"].items():
        for metric, value in summary["metrics"].items():
            if value is not None:
                append(
                    benchmark="evaluation",
                    subject=f"{task}: {metric}",
                    repeats=[value],
                    unit="",
                    device=device("cpu"),
                    device_kind="cpu",
                    commit=found["commit"],
                    versions=found["versions"],
                    command=f"mixmodal evaluate --config {sys.argv[2]}",
                    config={"samples": summary["num_samples"]},
                )
