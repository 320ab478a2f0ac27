"""The same classification as several jobs: in shards, killed and gone on with, in other batches; what then differs.

Models are tiny and random, pictures synthetic; all goes through the classify command's own function.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny_diffusion
import torch

from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.document import build_format
from mixmodal.interop.export import save_export
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CLASSES = ("a red apple", "a blue pear", "a photo of a cat", "a dog")
NUM_PICTURES, NUM_KILLS = 24, 2
RACES: dict[str, Any] = {"min_times": 4, "max_times": 16, "p_value": 0.05}
BATCHES, SHARDS = (1, 7, 64), (1, 2, 3)
WHOLE, KILLED = 64, 8
"""Batch sizes of the job that others are compared with, and of the one that is killed."""


class Difference(NamedTuple):
    """Between two jobs: pictures with another prediction, and the largest relative difference of a score."""

    predictions: int
    scores: float


class Jobs(NamedTuple):
    """What differs from one job in one go, by what was done otherwise, and the records that stood at each kill."""

    differences: dict[str, Difference]
    killed_after: list[int]


def save_diffusion(folder: Path) -> dict[str, Any]:
    """A tiny Stable Diffusion with random weights; what the config says of it."""
    tiny_diffusion.build("sd_epsilon").save_pretrained(folder)
    return {"method": "diffusion", "model": str(folder), "diffusion": DiffusionOptions(**RACES)}


def save_autoregressive(folder: Path) -> dict[str, Any]:
    """An export of a tiny transformer with random weights, 16 pixels and 4 x 4 codes; what the config says of it."""
    folder.mkdir(parents=True)
    texts, images = folder / "text.model", folder / "image"
    train_text_tokenizer([*CLASSES] * 5, texts, 300)
    autoencoder = AutoencoderConfig(channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    torch.manual_seed(0)
    tokenizer = ImageTokenizerConfig(
        image_size=16, autoencoder=autoencoder, quantizer=QuantizerConfig(levels=(5, 5, 3))
    )
    ImageTokenizer(tokenizer).save(images)
    pieces = TextTokenizer.load(texts).num_pieces
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=pieces, num_sentinels=8)
    form = build_format("cm3leon", Vocabulary(sizes), {"image": (4, 4)})
    shape: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 96}
    model = Transformer(TransformerConfig(vocab_size=form.vocabulary.size, init_std=0.3, **shape))
    save_export(folder / "export", model, form, texts, images, {"title": "Tiny", "figures": {}})
    return {"method": "image_given_text", "model": str(folder / "export")}


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "diffusion": save_diffusion,
    "autoregressive": save_autoregressive,
}


def write_pictures(folder: Path) -> dict[str, Any]:
    """Pictures and the list of classes; what the config says of them."""
    (folder / "data").mkdir(parents=True)
    for number, pair in enumerate(synthetic_pairs(NUM_PICTURES, 32)):
        pair.picture.save(folder / "data" / f"{number:02d}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return {"data": folder / "data", "classes": folder / "classes.txt", "device": "cpu"}


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Whole lines of all shards, by key."""
    lines = [line for path in out.glob("records*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return {(found := json.loads(line))["key"]: found for line in lines if line.endswith("\n")}


def finish(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Does a job to its end, quietly: its records by key."""
    with contextlib.redirect_stdout(io.StringIO()):
        classify(ClassifyConfig(**{**options, "out": out, **changes}))
    return read_records(out)


def kill(options: dict[str, Any], out: Path, **changes: Any) -> int:
    """Begins a job in a copy of this process and kills it once it has written something: how many records it left.

    Raises:
        RuntimeError: where it came to its end before that.
    """
    before = len(read_records(out))
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # a copied process has none of the threads that torch may have started
            finish(options, out, **changes)
        finally:
            os._exit(0)  # even where it raised: nothing of this process's own may go on here
    while len(read_records(out)) == before:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError(f"the job in {out} ended before it was killed")
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if (left := len(read_records(out))) == NUM_PICTURES:
        raise RuntimeError(f"the job in {out} was killed after its last picture")
    return left


def differ(found: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> Difference:
    """Records of one job against those of another.

    Raises:
        ValueError: where they are not of the same pictures.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"{len(found)} pictures are recorded, not the {len(wanted)} of the whole job")
    pairs = [(found[key], one) for key, one in wanted.items()]
    relative = [abs(x / y - 1) for one, other in pairs for x, y in zip(one["scores"], other["scores"], strict=True)]
    return Difference(sum(one["prediction"] != other["prediction"] for one, other in pairs), max(relative))


def measure(kind: str, folder: Path) -> Jobs:
    """All jobs of a kind of model against one in one go; `folder` takes models, pictures and records."""
    options = {**write_pictures(folder / "pictures"), **MODELS[kind](folder / "model")}
    whole = finish(options, folder / "whole", batch_size=WHOLE)
    found: dict[str, Difference] = {}
    for size in BATCHES:
        found[f"batches of {size}"] = differ(finish(options, folder / f"batch-{size}", batch_size=size), whole)
    for count in SHARDS:
        records: dict[str, dict[str, Any]] = {}
        for index in range(count):
            out, shard = folder / f"shards-{count}", f"{index}/{count}"
            records = finish(options, out, batch_size=WHOLE, shard=shard)
        found[f"{count} shard{'s' if count > 1 else ''}"] = differ(records, whole)
    out = folder / "killed"
    killed_after = [kill(options, out, batch_size=KILLED) for _ in range(NUM_KILLS)]
    found[f"killed {NUM_KILLS} times"] = differ(finish(options, out, batch_size=KILLED), whole)
    return Jobs(found, killed_after)
