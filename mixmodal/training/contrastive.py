"""Trains a two-tower encoder on captioned pictures, so that retrieval needs no foreign weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmodal.data.augment import AugmentConfig, augment
from mixmodal.data.pairs import (
    PairBatch,
    PairDataConfig,
    PairLoader,
    decode_first_pairs,
    identify,
    read_captions,
)
from mixmodal.data.pictures import to_images
from mixmodal.evaluation.recall import chance_at, recall_at
from mixmodal.files import write_whole
from mixmodal.interop.two_tower import PREPROCESS, save_two_tower
from mixmodal.models.two_tower import MAX_SCALE, TwoTower, TwoTowerConfig, import_transformers
from mixmodal.objectives.contrastive import clamp_above, gather_pairs, infonce_loss, sigmoid_loss
from mixmodal.objectives.loss import Sums, TokenLosses
from mixmodal.tokenization.captions import build_caption_tokenizer, encode_captions, text_ids, train_caption_tokenizer
from mixmodal.training.cards import build_card
from mixmodal.training.checkpoint import describe, gather_objects, whole_checkpoints
from mixmodal.training.deepspeed_config import refuse_stage_3
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import PictureTask
from mixmodal.training.trainer import FitResult, Trainer, TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EVALUATED_AT_A_TIME = 256
"""Pairs."""
RECALLED = (1, 5)
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class EncoderTrainingConfig:
    """How to train a two-tower encoder.

    A pair is told from all other pairs of its micro-batch, those of the other ranks among them: so `trainer.
    micro_batch_size` times the number of ranks decides how hard the task is, and `trainer.grad_accum_steps` does not.

    Args:
        data: captioned pictures to train and to evaluate on.
        model: what is trained; its image_size is the size of the pictures.
        trainer: how long, how much, where.
        optimizer: AdamW and its schedule.
        augment: random changes of the pictures; captions stay what they are, also where they say left and right.
        mask_same_captions: pairs whose captions have the same tokens are not each other's negatives; without it a
            picture is pushed away from a text that is true of it.
    """

    data: PairDataConfig
    model: TwoTowerConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mask_same_captions: bool = True

    def __post_init__(self) -> None:
        if self.trainer.peak_flops is not None:
            raise ValueError("trainer.peak_flops can not act: operations of encoders are not counted; leave it out")


class HeldOut(NamedTuple):
    """Pairs to evaluate on: ids `(N, T)`, what tells captions apart `(N,)`, and pixels, uint8 `(N, 3, H, W)`."""

    tokens: Tensor
    caption_ids: Tensor
    pixels: Tensor


class EncoderTask(PictureTask):
    """What is trained, for the trainer: sums over pairs, each of which is compared with those of its micro-batch."""

    def __init__(self, config: EncoderTrainingConfig) -> None:
        self.config = config
        self._contents = ""
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._held_out: HeldOut | None = None
        self._end = -1

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        assert self._tokenizer is not None
        return self._tokenizer

    def build_model(self) -> TwoTower:
        model = self.config.model
        self._contents = self._find_tokenizer()
        self._tokenizer = build_caption_tokenizer(self._contents, model.kind, model.max_text_tokens)
        ids = text_ids(self._tokenizer)
        self._end = ids.end
        return TwoTower(model, ids)

    def _find_tokenizer(self) -> str:
        """The tokenizer of the run, which rank 0 learns where it begins.

        Raises:
            ValueError: on all ranks, where there is nothing to learn from.
        """
        contents, problem = "", None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                contents = self._learn_tokenizer()
            except Exception as error:
                problem = error
        # all ranks come here, with or without a problem: none waits for one that has given up
        (contents, said), *_ = gather_objects((contents, describe(problem) if problem else ""))
        if problem:
            raise problem
        if said:
            raise ValueError(f"rank 0: {said}")
        return contents

    def _learn_tokenizer(self) -> str:
        run_dir, model = self.config.trainer.run_dir, self.config.model
        path = run_dir / TOKENIZER_FILE
        if path.exists() and whole_checkpoints(run_dir / "checkpoints"):
            return path.read_text(encoding="utf-8")
        data = self.config.data
        contents = train_caption_tokenizer(read_captions(data), model.kind, model.vocab_size, data.caption_until)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, contents.encode())
        return contents

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> PairLoader:
        if micro_batch_size * world_size < 2:
            raise ValueError(
                "trainer.micro_batch_size is 1 on one process: a pair without others can not be told from any; raise it"
            )
        model = self.config.model
        return PairLoader(
            self.config.data,
            lambda captions: encode_captions(self.tokenizer, captions, model),
            {
                "vocab_size": model.vocab_size,
                "max_text_tokens": model.max_text_tokens,
                "tokenizer_sha256": hashlib.sha256(self._contents.encode()).hexdigest(),
            },
            image_size=model.image_size,
            preprocess=PREPROCESS,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=self.config.trainer.seed,
        )

    def batch_tokens(self, batch: PairBatch) -> int:
        """Tokens of the texts, without padding, and patches."""
        texts = int(batch.tokens.ne(self._end).sum()) + len(batch.tokens)  # the end token pads, and counts once
        return texts + len(batch.tokens) * self.config.model.num_patches

    def losses(self, model: nn.Module, batch: PairBatch, step: int) -> TokenLosses:
        """Sums over the pairs of this rank."""
        images = augment(to_images(batch.pixels), batch.draws, self.config.augment)
        features = model(batch.tokens, images)
        most = MAX_SCALE[self.config.model.kind]
        log_scale = features.log_scale if most is None else clamp_above(features.log_scale, math.log(most))
        ids = batch.caption_ids if self.config.mask_same_captions else None
        pairs, scale = gather_pairs(features.text_BD, features.image_BD, ids), log_scale.exp()
        if self.config.model.kind == "clip":
            objective = infonce_loss(pairs, scale)
        else:
            objective = sigmoid_loss(pairs, scale, features.bias)
        count = objective.new_tensor(float(len(images)))
        values = {"loss": objective, "temperature": count / scale}
        if self.config.model.kind == "siglip":
            values["logit_bias"] = count * features.bias
        return TokenLosses(objective, count, {name: Sums(value.detach(), count) for name, value in values.items()})

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, TwoTower)
        return model.blocks

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Recall among the held-out pairs, with chance beside it; every rank scores all of them."""
        held_out = self._held_out_pairs()
        if held_out is None:
            return {}
        assert isinstance(model, TwoTower)
        device = next(model.parameters()).device
        tokens, pixels = (part.split(EVALUATED_AT_A_TIME) for part in (held_out.tokens, held_out.pixels))
        texts = torch.cat([model.encode_text(part.to(device)) for part in tokens])
        images = torch.cat([model.encode_image(to_images(part.to(device))) for part in pixels])
        ids = held_out.caption_ids.to(device)
        found: dict[str, float | None] = {}
        for name, queries, candidates in (("text_to_image", texts, images), ("image_to_text", images, texts)):
            shares = recall_at(queries, candidates, ids, ids, RECALLED)
            found |= {f"recall{k}_{name}": share for k, share in zip(RECALLED, shares)}
        chances = chance_at(ids.tolist(), ids.tolist(), RECALLED)
        return found | {f"chance{k}": share for k, share in zip(RECALLED, chances)}

    def _held_out_pairs(self) -> HeldOut | None:
        """Decoded once; None where no held-out data is given."""
        data, model = self.config.data, self.config.model
        if self._held_out is None and data.held_out:
            most = data.max_held_out_pictures
            pairs = decode_first_pairs(data.held_out, model.image_size, data.limits, most, PREPROCESS)
            tokens = encode_captions(self.tokenizer, [pair.caption for pair in pairs], model)
            self._held_out = HeldOut(tokens, identify(tokens), torch.stack([pair.pixels for pair in pairs]))
        return self._held_out

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes a folder of transformers with a card."""
        assert isinstance(model, TwoTower)
        settings = self.config.model
        tokenizer = build_caption_tokenizer(self._contents, settings.kind, settings.max_text_tokens)
        text = card(self.config, self.evaluate(model))
        save_two_tower(model, tokenizer, folder, text, max_scale=MAX_SCALE[settings.kind])


def card(config: EncoderTrainingConfig, scores: Mapping[str, Any]) -> str:
    """A model card in Markdown."""
    model, trainer = config.model, config.trainer
    split = f"{trainer.micro_batch_size} pairs on each device, micro-batches a step: "
    split += (
        f"those of {trainer.global_batch_size} pairs" if trainer.global_batch_size else f"{trainer.grad_accum_steps}"
    )
    about = (
        f"A {model.kind} with features of length {model.feature_dim} for pictures of {model.image_size} x "
        f"{model.image_size} pixels and texts of up to {model.max_text_tokens} tokens. Trained by mixmodal for "
        f"{trainer.max_steps:,} steps of {split}."
    )
    padding = "True" if model.kind == "clip" else '"max_length"'
    example = [
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model, processor = (auto.from_pretrained("this/folder") for auto in (AutoModel, AutoProcessor))',
        'inputs = processor(text=["a red apple"], images=[picture], return_tensors="pt",',
        f"                   padding={padding}, truncation=True)",
    ]
    shown = {name: f"{value:.4f}" for name, value in scores.items()}
    title = "Encoder of texts and pictures"
    return build_card(title, about, config.data.train, shown, example, library="transformers")


def train_encoder(config: EncoderTrainingConfig) -> FitResult:
    """Train a two-tower encoder; the result is the folder `export` of the run, which transformers loads.

    Raises:
        ValueError: naming the key or the file that can not work.
    """
    import_transformers()
    refuse_stage_3(config.trainer, "encoders")
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(EncoderTask(config))
