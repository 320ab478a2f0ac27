"""Accuracy of a diffusion classifier against the evaluations that it takes, on scikit-learn's digits, from scratch.

    pip install scikit-learn "mixmodal[train,diffusion]"
    python benchmarks/digits.py [--dry]

A denoiser is trained on 1,437 digits of 8 x 8 pixels by `mixmodal train-diffusion` and classifies the other 360, by
each policy of elimination, beside logistic regression on the same pictures. Nothing is downloaded: the digits come with
scikit-learn. Times by importance and learned weights of times are fitted on 100 of the digits that it was trained on;
what that takes is shared out among the pictures. The bar: every policy at least 0.985, and above logistic regression.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from record import record

from mixmodal.classification.denoiser import LoadedDenoiser, load_denoiser
from mixmodal.data.augment import AugmentConfig
from mixmodal.data.denoising import DenoisingDataConfig
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.models.denoiser import DenoiserConfig
from mixmodal.training.config import TrainerConfig
from mixmodal.training.diffusion import DiffusionTrainingConfig, train_diffusion
from mixmodal.training.optimizer import OptimizerConfig

NUM_CLASSES = 10
NUM_TEST = 360
SIZE = 8
BAR = 0.985
BATCH_SIZE = 64
NUM_FITTED = 100
FITTED = {"adaptive, importance t": (False, True), "adaptive, learned weights": (True, False)}
"""Arms by what is measured for them: learned weights, a density of times."""


class Digits(NamedTuple):
    """Pixels 0 .. 16, float64 `(N, 8, 8)`, and labels `(N,)`."""

    pixels: np.ndarray
    labels: np.ndarray


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Digits to train on and 360 to test on, all classes in equal shares."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        sys.exit("benchmarks/digits.py needs scikit-learn, which brings the digits: pip install scikit-learn")
    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=NUM_TEST, random_state=seed, stratify=digits.target
    )
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def regress(train: Digits, test: Digits) -> float:
    """Accuracy of logistic regression on the pixels."""
    from sklearn.linear_model import LogisticRegression

    features = [one.pixels.reshape(len(one.pixels), -1) / 16 for one in (train, test)]
    return float(LogisticRegression(max_iter=5000).fit(features[0], train.labels).score(features[1], test.labels))


def to_picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)).convert("RGB")


def samples(digits: Digits) -> Iterator[Sample]:
    for number, (pixels, label) in enumerate(zip(digits.pixels, digits.labels.tolist())):
        data = io.BytesIO()
        to_picture(pixels).save(data, "png")
        yield Sample(f"{number:04d}", (str(label), PictureFile(data.getvalue(), "png", f"{number}.png")))


def train_denoiser(folder: Path, train: Digits, given: argparse.Namespace) -> tuple[LoadedDenoiser, float]:
    """A trained denoiser, and the processor time that training took, seconds."""
    write_shards(samples(train), folder / "shards")
    (folder / "classes.txt").write_text("".join(f"{number}\n" for number in range(NUM_CLASSES)))
    config = DiffusionTrainingConfig(
        data=DenoisingDataConfig(train=(folder / "shards",), classes=folder / "classes.txt"),
        model=DenoiserConfig(
            image_size=SIZE, block_channels=(32, 64), attention_levels=(), head_dim=32, prediction=given.prediction
        ),
        augment=AugmentConfig(move_share=0.5, max_shift=0.0625, max_scale=0.05),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, min_lr_ratio=0.0),
        trainer=TrainerConfig(
            run_dir=folder / "run",
            max_steps=given.steps,
            micro_batch_size=64,
            log_every=max(1, given.steps // 10),
            ema_decay=0.99,
            seed=given.seed,
            tensorboard=False,
        ),
    )
    started = time.process_time()
    train_diffusion(config)
    return load_denoiser(folder / "run" / "export"), time.process_time() - started


def policies() -> dict[str, Any]:
    """By name; `staged` is small as the set is easy, `full` is what the others are to agree with."""
    from mixmodal.classification.policies import Adaptive, Full, Staged

    return {
        "full": Full(num_times=32, antithetic=True),
        "staged": Staged(samples=(4, 32), keep=(3, 1)),
        "adaptive": (adaptive := Adaptive(p_value=1e-2, max_times=32)),
        **dict.fromkeys(FITTED, adaptive),
    }


def measure(
    denoiser: LoadedDenoiser, train: Digits, test: Digits, given: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Accuracy, evaluations a picture and agreement with `full` of each policy."""
    from mixmodal.classification.adapters import Labelled
    from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer
    from mixmodal.classification.elimination import EliminationConfig
    from mixmodal.classification.measured import Wanted
    from mixmodal.pipeline.classifiers import DiffusionPictures
    from mixmodal.pipeline.measuring import Chosen

    classes = [one.label for one in denoiser.classes]
    adapter, config = (
        Labelled(denoiser, encode=denoiser.encode),
        DiffusionConfig(batch_size=BATCH_SIZE, seed=given.seed),
    )
    fitted = Chosen([to_picture(one) for one in train.pixels[:NUM_FITTED]], train.labels[:NUM_FITTED].tolist(), [])
    race, shown = EliminationConfig(batch_size=BATCH_SIZE, seed=given.seed), [to_picture(one) for one in test.pixels]
    figures, full = {}, None
    for name, policy in policies().items():
        classifier, pilot = DiffusionPictures(DiffusionScorer(adapter, classes, config=config), policy, race), 0.0
        started = time.process_time()
        if name in FITTED:
            measured = classifier.measure(fitted, Wanted(*FITTED[name]))
            pilot = measured.num_evaluations / len(shown)
            classifier.use(measured)
        classifier.scorer.set_pictures(shown)
        outcomes = classifier.elimination.score(range(len(shown)))
        seconds = time.process_time() - started
        found = np.array([outcome.costs.argmin() for outcome in outcomes])
        full = found if full is None else full
        figures[name] = {
            "accuracy": float(np.mean(found == test.labels)),
            "evaluations a picture": float(np.mean([outcome.num_evaluations for outcome in outcomes])) + pilot,
            "agreement with full": float(np.mean(found == full)),
            "processor seconds": seconds,
        }
        print(name, figures[name], flush=True)
    return figures


def main(given: argparse.Namespace) -> None:
    train, test = load_split(given.seed)
    regression = regress(train, test)
    print(f"logistic regression: {regression:.4f}")
    with tempfile.TemporaryDirectory() as name:
        denoiser, seconds = train_denoiser(Path(name), train, given)
    print(f"training: {seconds:.0f} processor seconds")
    figures = measure(denoiser, train, test, given)
    shape = {"pictures": NUM_TEST, "steps": given.steps, "prediction": given.prediction, "seed": given.seed}
    if not given.dry:
        record("digits", "logistic regression: accuracy", [regression], "", "cpu", shape)
        record("digits", "training: processor seconds", [seconds], "s", "cpu", shape)
        for policy, values in figures.items():
            for what, value in values.items():
                record("digits", f"{policy}: {what}", [value], "", "cpu", shape)
    short = [policy for policy, values in figures.items() if values["accuracy"] < max(BAR, regression + 1e-9)]
    if short:
        sys.exit(f"below the bar of {BAR} and of logistic regression, {regression:.4f}: {', '.join(short)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training, 64 digits each")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0, help="of the split, training and units")
    parser.add_argument("--dry", action="store_true", help="print figures and record nothing")
    torch.set_num_threads(1)
    main(parser.parse_args())
