"""Image tokenizers of 64 codes on the demo pictures at 64 pixels: trained alike, scored alike.

python benchmarks/compare_image_tokenizers.py data                           # writes the pictures
python benchmarks/compare_image_tokenizers.py train ours --seeds 0 1 2       # arms, any number; done ones are skipped
python benchmarks/compare_image_tokenizers.py record                         # appends the lines, draws the sheet

The arm `llamagen` has LlamaGen's shape, codebook and reconstruction losses (L2, and a perceptual loss at the pictures'
own size), at channels that make its parameters as many as ours within 3 %; optimizer, schedule, averaging of weights
and the discriminator are ours. `llamagen_our_losses` has its shape and codebook with all of our losses. `perceptual` is
ours without the discriminator, and the arms that are named for a quantizer have losses of pixels only: `fsq` is ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from record import append, command, now

from mixmodal.config import load_config, plain
from mixmodal.data.shards import read_samples
from mixmodal.environment import commit, device, versions
from mixmodal.evaluation.reconstruction import (
    ImageTokenizerEvaluation,
    ImageTokenizerEvaluationConfig,
    evaluate_image_tokenizer,
)
from mixmodal.evaluation.sheet import ORIGINAL, save_sheet
from mixmodal.quickstart.art import FLAT
from mixmodal.quickstart.corpus import DemoCorpusConfig, build_demo_corpus
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.preprocessing import to_tensor
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.training.image_tokenizer import (
    ImageTokenizerTrainingConfig,
    ReconstructionLossConfig,
    train_image_tokenizer,
)
from mixmodal.training.optimizer import OptimizerConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "tokenizers" / "demo_64px_64.yaml"
DATA = Path("runs/demo_64px")
RUNS = Path("runs/compare_image_tokenizers")
SHEET = ROOT / "docs" / "tokenizers_64px.png"
CORPUS = DemoCorpusConfig(
    image_size=64, margin=1 / 32, skip_categories=(), min_correlation=-1, min_distance=-1, heldout_share=0.13
)
"""All emoji that both makers draw; one in eight pictures is held out, its concept seen in the other style."""

LLAMAGEN_SHAPE = AutoencoderConfig(
    channels=20,
    channel_multipliers=(1, 2, 2, 4),
    num_res_blocks=2,
    num_decoder_res_blocks=3,
    attention_stages=(3,),
    latent_channels=80,
    norm_groups=4,
)
"""LlamaGen's VQ-8 with the channels that make it as large as ours."""
LLAMAGEN_CODES = QuantizerConfig(kind="vq_cosine", update="gradient", codebook_size=1024, codebook_dim=8)
CODEBOOK = {"codebook_size": 1024, "codebook_dim": 8}
QUANTIZERS = {
    "fsq": QuantizerConfig(kind="fsq", levels=(8, 5, 5, 5)),
    "lfq": QuantizerConfig(kind="lfq", codebook_dim=10),
    "vq_ema": QuantizerConfig(kind="vq", restart_below=0.2, **CODEBOOK),
    "vq_cosine_ema": QuantizerConfig(kind="vq_cosine", restart_below=0.2, **CODEBOOK),
    "vq_cosine_gradient": LLAMAGEN_CODES,
    "simvq": QuantizerConfig(kind="simvq", **CODEBOOK),
    "simvq_rotation": QuantizerConfig(kind="simvq", gradient="rotation", **CODEBOOK),
    "residual_vq": QuantizerConfig(kind="residual_vq", num_levels=4, restart_below=0.2, **CODEBOOK),
}
"""About 1,024 codes each; `residual_vq` has four for each of 4 x 4 places, which are 64 codes a picture, too."""
LLAMAGEN_LOSSES = ReconstructionLossConfig(l1_weight=0.0, l2_weight=1.0, perceptual_weight=0.1)
"""LlamaGen weighs L2 and LPIPS alike; a tenth brings the distance of our network to the scale of LPIPS."""
PIXELS_ONLY = ReconstructionLossConfig(l1_weight=0.1, l2_weight=1.0)
ARMS = ("ours", "perceptual", "llamagen", "llamagen_our_losses")
SHOWN = {
    "llamagen": "LlamaGen's shape",
    "fsq": "ours, pixel losses",
    "perceptual": "and perceptual",
    "ours": "and adversarial",
}
"""Arms on the sheet, and what stands beside their rows."""
COLUMNS = 10
"""Pictures of a row of the sheet."""


def build_config(arm: str, seed: int, steps: int | None) -> ImageTokenizerTrainingConfig:
    """What an arm trains; it differs from `demo_64px_64.yaml` in what its name says."""
    config: ImageTokenizerTrainingConfig = load_config(ImageTokenizerTrainingConfig, CONFIG)
    trainer = replace(config.trainer, run_dir=RUNS / f"{arm}-{seed}", seed=seed, tensorboard=False)
    config = replace(config, trainer=trainer)
    if steps:
        config = shorten(config, steps)
    alone = {"adversarial": None, "discriminator_optimizer": OptimizerConfig()}
    if arm in ("llamagen", "llamagen_our_losses"):
        tokenizer = replace(config.tokenizer, autoencoder=LLAMAGEN_SHAPE, quantizer=LLAMAGEN_CODES)
        return replace(config, tokenizer=tokenizer, losses=LLAMAGEN_LOSSES if arm == "llamagen" else config.losses)
    if arm in QUANTIZERS:
        tokenizer = replace(config.tokenizer, quantizer=QUANTIZERS[arm])
        if arm == "residual_vq":
            shape = replace(tokenizer.autoencoder, patch_size=2)
            tokenizer = replace(tokenizer, autoencoder=shape)
        return replace(config, tokenizer=tokenizer, losses=PIXELS_ONLY, **alone)
    if arm == "perceptual":
        return replace(config, **alone)
    if arm == "ours":
        return config
    raise SystemExit(f"arm {arm} is unknown; choose one of {', '.join((*ARMS, *QUANTIZERS))}")


def shorten(config: ImageTokenizerTrainingConfig, steps: int) -> ImageTokenizerTrainingConfig:
    """The config for another number of steps: the discriminator plays in the second half, as in 500 steps."""
    half = max(1, steps // 2)
    assert config.adversarial is not None
    return replace(
        config,
        adversarial=replace(config.adversarial, start_step=half),
        trainer=replace(config.trainer, max_steps=steps, eval_every=half, save_every=half),
    )


def config_sha256(config: ImageTokenizerTrainingConfig) -> str:
    """Digest of all that an arm is trained with; folder and seed left out."""
    values = plain(config)
    del values["trainer"]["run_dir"], values["trainer"]["seed"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_done(config: ImageTokenizerTrainingConfig) -> bool:
    """Whether the run was trained with this config.

    Raises:
        SystemExit: where its folder holds a run of another config, or one that has not come to its end, whose config
            is not known.
    """
    folder = config.trainer.run_dir
    if not folder.exists():
        return False
    path = folder / "scores.json"
    if not path.exists():
        raise SystemExit(f"{folder} holds a run without scores.json, which did not come to its end; remove the folder")
    line = json.loads(path.read_text(encoding="utf-8"))
    if line.get("config_sha256") != config_sha256(config):
        raise SystemExit(f"{path} is of another config than this command's; remove the folder to train again")
    print(f"{folder}: trained {line['date'][:10]} at commit {line['commit'][:9]}; remove the folder to train again")
    return True


def train(arm: str, seed: int, steps: int | None) -> None:
    """Trains one arm and writes `scores.json` beside it, with all that the figures depend on."""
    config = build_config(arm, seed, steps)
    if is_done(config):
        return
    origin = {
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "device_kind": "cuda" if torch.cuda.is_available() else "cpu",
        "config_sha256": config_sha256(config),
        "command": command(),
        "date": now(),
    }
    train_image_tokenizer(config)
    export = config.trainer.run_dir / "export"
    found: ImageTokenizerEvaluation = evaluate_image_tokenizer(
        ImageTokenizerEvaluationConfig(image_tokenizer=export, data=(DATA / "heldout",), sheet=export / "sheet.png")
    )
    parameters = sum(p.numel() for p in ImageTokenizer.load(export).parameters())
    values = {**asdict(found.scores), **found.distances, "parameters": parameters}
    shared = {"steps": config.trainer.max_steps, "batch": config.trainer.micro_batch_size}
    line = {"arm": arm, "seed": seed, **shared, "reference_sha256": found.reference_sha256, **origin, "values": values}
    path = config.trainer.run_dir / "scores.json"
    path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")


UNITS = {
    "psnr": "dB",
    "ssim": "",
    "frechet_efficientnet_lite0": "",
    "perceptual_efficientnet_lite0": "",
    "codebook_usage": "",
    "expected_usage": "",
    "parameters": "",
}
SHARED = ("steps", "batch", "reference_sha256")
"""What all arms have in common."""
ORIGIN = ("commit", "versions", "device", "device_kind", "config_sha256")
"""What all seeds of an arm have in common."""


def record_all() -> None:
    """One line for each arm and score, over the seeds that were trained, as of their training."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RUNS.glob("*/scores.json")):
        line = json.loads(path.read_text(encoding="utf-8"))
        arms.setdefault(line["arm"], []).append(line)
    everything = [line for lines in arms.values() for line in lines]
    if not everything:
        raise SystemExit(f"{RUNS} holds no scores.json; train an arm first")
    shared = common("all arms", everything, SHARED)
    origins = {arm: common(f"the seeds of {arm}", lines, ORIGIN) for arm, lines in arms.items()}
    for arm, lines in arms.items():
        settings = {
            **shared,
            "sha256": origins[arm].pop("config_sha256"),
            "seeds": [line["seed"] for line in lines],
            "trained": [line["date"] for line in lines],
        }
        for name, unit in UNITS.items():
            append(
                benchmark="tokenizer_comparison",
                subject=f"{arm}: {name}",
                repeats=[line["values"][name] for line in lines],
                unit=unit,
                command="; ".join(dict.fromkeys(line["command"] for line in lines)),
                config=settings,
                **origins[arm],
            )


def common(where: str, lines: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values that all lines have.

    Raises:
        SystemExit: naming the key, where they differ or a line lacks it.
    """
    for key in keys:
        found = [line.get(key) for line in lines]
        if found[0] is None or any(value != found[0] for value in found):
            runs = ", ".join(f"{line['arm']}-{line['seed']} {value}" for line, value in zip(lines, found, strict=True))
            raise SystemExit(f"{key} differs between {where}, or is missing: {runs}; train them alike")
    return {key: lines[0][key] for key in keys}


def draw_sheet() -> None:
    """Held-out pictures as they are and as the arms of SHOWN redraw them; of the style whose licence allows it."""
    samples = [sample for sample in read_samples(DATA / "heldout") if sample.metadata["style"] == FLAT][:COLUMNS]
    originals = torch.stack([to_tensor(sample.pictures[0].open(CORPUS.image_size**2)) for sample in samples])
    rows = {ORIGINAL: originals}
    for arm, label in SHOWN.items():
        tokenizer = ImageTokenizer.load(RUNS / f"{arm}-0" / "export")
        rows[label] = tokenizer.decode(tokenizer.encode(originals))
    save_sheet(rows, SHEET, COLUMNS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("data", "train", "record"))
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="instead of those of the config: for a quick look")
    arguments = parser.parse_args()
    if arguments.job == "data":
        build_demo_corpus(CORPUS, DATA)
    elif arguments.job == "train":
        for seed in arguments.seeds:
            for arm in arguments.arms:
                train(arm, seed, arguments.steps)
    else:
        record_all()
        draw_sheet()
