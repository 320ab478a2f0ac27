"""Trains an image tokenizer on pictures: reconstruction losses and the quantizer's own."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmodal.data.augment import AugmentConfig, augment
from mixmodal.data.pictures import PictureBatch, PictureDataConfig, PictureLoader, decode_all, to_images
from mixmodal.evaluation.reconstruction import ReconstructionScores, score_reconstructions
from mixmodal.objectives.loss import Sums, TokenLosses
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import to_pictures
from mixmodal.tokenization.quantizer import QuantizerConfig
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import Task
from mixmodal.training.trainer import FitResult, Trainer, TrainerConfig

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 64
PICTURES_SHOWN = 16
"""Held-out pictures in `reconstructions.png`."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the losses on pixels in [-1, 1]; the quantizer's own loss is added as it is.

    Args:
        l1_weight: of the mean absolute error.
        l2_weight: of the mean squared error.
    """

    l1_weight: float = 0.1
    l2_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.l1_weight, self.l2_weight) < 0 or not self.l1_weight + self.l2_weight:
            raise ValueError("losses: l1_weight and l2_weight must not be negative, and one of them must be above 0")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerTrainingConfig:
    """How to train an image tokenizer.

    Args:
        data: pictures to train and to evaluate on.
        tokenizer: what is trained; its image_size is the size of the pictures.
        trainer: how long, how much, where.
        optimizer: AdamW and its schedule.
        augment: random changes of the pictures.
        augment_until: share of the steps after which pictures are no longer changed, 0 .. 1.
        losses: weights of the reconstruction losses.
        min_codebook_usage: an alarm is logged where held-out pictures meet less than this share of the codes that as
            many equally likely ones would meet, 0 .. 1.
    """

    data: PictureDataConfig
    tokenizer: ImageTokenizerConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    augment_until: float = 1.0
    losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    min_codebook_usage: float = 0.3

    def __post_init__(self) -> None:
        for name in ("augment_until", "min_codebook_usage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0 .. 1")
        if self.trainer.precision == "bfloat16" and self.tokenizer.quantizer.kind != "fsq":
            raise ValueError(
                "trainer.precision bfloat16 would round the codebook; choose autocast_bfloat16 or float32, "
                "or tokenizer.quantizer.kind fsq"
            )


class ImageTokenizerTask(Task):
    """What is trained, for the trainer: sums over pictures of losses that are means over the pixels of a picture."""

    def __init__(self, config: ImageTokenizerTrainingConfig) -> None:
        self.config = config
        self._held_out: Tensor | None = None

    def build_model(self) -> ImageTokenizer:
        return ImageTokenizer(self.config.tokenizer)

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> PictureLoader:
        return PictureLoader(
            self.config.data,
            self.config.tokenizer.image_size,
            preprocess=self.config.tokenizer.preprocess,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=self.config.trainer.seed,
        )

    def batch_weight(self, batch: PictureBatch) -> float:
        return float(len(batch.pixels))

    def batch_keys(self, batch: PictureBatch) -> list[str]:
        return batch.keys

    def batch_tokens(self, batch: PictureBatch) -> int:
        """Codes."""
        side = self.config.tokenizer.image_size // self.config.tokenizer.autoencoder.downsampling
        return len(batch.pixels) * side * side

    def losses(self, model: nn.Module, batch: PictureBatch, step: int) -> TokenLosses:
        """Sums over pictures: `loss` is what is minimised, `l1`, `l2` and `commitment` its parts before weighting."""
        images = to_images(batch.pixels)
        if step < self.config.augment_until * self.config.trainer.max_steps:
            images = augment(images, batch.draws, self.config.augment)
        reconstructions, quantized = model(images)
        errors = reconstructions - images
        count = images.new_tensor(float(len(images)))
        l1 = errors.abs().flatten(1).mean(-1).sum()
        l2 = errors.square().flatten(1).mean(-1).sum()
        commitment = quantized.loss * count
        objective = self.config.losses.l1_weight * l1 + self.config.losses.l2_weight * l2 + commitment
        parts = {"loss": objective, "l1": l1, "l2": l2, "commitment": commitment}
        return TokenLosses(objective, count, {name: Sums(part.detach(), count) for name, part in parts.items()})

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Scores on the held-out pictures; every rank scores all of them."""
        pixels = self._held_out_pixels()
        if pixels is None:
            return {}
        assert isinstance(model, ImageTokenizer)
        scores = score_reconstructions(model, (to_images(part) for part in pixels.split(EVALUATION_BATCH)))
        self._check_usage(scores)
        return {
            "psnr": scores.psnr,
            "ssim": scores.ssim,
            "codebook_usage": scores.codebook_usage,
            "perplexity": scores.perplexity,
        }

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the tokenizer, `reconstructions.png` and a card."""
        assert isinstance(model, ImageTokenizer)
        model.save(folder)
        pixels = self._held_out_pixels()
        scores = None
        if pixels is not None:
            scores = score_reconstructions(model, (to_images(part) for part in pixels.split(EVALUATION_BATCH)))
            save_comparison(model, to_images(pixels[:PICTURES_SHOWN]), folder / "reconstructions.png")
        (folder / "README.md").write_text(card(self.config, scores), encoding="utf-8")

    def _held_out_pixels(self) -> Tensor | None:
        """uint8 `(N, 3, H, W)`, decoded once; None where no held-out data is given."""
        data = self.config.data
        if self._held_out is None and data.held_out:
            size, preprocess = self.config.tokenizer.image_size, self.config.tokenizer.preprocess
            _, self._held_out, _ = decode_all(data.held_out, size, data.limits, data.max_held_out_pictures, preprocess)
        return self._held_out

    def _check_usage(self, scores: ReconstructionScores) -> None:
        share = scores.codebook_usage / scores.expected_usage
        if share < self.config.min_codebook_usage:
            logger.warning(
                "the codebook collapses: %d held-out pictures meet %.1f %% of the codes, %.0f %% of what equally "
                "likely codes would give (min_codebook_usage is %.0f %%); %s",
                scores.num_pictures,
                100 * scores.codebook_usage,
                100 * share,
                100 * self.config.min_codebook_usage,
                remedy(self.config.tokenizer.quantizer),
            )


def remedy(config: QuantizerConfig) -> str:
    """What to change when few codes are used."""
    if config.kind == "fsq":
        return "choose fewer or smaller tokenizer.quantizer.levels, or train longer"
    if config.update == "gradient":
        return "choose tokenizer.quantizer.update ema, which restarts dead codes, or kind fsq"
    if not config.restart_below:
        return "set tokenizer.quantizer.restart_below above 0, so that dead codes restart, or choose kind fsq"
    if config.kind == "vq":
        return "choose tokenizer.quantizer.kind vq_cosine, a smaller codebook_dim, or kind fsq"
    return "raise tokenizer.quantizer.restart_below, lower codebook_dim or codebook_size, or choose kind fsq"


@torch.no_grad()
def save_comparison(tokenizer: ImageTokenizer, images: Tensor, path: Path) -> None:
    """Originals beside their reconstructions, four pairs a row, as one PNG; `images` is `(B, 3, H, W)`."""
    from PIL import Image

    images = images.to(next(tokenizer.parameters()).device)
    pairs = torch.cat([images, tokenizer.decode(tokenizer.encode(images))], dim=-1)  # (B, 3, H, 2W)
    size = images.shape[-1]
    gap = max(2, size // 16)
    rows = -(-len(images) // 4)
    sheet = Image.new("RGB", (4 * (2 * size + gap) + gap, rows * (size + gap) + gap), "white")
    for index, picture in enumerate(to_pictures(pairs)):
        sheet.paste(picture, (gap + index % 4 * (2 * size + gap), gap + index // 4 * (size + gap)))
    sheet.save(path)


def card(config: ImageTokenizerTrainingConfig, scores: ReconstructionScores | None) -> str:
    """A model card in Markdown."""
    tokenizer, trainer = config.tokenizer, config.trainer
    side = tokenizer.image_size // tokenizer.autoencoder.downsampling
    num_pictures = trainer.micro_batch_size * trainer.grad_accum_steps
    lines = [
        "# Image tokenizer",
        "",
        f"Codes pictures of {tokenizer.image_size} x {tokenizer.image_size} pixels as {side} x {side} codes "
        f"(quantizer `{tokenizer.quantizer.kind}`), and draws pictures from codes. Trained by mixmodal "
        f"for {trainer.max_steps:,} steps of {num_pictures} pictures on each device.",
        "",
        f"- trained on: {', '.join(f'`{path.name}`' for path in config.data.train)}",
        "- the licences of the pictures it was trained on apply to what it is used for",
    ]
    if scores is not None:
        lines += ["", "| held out | |", "|---|---|"]
        lines += [f"| {name} | {value:,.4g} |" for name, value in asdict(scores).items()]
        lines += ["", "`reconstructions.png` shows held-out originals, each beside its reconstruction."]
    lines += ["", "```python", "from mixmodal.tokenization.image import ImageTokenizer", ""]
    lines += [
        'tokenizer = ImageTokenizer.load("this/folder")',
        "codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1]",
    ]
    return "\n".join([*lines, "images = tokenizer.decode(codes)", "```", ""])


def train_image_tokenizer(config: ImageTokenizerTrainingConfig) -> FitResult:
    """Train an image tokenizer; the result is the folder `export` of the run.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(ImageTokenizerTask(config))
