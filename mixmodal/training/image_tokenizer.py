"""Trains an image tokenizer on pictures: reconstruction, perceptual and adversarial losses, and the quantizer's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmodal.data.augment import AugmentConfig, augment
from mixmodal.data.pictures import PictureBatch, PictureDataConfig, PictureLoader, decode_first, to_images
from mixmodal.evaluation.reconstruction import ReconstructionScores, score_reconstructions
from mixmodal.evaluation.sheet import DECODED, ORIGINAL, PICTURES_SHOWN, save_sheet
from mixmodal.models.discriminator import PatchDiscriminator, check_discriminator
from mixmodal.objectives.adversarial import AdversarialConfig, adaptive_weight, discriminator_loss, generator_loss
from mixmodal.objectives.loss import Sums, TokenLosses
from mixmodal.objectives.perceptual import PerceptualConfig, PerceptualLoss
from mixmodal.tokenization.autoencoder import Decoder, check_autoencoder
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer import check_quantizer, remedy
from mixmodal.tokenization.quantizer_base import Quantized
from mixmodal.training.cards import build_card, describe_batch
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.precision import autocast
from mixmodal.training.task import MODEL, Opponent, PictureTask
from mixmodal.training.trainer import FitResult, Trainer, TrainerConfig

logger = logging.getLogger(__name__)

EVALUATION_PIXELS = 2**22
"""Pixels of the pictures that are evaluated at a time: evaluation computes in float32."""
DISCRIMINATOR = "discriminator"
CONTEST_METRICS = ("adversarial", "adaptive_weight", "discriminator", "logits_real", "logits_fake")


class DivergedError(ValueError):
    """Held-out pictures come back far worse than before; the checkpoints are left as they are."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the losses between pictures in [-1, 1]; the quantizer's own loss is added as it is.

    Args:
        l1_weight: of the mean absolute error.
        l2_weight: of the mean squared error.
        perceptual_weight: of the distance of features; 0 leaves it out.
        perceptual: whose features.
    """

    l1_weight: float = 0.1
    l2_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)

    def __post_init__(self) -> None:
        if min(self.l1_weight, self.l2_weight) < 0 or not self.l1_weight + self.l2_weight:
            raise ValueError("losses: l1_weight and l2_weight must not be negative, and one of them must be above 0")
        if self.perceptual_weight < 0:
            raise ValueError(f"losses.perceptual_weight is {self.perceptual_weight}; it must not be negative")
        if not self.perceptual_weight and self.perceptual != PerceptualConfig():
            raise ValueError("losses.perceptual has no effect with perceptual_weight 0; leave it out")


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
        adversarial: a discriminator against the tokenizer, with an optimizer of its own; null is none.
        discriminator_optimizer: AdamW of the discriminator.
        min_codebook_usage: an alarm is logged where held-out pictures meet less than this share of the codes that as
            many equally likely ones would meet, 0 .. 1.
        max_psnr_drop: training stops where the PSNR of held-out pictures lies more than this below the best that this
            process has seen, dB; 0 never stops.
    """

    data: PictureDataConfig
    tokenizer: ImageTokenizerConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    augment_until: float = 1.0
    losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    adversarial: AdversarialConfig | None = None
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    min_codebook_usage: float = 0.3
    max_psnr_drop: float = 6.0

    def __post_init__(self) -> None:
        for name in ("augment_until", "min_codebook_usage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0 .. 1")
        check_autoencoder(self.tokenizer.autoencoder, self.tokenizer.image_size, "tokenizer.autoencoder")
        check_quantizer(self.tokenizer.quantizer, "tokenizer.quantizer")
        if self.max_psnr_drop < 0:
            raise ValueError(f"max_psnr_drop is {self.max_psnr_drop}; it must not be negative")
        if self.adversarial:
            check_discriminator(self.adversarial.discriminator, self.tokenizer.image_size)
            if self.adversarial.start_step >= self.trainer.max_steps:
                raise ValueError(
                    f"adversarial.start_step is {self.adversarial.start_step}, but training ends at trainer.max_steps "
                    f"{self.trainer.max_steps}; lower it, or leave adversarial out"
                )
        elif self.discriminator_optimizer != OptimizerConfig():
            raise ValueError("discriminator_optimizer has no effect without adversarial; leave it out")
        if self.trainer.precision == "bfloat16" and self.tokenizer.quantizer.kind not in ("fsq", "lfq"):
            raise ValueError(
                "trainer.precision bfloat16 would round the codebook; choose autocast_bfloat16 or float32, "
                "or tokenizer.quantizer.kind fsq or lfq, which have none"
            )


class Reconstruction(NamedTuple):
    """Pictures of one micro-batch, what came back, and what the quantizer asks for: sums over pictures."""

    images: Tensor
    reconstructions: Tensor
    quantizer_loss: Tensor
    quantizer_parts: dict[str, Tensor]


class ImageTokenizerTask(PictureTask):
    """What is trained, for the trainer: sums over pictures of losses that are means over the pixels of a picture."""

    def __init__(self, config: ImageTokenizerTrainingConfig) -> None:
        self.config = config
        self._held_out: Tensor | None = None
        self._perceptual: PerceptualLoss | None = None
        self._discriminator: PatchDiscriminator | None = None
        self._last_inputs: Tensor | None = None
        self._best_psnr = 0.0

    def build_model(self) -> ImageTokenizer:
        model = ImageTokenizer(self.config.tokenizer)  # first, so that its weights do not depend on the losses
        if self.config.losses.perceptual_weight:
            self._perceptual = PerceptualLoss(self.config.losses.perceptual)
        if self.config.adversarial and self.config.adversarial.adaptive:
            cast(Decoder, model.decoder).conv_out.register_forward_pre_hook(self._keep_last_inputs)
        return model

    def build_opponents(self) -> dict[str, Opponent]:
        if not self.config.adversarial:
            return {}
        self._discriminator = PatchDiscriminator(self.config.adversarial.discriminator)
        start = self.config.adversarial.start_step
        return {DISCRIMINATOR: Opponent(self._discriminator, self.config.discriminator_optimizer, start)}

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

    def batch_tokens(self, batch: PictureBatch) -> int:
        """Codes."""
        height, width = self.config.tokenizer.grid
        return len(batch.pixels) * height * width

    def losses(self, model: nn.Module, batch: PictureBatch, step: int) -> TokenLosses:
        """Sums over pictures without a discriminator: `loss` is what is minimised, the others its parts, unweighted."""
        found = self._reconstruct(model, batch, step)
        loss, parts = self._picture_loss(found.reconstructions, found.images)
        return self._sum(found, loss + found.quantizer_loss, parts)

    def rounds(
        self, networks: Mapping[str, nn.Module], batch: PictureBatch, step: int
    ) -> Iterator[tuple[str, TokenLosses]]:
        """The tokenizer's loss and, from `adversarial.start_step` on, the discriminator's on the same pictures."""
        adversarial = self.config.adversarial
        if adversarial is None or step < adversarial.start_step:
            losses = self.losses(networks[MODEL], batch, step)
            if adversarial:
                nothing = Sums(torch.zeros_like(losses.weight), torch.zeros_like(losses.weight))
                losses = losses._replace(metrics=losses.metrics | dict.fromkeys(CONTEST_METRICS, nothing))
            yield MODEL, losses
            return
        found = self._reconstruct(networks[MODEL], batch, step)
        yield MODEL, self._fooling_losses(networks[MODEL], found, adversarial)
        images = torch.cat([found.images, found.reconstructions.detach()]).to(self._discriminator_dtype)
        real, fake = networks[DISCRIMINATOR](images).float().chunk(2)
        loss = discriminator_loss(real, fake, adversarial.loss)
        values = (loss, *(logits.flatten(1).mean(-1).sum() for logits in (real, fake)))
        count = loss.new_tensor(float(len(found.images)))
        names = ("discriminator", "logits_real", "logits_fake")
        metrics = {name: Sums(value.detach(), count) for name, value in zip(names, values, strict=True)}
        yield DISCRIMINATOR, TokenLosses(loss, count, metrics)

    def _reconstruct(self, model: nn.Module, batch: PictureBatch, step: int) -> Reconstruction:
        images = to_images(batch.pixels)
        if step < self.config.augment_until * self.config.trainer.max_steps:
            images = augment(images, batch.draws, self.config.augment)
        reconstructions, quantized = model(images)
        assert isinstance(quantized, Quantized)
        parts = {name: part * len(images) for name, part in quantized.parts.items()}
        return Reconstruction(images, reconstructions, quantized.loss * len(images), parts)

    def _picture_loss(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What pictures are asked for without a discriminator, and its parts: sums over pictures."""
        errors, weights = reconstructions - images, self.config.losses
        parts = {"l1": errors.abs().flatten(1).mean(-1).sum(), "l2": errors.square().flatten(1).mean(-1).sum()}
        loss = weights.l1_weight * parts["l1"] + weights.l2_weight * parts["l2"]
        if self._perceptual:
            if self._perceptual.weights[0].device != images.device:
                self._perceptual.to(images.device)
            parts["perceptual"] = self._perceptual(reconstructions, images).sum()
            loss = loss + weights.perceptual_weight * parts["perceptual"]
        return loss, parts

    def _fooling_losses(self, model: nn.Module, found: Reconstruction, adversarial: AdversarialConfig) -> TokenLosses:
        """The tokenizer's losses with the discriminator's opinion.

        The gradients of both on the reconstructions are needed to weigh them, so they are taken there once and sent on.
        """
        count = found.quantizer_loss.new_tensor(float(len(found.images)))
        leaf = found.reconstructions.detach().requires_grad_()
        loss, parts = self._picture_loss(leaf, found.images)
        fooled = generator_loss(self._opinion(leaf), adversarial.loss)
        (wanted,), (given,) = (torch.autograd.grad(value, leaf) for value in (loss, fooled))
        scale = torch.ones_like(count)
        if adversarial.adaptive:
            decoder = cast(Decoder, model.decoder)  # DeepSpeed's engine forwards to the tokenizer
            again = self._redraw(decoder)
            pulls = [(again * (gradient / count)).sum() for gradient in (wanted, given)]
            scale = adaptive_weight(pulls[0], pulls[1], decoder.conv_out.weight, adversarial.max_adaptive_weight)
        weight = adversarial.weight * scale
        pulled = (found.reconstructions * (wanted + weight * given)).sum()
        objective = (loss + weight * fooled).detach() + (pulled - pulled.detach()) + found.quantizer_loss
        contest = {"adversarial": Sums(fooled.detach(), count), "adaptive_weight": Sums(scale * count, count)}
        losses = self._sum(found, objective, parts)
        return losses._replace(metrics=losses.metrics | contest)

    def _sum(self, found: Reconstruction, objective: Tensor, picture_parts: Mapping[str, Tensor]) -> TokenLosses:
        count = objective.new_tensor(float(len(found.images)))
        parts = {"loss": objective, **picture_parts, **found.quantizer_parts}
        return TokenLosses(objective, count, {name: Sums(part.detach(), count) for name, part in parts.items()})

    def _opinion(self, images: Tensor) -> Tensor:
        """The discriminator's logits, of which nothing reaches its own weights."""
        assert self._discriminator is not None
        frozen = {name: parameter.detach() for name, parameter in self._discriminator.named_parameters()}
        with self._autocast(images):
            return torch.func.functional_call(self._discriminator, frozen, (images.to(self._discriminator_dtype),))

    def _redraw(self, decoder: Decoder) -> Tensor:
        """The reconstructions once more, with a graph that holds the decoder's last layer only.

        DeepSpeed lets nobody but itself send gradients through what its engine has returned.
        """
        inputs, self._last_inputs = self._last_inputs, None
        assert inputs is not None
        with self._autocast(inputs):
            return decoder.patches(F.conv2d(inputs, decoder.conv_out.weight, padding=1)).float()

    def _keep_last_inputs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._last_inputs = inputs[0].detach()

    def _autocast(self, images: Tensor) -> torch.autocast:
        return autocast(self.config.trainer.precision, images.device.type)

    @property
    def _discriminator_dtype(self) -> torch.dtype:
        assert self._discriminator is not None
        return next(self._discriminator.parameters()).dtype

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Scores on the held-out pictures; every rank scores all of them.

        Raises:
            DivergedError: where they come back far worse than before.
        """
        pixels = self._held_out_pixels()
        if pixels is None:
            return {}
        assert isinstance(model, ImageTokenizer)
        scores = score_reconstructions(model, self._evaluation_batches(pixels))
        self._check_usage(scores)
        self._check_divergence(scores.psnr)
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
            scores = score_reconstructions(model, self._evaluation_batches(pixels))
            images = to_images(pixels[:PICTURES_SHOWN]).to(next(model.parameters()).device)
            rows = {ORIGINAL: images, DECODED: model.decode(model.encode(images))}
            save_sheet(rows, folder / "reconstructions.png")
        (folder / "README.md").write_text(card(self.config, scores), encoding="utf-8")

    def _evaluation_batches(self, pixels: Tensor) -> Iterator[Tensor]:
        size = max(1, EVALUATION_PIXELS // self.config.tokenizer.image_size**2)
        return (to_images(part) for part in pixels.split(size))

    def _held_out_pixels(self) -> Tensor | None:
        """uint8 `(N, 3, H, W)`, decoded once; None where no held-out data is given."""
        data = self.config.data
        if self._held_out is None and data.held_out:
            size, preprocess = self.config.tokenizer.image_size, self.config.tokenizer.preprocess
            _, self._held_out = decode_first(data.held_out, size, data.limits, data.max_held_out_pictures, preprocess)
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
                remedy(self.config.tokenizer.quantizer, "tokenizer.quantizer"),
            )

    def _check_divergence(self, psnr: float) -> None:
        self._best_psnr = max(self._best_psnr, psnr)
        allowed = self.config.max_psnr_drop
        if allowed and psnr < self._best_psnr - allowed:
            causes = "optimizer.lr" + (" or adversarial.weight" if self.config.adversarial else "")
            raise DivergedError(
                f"training diverges: held-out PSNR fell from {self._best_psnr:.1f} to {psnr:.1f} dB, more than "
                f"max_psnr_drop {allowed:g}; lower {causes}, and write the name of an earlier checkpoint into "
                f"{self.config.trainer.run_dir / 'checkpoints' / 'latest'} to go on from it"
            )


def card(config: ImageTokenizerTrainingConfig, scores: ReconstructionScores | None) -> str:
    """A model card in Markdown."""
    tokenizer, trainer = config.tokenizer, config.trainer
    height, width = tokenizer.grid
    about = (
        f"Codes pictures of {tokenizer.image_size} x {tokenizer.image_size} pixels as {height} x {width} codes "
        f"(quantizer `{tokenizer.quantizer.kind}`), and draws pictures from codes. Trained by mixmodal "
        f"for {trainer.max_steps:,} steps of {describe_batch(trainer, 'pictures')}."
    )
    example = [
        "from mixmodal.tokenization.image import ImageTokenizer",
        "",
        'tokenizer = ImageTokenizer.load("this/folder")',
        "codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1]",
        "images = tokenizer.decode(codes)",
    ]
    shown = {name: f"{value:,.4g}" for name, value in asdict(scores).items()} if scores else {}
    note = "`reconstructions.png` shows held-out originals, each above its reconstruction." if scores else ""
    return build_card("Image tokenizer", about, config.data.train, shown, example, note=note)


def train_image_tokenizer(config: ImageTokenizerTrainingConfig) -> FitResult:
    """Train an image tokenizer; the result is the folder `export` of the run.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(ImageTokenizerTask(config))
