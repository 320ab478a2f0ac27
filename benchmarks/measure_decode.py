"""Tokens a second of drawing pictures' codes with the quickstart's transformer, alone and in a batch.

python benchmarks/measure_decode.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from documents import FORMAT, SHAPE, VOCABULARY
from record import record

from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.sampling.generator import SequenceGenerator


def measure(generator: SequenceGenerator, batch_size: int) -> float:
    """Codes a second behind prompts of 8 pieces of text."""
    pieces = VOCABULARY.ids("text")
    prompt = np.array([VOCABULARY.bos, *pieces[10:18], VOCABULARY.break_])
    started = time.perf_counter()
    generator.generate([prompt] * batch_size, seeds=list(range(batch_size)), output="image")
    return batch_size * FORMAT.blocks["image"].length / (time.perf_counter() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=VOCABULARY.size, **SHAPE)).to(device).eval()
    generator = SequenceGenerator(model, FORMAT)
    for batch_size in (1, 32):
        measure(generator, batch_size)  # warm-up
        found = [measure(generator, batch_size) for _ in range(arguments.repeats)]
        settings = {**SHAPE, "batch_size": batch_size, "precision": "float32", "num_threads": torch.get_num_threads()}
        record("decode", f"codes, batch of {batch_size}", found, "tokens/s", device.type, settings)
