"""Lets the tests import the modules that stand beside them, and the synthetic checkpoints of tests/interop."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "interop")]
