"""What retrieval gives on the demo pictures: documents found, nats of held-out pictures, and what is drawn.

    python benchmarks/retrieval.py prepare                  token shards, memory and candidates
    python benchmarks/retrieval.py train --arm ARM --seed N  one training; ARM is retrieval or plain
    python benchmarks/retrieval.py report [--seeds 0 1 2]    scores all trainings and records the figures
    python benchmarks/retrieval.py speed                     tokens a second of both arms, alternating

Needs a quickstart run (`make quickstart`) and an encoder (`mixmodal train-encoder --config
configs/train/demo_encoder.yaml`). The arms differ in retrieval alone: the same pairs, tokens, steps and seeds. What is
there already is not made again. Writes docs/retrieval.png as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import record
from retrieval_sheet import Row, draw_sheet

from mixmodal.config import load_config
from mixmodal.data.indexing import MemoryConfig, build_memory
from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize
from mixmodal.data.retrieving import RetrieveConfig, retrieve
from mixmodal.data.shards import INDEX_NAME, Sample, read_samples, remove_unfinished, write_shards
from mixmodal.evaluation.concepts import nearest_pictures, redraw
from mixmodal.evaluation.retrieval import Worth
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.evaluate_retrieval import RetrievalEvaluationConfig, evaluate_retrieval
from mixmodal.quickstart.demo import Demo, load_demo
from mixmodal.quickstart.report import read_metrics
from mixmodal.quickstart.samples import judge
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.retrieval.memory import Memory, open_memory
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.retrieval.selection import SelectionConfig
from mixmodal.tokenization.preprocessing import to_pictures, to_tensor
from mixmodal.training.pretrain import PretrainConfig, pretrain

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "train" / "demo_retrieval.yaml"
ARMS = {"retrieval": "trained with retrieval", "plain": "trained without"}
COUNTS = (0, 1, 2)
RECALLED = (1, 5)
SHOWN = {
    "concept": "right concept",
    "style": "right style",
    "told": "nearest to its own of the held-out pictures",
    "distance": "distance to the true picture",
}
"""Shares of the held-out pairs, and the mean of the root mean square difference of RGB values in [0, 1]."""
NUM_RANDOM = 8
NUM_VARIANTS, NUM_VARIANTS_TWICE = 8, 4
"""Of each picture, moved and scaled a little, all pictures of a variant alike."""
SHARD_SIZE = 1000
SELECTION = SelectionConfig(max_score=0.98)
"""This encoder reads captions without their style: both styles of a concept have products of 0.77 to 0.98, where CLIP
has near-duplicates. Documents themselves and pictures of the same codes are left out whatever their score."""
SPEED_STEPS, SPEED_WARM_UP, SPEED_REPEATS = 450, 50, 5


def prepare(options: argparse.Namespace) -> None:
    """Token shards of all demo pictures but the held-out ones, their memory, and candidates."""
    quickstart, runs = options.quickstart, options.runs
    tokens = replace(
        load_config(PretokenizeConfig, quickstart / "configs" / "tokens.yaml"),
        text_tokenizer=quickstart / "text_tokenizer" / "text_tokenizer.model",
        image_tokenizer=quickstart / "image_tokenizer" / "export",
        num_variants=NUM_VARIANTS,
        change_alike=True,
    )
    own = {
        "shards": (quickstart / "data" / "train", quickstart / "data" / "tokenizer_extra"),
        "out": runs / "tokens",
    }
    pretokenize(replace(tokens, **own))
    write_twice(own["shards"], runs / "twice")
    pretokenize(replace(tokens, shards=(runs / "twice",), out=runs / "tokens_twice", num_variants=NUM_VARIANTS_TWICE))
    build_memory(
        MemoryConfig(shards=own["shards"], tokens=own["out"], encoder=str(options.encoder), out=runs / "memory")
    )
    where = {"memory": runs / "memory", "shards": own["shards"], "tokens": own["out"]}
    find = RetrieveConfig(**where, out=runs / "candidates", selection=SELECTION)
    retrieve(find)
    held_out = {"shards": (quickstart / "data" / "heldout",), "tokens": quickstart / "tokens" / "heldout"}
    retrieve(replace(find, **held_out, out=runs / "candidates_heldout", query_dropout=0.0))


def write_twice(shards: Sequence[Path], out: Path) -> None:
    """Documents of a caption and its picture and both again: of these a small model learns within minutes to read."""
    if not (out / INDEX_NAME).is_file():
        remove_unfinished(out)
        write_shards((Sample(one.key, one.parts * 2, one.metadata) for one in read_samples(shards)), out, SHARD_SIZE)


def build_config(options: argparse.Namespace, arm: str, seed: int) -> PretrainConfig:
    """The demo's training with retrieval, or the same without."""
    config = load_config(PretrainConfig, CONFIG)
    quickstart, runs = options.quickstart, options.runs
    assert config.data.retrieval
    with_documents = arm == "retrieval"
    pairs, twice = config.data.sources["pairs"], config.data.sources["twice"]
    pairs = replace(pairs, tokens=runs / "tokens", candidates=runs / "candidates" if with_documents else None)
    data = replace(
        config.data,
        sources={"pairs": pairs, "twice": replace(twice, tokens=runs / "tokens_twice")},
        retrieval=replace(config.data.retrieval, memory=runs / "memory") if with_documents else None,
        held_out_tokens=quickstart / "tokens" / "heldout",
    )
    steps = options.steps or config.trainer.max_steps
    name = f"{arm}-{steps}-{seed}"
    return replace(
        config,
        data=data,
        trainer=replace(config.trainer, run_dir=runs / name, seed=seed, max_steps=steps),
        text_tokenizer=quickstart / "text_tokenizer" / "text_tokenizer.model",
        image_tokenizer=quickstart / "image_tokenizer" / "export",
    )


def train(options: argparse.Namespace, arm: str, seed: int) -> None:
    """One training, or the rest of one; what is finished stays."""
    config = build_config(options, arm, seed)
    if not (config.trainer.run_dir / "export" / "config.json").exists():
        pretrain(config)


def score_encoder(options: argparse.Namespace, demo: Demo) -> dict[str, list[float]]:
    """How often a held-out pair finds its concept in the other style among the training pairs: recall, and chance."""
    memory = open_memory(options.runs / "memory", encoder_identity=None)
    encoder = load_encoder(memory.encoder)
    places = {label.key: place for place, label in enumerate(demo.labels)}
    concepts = [demo.labels[places[key]].concept for key in memory.keys]
    held_out = demo.indices(heldout=True)
    wanted = [demo.labels[place].concept for place in held_out]
    queries = {
        "by its text": encoder.embed_texts([demo.labels[place].caption for place in held_out]),
        "by its picture": encoder.embed_images(to_pictures(demo.images[held_out])),
    }
    right = np.array([[concept == own for own in concepts] for concept in wanted])
    found = {name: recalls(memory, rows, right) for name, rows in queries.items()}
    return {**found, "by chance": [float(np.mean(chance(right.sum(1), len(memory), k))) for k in RECALLED]}


def recalls(memory: Memory, queries: np.ndarray, right: np.ndarray) -> list[float]:
    """Share of the queries that have a right one among the first k."""
    numbers = memory.search(queries, max(RECALLED)).numbers
    hits = np.take_along_axis(right, numbers, axis=1)
    return [float(hits[:, :k].any(axis=1).mean()) for k in RECALLED]


def chance(num_right: np.ndarray, total: int, k: int) -> np.ndarray:
    """Probability that one of `num_right` stands among k of `total` documents drawn at random."""
    missed = np.ones(len(num_right))
    for drawn in range(k):
        missed *= (total - num_right - drawn) / (total - drawn)
    return 1 - missed


def score_worth(options: argparse.Namespace, arm: str, seed: int) -> list[Worth]:
    """Nats with 0, 1 and 2 documents of a finished training."""
    run = build_config(options, arm, seed).trainer.run_dir
    config = RetrievalEvaluationConfig(
        model=str(run / "export"),
        memory=options.runs / "memory",
        tokens=options.quickstart / "tokens" / "heldout",
        candidates=options.runs / "candidates_heldout",
        out=run / "worth.json",
        counts=COUNTS,
        num_random=NUM_RANDOM,
        device="cpu",
    )
    return evaluate_retrieval(config)


def draw_held_out(options: argparse.Namespace, arm: str, seed: int, demo: Demo) -> dict[int, dict[str, Any]]:
    """Pictures of the held-out captions with 0 and with 2 documents: the rate of right concepts, and what was drawn."""
    run = build_config(options, arm, seed).trainer.run_dir
    model = MixedModal.from_pretrained(run / "export", "cpu")
    model.attach_memory(options.runs / "memory", selection=SELECTION)
    held_out = demo.indices(heldout=True)
    captions = [demo.labels[place].caption for place in held_out]
    redrawn = redraw(model.codec, demo.images)
    results: dict[int, dict[str, Any]] = {}
    for count in (0, max(COUNTS)):
        found = model.retrieve(captions, count) if count else [[] for _ in captions]
        options = {"seed": seed, "temperature": 0.0, "guidance_scale": 1.0, "before": found}
        pictures = [one[0] for one in model.generate_batch(captions, "image", **options)]
        images = torch.stack([to_tensor(picture) for picture in pictures])
        nearest = nearest_pictures(images, redrawn).indices.tolist()
        verdicts = [judge(demo.labels[own], demo.labels[place]) for own, place in zip(held_out, nearest, strict=True)]
        rates = {name: float(np.mean([one[f"{name}_right"] for one in verdicts])) for name in ("concept", "style")}
        wanted = redrawn[torch.tensor(held_out)]
        own = nearest_pictures(images, wanted).indices == torch.arange(len(wanted))
        rates["told"] = float(own.double().mean())
        rates["distance"] = float((images - wanted).div(2).square().mean(dim=(1, 2, 3)).sqrt().mean())
        results[count] = {"pictures": pictures, "found": [show(model, documents) for documents in found], **rates}
    return results


def show(model: MixedModal, documents: Sequence[Retrieved]) -> list[tuple[Image.Image, str]]:
    """Picture and text of documents, the best one first."""
    shown = model.codec.from_documents([model.format.parse(one.ids) for one in reversed(documents)])
    found = []
    for parts in shown:
        (picture,) = (part for part in parts if isinstance(part, Image.Image))
        found.append((picture, " ".join(part for part in parts if isinstance(part, str))))
    return found


def report(options: argparse.Namespace) -> None:
    """Scores every training, records what came out, and draws docs/retrieval.png of the first seed."""
    size = MixedModal.from_pretrained(options.quickstart / "export", "cpu").codec.image_tokenizer.config
    data = options.quickstart / "data"
    train = (data / "train", data / "tokenizer_extra")
    demo = load_demo(train, data / "heldout", size.image_size, size.preprocess)
    shape = {"held_out_pairs": len(demo.indices(heldout=True)), "documents": len(demo.indices(heldout=False))}
    steps = build_config(options, "plain", 0).trainer.max_steps
    for name, values in score_encoder(options, demo).items():
        for k, value in zip(RECALLED, values, strict=True):
            record("retrieval_encoder", f"{name}: recall@{k}", [value], "", "cpu", shape)
    settings = {**shape, "seeds": options.seeds, "steps": steps, "random_draws": NUM_RANDOM}
    for arm, title in ARMS.items():
        worth = [score_worth(options, arm, seed) for seed in options.seeds]
        for rows in zip(*worth, strict=True):
            name = "nats per image code" if rows[0].predicted == "image" else "nats per text piece"
            documents = f"{rows[0].count} {rows[0].kind}" if rows[0].count else "0"
            values = [one.nats_per_token for one in rows]
            record(f"retrieval_{rows[0].predicted}", f"{title}: {name}, {documents}", values, "nats", "cpu", settings)
    drawn = {arm: [draw_held_out(options, arm, seed, demo) for seed in options.seeds] for arm in ARMS}
    for arm, title in ARMS.items():
        for count in (0, max(COUNTS)):
            for what, name in SHOWN.items():
                values = [one[count][what] for one in drawn[arm]]
                record("retrieval_drawn", f"{title}: {name}, {count} documents", values, "", "cpu", settings)
    first = drawn["retrieval"][0]
    rows = [
        Row(demo.labels[place].caption, found, {count: one["pictures"][number] for count, one in first.items()})
        for number, (place, found) in enumerate(zip(demo.indices(heldout=True), first[max(COUNTS)]["found"]))
    ]
    draw_sheet(rows, ROOT / "docs" / "retrieval.png")


def measure_speed(options: argparse.Namespace) -> None:
    """Tokens a second of short trainings of both arms, each in a process of its own, which take turns."""
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(SPEED_REPEATS):
        for arm, values in found.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                values.append(pool.submit(time_training, options, arm).result())
    settings = {"steps": SPEED_STEPS, "warm_up": SPEED_WARM_UP, "threads": torch.get_num_threads()}
    for arm, title in ARMS.items():
        record("retrieval_throughput", f"{title}, tokens a second", found[arm], "tokens/s", "cpu", settings)
    ratios = [ours / plain for ours, plain in zip(found["retrieval"], found["plain"], strict=True)]
    record("retrieval_throughput", "speed with documents over that without", ratios, "times", "cpu", settings)


def time_training(options: argparse.Namespace, arm: str) -> float:
    """Tokens a second behind the warm-up of a training that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(options, arm, 0)
        trainer = replace(
            config.trainer,
            run_dir=Path(folder) / "run",
            max_steps=SPEED_STEPS,
            eval_every=0,
            save_every=0,
            log_every=SPEED_WARM_UP,
            tensorboard=False,
        )
        pairs = replace(config.data.sources["pairs"], weight=1.0)
        data = replace(config.data, sources={"pairs": pairs}, stages=(), held_out_tokens=None)
        pretrain(replace(config, trainer=trainer, data=data))
        lines = read_metrics(trainer.run_dir / "metrics.jsonl")
    first, *_, last = (line for line in lines if "tokens" in line)
    return (last["tokens"] - first["tokens"]) / (last["wall_time_s"] - first["wall_time_s"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "train", "report", "speed"))
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--encoder", type=Path, default=Path("runs/demo_encoder/export"))
    parser.add_argument("--runs", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the recipe was chosen on seed 0")
    parser.add_argument("--steps", type=int, default=0, help="0: the config's")
    given = parser.parse_args()
    if given.what == "prepare":
        prepare(given)
    elif given.what == "train":
        train(given, given.arm, given.seed)
    elif given.what == "speed":
        measure_speed(given)
    else:
        report(given)
