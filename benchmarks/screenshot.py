"""The top of a page that we write, as a picture for docs/: what a headless Chromium shows of it.

    python benchmarks/screenshot.py runs/quickstart/report.html docs/report.png --height 1510
    python benchmarks/screenshot.py runs/quickstart/evaluation/evaluation.html docs/evaluation.png --height 1500

The demo pictures on it come under their own licences: see Art in README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, SHOWN_WIDTH, COLORS = 1200, 900, 256


def take(page: Path, out: Path, height: int) -> None:
    """Saves `WIDTH` x `height` pixels of the page, scaled to `SHOWN_WIDTH`."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no chromium here; set CHROMIUM to its path")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{height}",
        ]
        command = [chromium, *options, f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        with Image.open(shot) as picture:
            size = SHOWN_WIDTH, round(picture.height * SHOWN_WIDTH / picture.width)
            smaller = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    smaller.quantize(COLORS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--height", type=int, default=1600, help="pixels of the page, from its top")
    arguments = parser.parse_args()
    take(arguments.page, arguments.out, arguments.height)
