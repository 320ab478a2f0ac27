"""Trains a denoiser of pictures that is told a class or a text, which diffusion classifiers score pictures with.

The loss is the squared error of what the U-Net predicts, noise (arXiv 2006.11239, equation 14) or velocity (arXiv
2202.00512, section 4), at times drawn evenly. Conditions are dropped now and then (arXiv 2207.12598, section 3.2), so
that the same network knows p(picture), and guidance can be used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmodal.classification.datasets import NamedClass, read_classes
from mixmodal.classification.denoiser import PREPROCESS, save_denoiser
from mixmodal.data.augment import AugmentConfig, augment
from mixmodal.data.denoising import (
    DenoisingBatch,
    DenoisingDataConfig,
    DenoisingLoader,
    build_reader,
    decode_held_out,
)
from mixmodal.data.pictures import to_images
from mixmodal.models.denoiser import (
    Denoiser,
    DenoiserConfig,
    TextEncoderConfig,
    build_scheduler,
    empty_like,
    import_diffusers,
)
from mixmodal.objectives.loss import Sums, TokenLosses
from mixmodal.tokenization.conditions import ClassNames, ConditionEncoder, TextTokens
from mixmodal.tokenization.text_files import PieceTokenizer, load_text_tokenizer
from mixmodal.training.cards import build_card, describe_batch
from mixmodal.training.deepspeed_config import refuse_stage_3
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import PictureTask, to_device
from mixmodal.training.trainer import FitResult, Trainer, TrainerConfig

EVALUATED_AT_A_TIME = 64
"""Pictures."""


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainingConfig:
    """How to train a denoiser.

    Args:
        data: pictures to train and to evaluate on, with classes or captions.
        model: what is trained; its image_size is the size of the pictures.
        trainer: how long, how much, where.
        optimizer: AdamW and its schedule.
        augment: random changes of the pictures; classes and captions stay what they are.
        condition_dropout: share of the pictures whose condition is dropped, 0 .. 1.
    """

    data: DenoisingDataConfig
    model: DenoiserConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.condition_dropout <= 1:
            problems.append(f"condition_dropout is {self.condition_dropout}; it must lie in 0 .. 1")
        if self.data.classes is not None and self.model.text != TextEncoderConfig():
            problems.append(
                "model.text can not act where data.classes is given, which no text is read for; leave it out"
            )
        if self.trainer.peak_flops is not None:
            problems.append("trainer.peak_flops can not act: operations of denoisers are not counted; leave it out")
        if problems:
            raise ValueError("; ".join(problems))


class DiffusionTask(PictureTask):
    """What is trained, for the trainer: sums over pictures of squared errors that are means over their pixels.

    Raises:
        ValueError: where the classes or the text tokenizer can not be read, or diffusers is not installed.
    """

    def __init__(self, config: DiffusionTrainingConfig) -> None:
        self.config = config
        self.scheduler = build_scheduler(config.model)
        self.classes: list[NamedClass] = []
        self.tokenizer: PieceTokenizer | None = None
        self._held_out: DenoisingBatch | None = None
        names = None
        if config.data.classes is not None:
            self.classes = read_classes(config.data.classes)
            names = ClassNames(self.classes)
            self.conditions: ConditionEncoder = names
        else:
            assert config.data.text_tokenizer is not None
            self.tokenizer = load_text_tokenizer(config.data.text_tokenizer)
            self.conditions = TextTokens(self.tokenizer, config.model.text.max_text_tokens)
        self.read = build_reader(names)

    def build_model(self) -> Denoiser:
        num_pieces = self.tokenizer.num_pieces if self.tokenizer else 0
        return Denoiser(self.config.model, num_classes=len(self.classes), num_pieces=num_pieces)

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> DenoisingLoader:
        return DenoisingLoader(
            self.config.data,
            self.conditions.encode,
            self.read,
            self._spelling(),
            image_size=self.config.model.image_size,
            preprocess=PREPROCESS,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=self.config.trainer.seed,
        )

    def _spelling(self) -> dict[str, Any]:
        """What conditions mean to the weights."""
        if self.tokenizer:
            most = self.config.model.text.max_text_tokens
            return {"text_tokenizer_sha256": self.tokenizer.sha256, "max_text_tokens": most}
        labels = "\n".join(one.label for one in self.classes)
        return {"classes_sha256": hashlib.sha256(labels.encode()).hexdigest()}

    def losses(self, model: nn.Module, batch: DenoisingBatch, step: int) -> TokenLosses:
        """Sums over the pictures of this rank."""
        images = augment(to_images(batch.pixels), batch.draws, self.config.augment)
        dropped = (batch.drops < self.config.condition_dropout).view(-1, *[1] * (batch.conditions.ndim - 1))
        conditions = torch.where(dropped, empty_like(batch.conditions, len(self.classes)), batch.conditions)
        errors = self._errors(model, images, batch, conditions)
        objective = errors.sum()
        count = objective.new_tensor(float(len(images)))
        return TokenLosses(objective, count, {"loss": Sums(objective.detach(), count)})

    def _errors(self, model: nn.Module, images: Tensor, batch: DenoisingBatch, conditions: Tensor) -> Tensor:
        """Mean squared errors of pictures in the space of what is predicted, float32 `(B,)`."""
        timesteps = (batch.times * self.config.model.num_timesteps).long()
        noisy = self.scheduler.add_noise(images, batch.noise, timesteps)
        target = batch.noise
        if self.config.model.prediction == "v_prediction":
            target = self.scheduler.get_velocity(images, batch.noise, timesteps)
        return (model(noisy, timesteps, conditions) - target).square().flatten(1).mean(-1)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, Denoiser)
        return model.blocks

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Loss on held-out pictures, with their conditions and without any; every rank computes all of them."""
        data = self.config.data
        if self._held_out is None and data.held_out:
            size = self.config.model.image_size
            self._held_out = decode_held_out(data, size, self.conditions.encode, self.read)
        if self._held_out is None:
            return {}
        assert isinstance(model, Denoiser)
        device = next(model.parameters()).device
        told, untold = [], []
        for places in torch.arange(len(self._held_out.keys)).split(EVALUATED_AT_A_TIME):
            batch = to_device(select(self._held_out, places), device)
            images = to_images(batch.pixels)
            told.append(self._errors(model, images, batch, batch.conditions))
            untold.append(self._errors(model, images, batch, empty_like(batch.conditions, len(self.classes))))
        losses = [float(torch.cat(parts).double().mean()) for parts in (told, untold)]
        return dict(zip(("loss", "loss_unconditional"), losses))

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes a folder of diffusers with a card; `classification.denoiser` tells what is in it."""
        assert isinstance(model, Denoiser)
        save_denoiser(
            model,
            folder,
            scheduler=self.scheduler,
            card=card(self.config, self.evaluate(model), len(self.classes)),
            classes=self.classes,
            tokenizer=self.tokenizer,
        )


def select(batch: DenoisingBatch, places: Tensor) -> DenoisingBatch:
    """The pictures at `places`, int64 `(N,)`."""
    tensors = {name: entry[places] for name, entry in batch._asdict().items() if isinstance(entry, Tensor)}
    return batch._replace(**tensors, keys=[batch.keys[place] for place in places.tolist()])


def card(config: DiffusionTrainingConfig, scores: Mapping[str, Any], num_classes: int) -> str:
    """A model card in Markdown."""
    model, trainer = config.model, config.trainer
    told = f"one of {num_classes} classes" if num_classes else f"a text of up to {model.text.max_text_tokens} tokens"
    said = {"epsilon": "the noise", "v_prediction": "the velocity"}[model.prediction]
    about = (
        f"A U-Net that predicts {said} in pictures of {model.image_size} x {model.image_size} pixels and is told "
        f"{told}, or nothing. Trained by mixmodal for {trainer.max_steps:,} steps of "
        f"{describe_batch(trainer, 'pictures')}; {config.condition_dropout:.0%} of them without what they show."
    )
    conditions = '["a label of classes.txt"]' if num_classes else '["a red apple"]'
    example = [
        "from mixmodal.classification.denoiser import load_denoiser",
        "",
        'denoiser = load_denoiser("this/folder")',
        "# noisy (B, 3, H, W) in [-1, 1] and noise, timesteps (B,)",
        f"prediction = denoiser.unet(noisy, timesteps, **denoiser.encode({conditions})).sample",
    ]
    shown = {name: f"{value:.4f}" for name, value in scores.items()}
    title = f"Denoiser told {'a class' if num_classes else 'a text'}"
    return build_card(title, about, config.data.train, shown, example, library="diffusers")


def train_diffusion(config: DiffusionTrainingConfig) -> FitResult:
    """Train a denoiser; the result is the folder `export` of the run.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    import_diffusers()
    refuse_stage_3(config.trainer, "denoisers")
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(DiffusionTask(config))
