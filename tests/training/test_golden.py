"""The first 20 steps of a tiny pretraining run, against stored numbers.

python tests/training/test_golden.py    # writes them anew; say why in the CHANGELOG, "Changes the numbers"
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from shapes import tiny_config, write_shapes

from mixmodal.training.pretrain import pretrain

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrain_tiny.json"
NAMES = ("loss", "loss_text", "loss_image", "z_loss", "grad_norm", "logit_norm", "output_norm")


def curve(root: Path) -> dict[str, list[float]]:
    write_shapes(root / "tokens", 60)
    pretrain(tiny_config(root, max_steps=20))
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in NAMES}


def test_the_first_steps_are_those_on_record(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = curve(tmp_path)
    for name in NAMES:
        assert found[name] == pytest.approx(golden[name], rel=1e-4), name  # worst seen: 2e-7 (AVX512, AVX2, none)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve(Path(folder)), indent=1) + "\n")
