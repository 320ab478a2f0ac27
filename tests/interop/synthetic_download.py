"""A small random model as Meta's download of Chameleon lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import synthetic_checkpoints as synthetic
import torch
from chameleon.synthetic_tokens import write_tokenizer

CODES = foreign.CODES


def write_download(root: Path, size: synthetic.Size = synthetic.SMALL, **tokens: Any) -> synthetic.Size:
    """A folder as Meta's download: `models/7b`, `tokenizer/text_tokenizer.json`, `vqgan.ckpt` and its YAML."""
    path = root / "tokenizer" / "text_tokenizer.json"
    names = write_tokenizer(path, num_codes=CODES, **tokens)
    if len(names) % size.shards:  # shards have as many rows each
        names = write_tokenizer(path, num_codes=CODES, num_reserved=4 + size.shards - len(names) % size.shards)
    size = size._replace(vocab=len(names))
    synthetic.write_meta(root / "models" / "7b", synthetic.draw_state(size), size)
    torch.save({"state_dict": foreign.draw_state("taming")}, root / "tokenizer" / "vqgan.ckpt")
    said = f"model: {{params: {{ddconfig: {{resolution: {foreign.SIZE}}}}}}}"
    (root / "tokenizer" / "vqgan.yaml").write_text(said)
    return size
