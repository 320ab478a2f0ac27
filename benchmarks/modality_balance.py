"""The muted modality, with and without `data.modality_balance`: how answers to new requests begin.

    python benchmarks/modality_balance.py [--steps 40 100 200] [--seeds 3]

Conversations in which a word is told back or a colour is drawn, as the verb of the request says, of eight for each; of
100 answers two are pictures of 16 codes. A transformer of 0.1M parameters is trained on them from random weights, with
loss on the answers. Then it is asked 200 times for a text and 200 times for a picture, by requests drawn anew; an
answer is right where its most probable first token begins what was asked for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import record

from mixmodal.data.pipeline import DataConfig
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Image, Text, Turn, build_format, spell_turns
from mixmodal.interop.export import load_transformer
from mixmodal.manifests import write_manifest
from mixmodal.models.transformer import TransformerConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.pretrain import PretrainConfig, pretrain
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID, LETTERS, SEQ_LEN = (4, 4), "abcdefghij", 128
VERBS = {
    "image": ("draw", "paint", "sketch", "show", "print", "plot", "ink", "tint"),
    "text": ("tell", "say", "write", "spell", "name", "read", "repeat", "echo"),
}
NAMES = {"image": "pictures", "text": "texts"}
PICTURES_OF_100 = 2
ARMS = {"off": {}, "on": {"text": 0.5, "image": 0.5}}
VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=256, num_sentinels=2))


class Bytes:
    """UTF-8 bytes as pieces."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, pieces: list[int]) -> str:
        return bytes(pieces).decode()


FORMAT = build_format("cm3leon", VOCABULARY, {"image": GRID}, Bytes())


def conversation(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids and loss flags of a request and its answer."""
    word = "".join(rng.choice(list(LETTERS), 5))
    asked = Turn((Text(f"{rng.choice(VERBS[kind])} {word}"),), (False,), is_answer=False)
    answer = Text(word) if kind == "text" else Image(np.full(GRID, LETTERS.index(word[0])))
    return spell_turns(FORMAT, [asked, Turn((answer,), (True,), is_answer=True)])


def write_tokens(folder: Path, count: int, seed: int) -> None:
    """One token shard of conversations, of which few are answered by a picture."""
    rng = np.random.default_rng(seed)
    kinds = ["image" if number % 100 < PICTURES_OF_100 else "text" for number in range(count)]
    documents, losses = zip(*(conversation(kind, rng) for kind in kinds))
    folder.mkdir()
    keys = [f"{number}#0" for number in range(count)]
    entry = write_token_shard(folder, "shard_00000", documents, keys, VOCABULARY.size, losses)
    hashes = {"text_tokenizer_sha256": "t" * 64, "image_tokenizer_sha256": "i" * 64}
    write_manifest(folder, build_manifest(FORMAT, [entry], counts={"documents": count}, **hashes))
    TokenShards.open(folder)


@torch.no_grad()
def share_right(export: Path, kind: str, count: int, seed: int) -> float:
    """Per cent of requests of a kind that the model would answer in the modality asked for."""
    model, rng = load_transformer(export).eval(), np.random.default_rng((seed, 1, len(kind)))
    right = 0
    for _ in range(count):
        ids, loss = conversation(kind, rng)
        first = int(np.flatnonzero(loss)[0])
        said = int(model(torch.from_numpy(ids[None, :first]))[0, -1].argmax())
        right += (said == ids[first]) if kind == "image" else bool(VOCABULARY.contains("text", said))
    return 100 * right / count


def train(folder: Path, arm: str, steps: int, seed: int) -> Path:
    """The exported model."""
    data = DataConfig(
        tokens=folder / "tokens", seq_len=SEQ_LEN, image_first_share=0, caption_dropout=0, modality_balance=ARMS[arm]
    )
    config = PretrainConfig(
        model=TransformerConfig(dim=64, num_layers=2, num_heads=2, ffn_dim=128, max_seq_len=SEQ_LEN),
        data=data,
        objective=CausalMaskedConfig(min_masks=0, max_masks=0),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=10, min_lr_ratio=0.1),
        trainer=TrainerConfig(
            run_dir=folder / f"{arm}{steps}", max_steps=steps, micro_batch_size=4, seed=seed, tensorboard=False
        ),
    )
    pretrain(config)
    return config.trainer.run_dir / "export"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 100, 200])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for steps in arguments.steps:
        for arm in ARMS:
            found: dict[str, list[float]] = {kind: [] for kind in VERBS}
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory() as name:
                    write_tokens(Path(name) / "tokens", 4000, seed)
                    export = train(Path(name), arm, steps, seed)
                    for kind, values in found.items():
                        values.append(share_right(export, kind, 200, seed))
            settings = {"steps": steps, "rows": 4, "seq_len": SEQ_LEN, "pictures_of_100": PICTURES_OF_100}
            for kind, values in found.items():
                subject = f"balance {arm}, {steps} steps: {NAMES[kind]} where asked for, %"
                record("modality_balance", subject, values, "%", "cpu", {**settings, "balance": ARMS[arm]})
