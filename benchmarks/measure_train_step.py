"""Tokens a second of training the quickstart's transformer: the trainer against a plain loop over transformers' Llama.

    python benchmarks/measure_train_step.py [--steps 60] [--repeats 3]

Both train on rows as long as the recipe's, 8 a step, without dropout, in float32, with AdamW. The trainer
also packs, masks, isolates documents,
checks for non-finite values and logs; the plain loop does none of that and sees one batch of random ids.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from documents import SHAPE, VOCABULARY, write_documents
from record import record

from mixmodal.data.pipeline import DataConfig
from mixmodal.models.transformer import TransformerConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain

SEQ_LEN, ROWS = SHAPE["max_seq_len"], 8


def measure_trainer(steps: int, folder: Path) -> float:
    """Tokens a second over the second half of a run."""
    trainer = TrainerConfig(
        run_dir=folder / "run", max_steps=steps, micro_batch_size=ROWS, log_every=steps // 2, tensorboard=False
    )
    data = DataConfig(tokens=folder / "tokens", seq_len=SEQ_LEN)
    pretrain(PretrainConfig(model=TransformerConfig(**SHAPE), data=data, trainer=trainer))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][-1]


def measure_plain_loop(steps: int, device: torch.device) -> float:
    """The same of a loop that does the least."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=SHAPE["dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        intermediate_size=SHAPE["ffn_dim"],
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=SHAPE.get("tie_embeddings", False),
    )
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(VOCABULARY.size, (ROWS, SEQ_LEN), device=device)
    started = 0.0
    for step in range(steps):
        if step == steps // 2:
            started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (steps - steps // 2) * ROWS * SEQ_LEN / (time.perf_counter() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, plain = [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name:
            write_documents(Path(name) / "tokens")
            ours.append(measure_trainer(arguments.steps, Path(name)))
        plain.append(measure_plain_loop(arguments.steps, device))
    settings = {**SHAPE, "seq_len": SEQ_LEN, "rows": ROWS, "steps": arguments.steps, "precision": "float32"}
    settings["num_threads"] = torch.get_num_threads()
    record("train_step", "the trainer (deepspeed, stage 0)", ours, "tokens/s", device.type, settings)
    record("train_step", "plain loop over transformers' Llama", plain, "tokens/s", device.type, settings)
