"""Pretraining: a transformer on packed documents of text and codes, by the causal masked objective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments, held_out_batches
from mixmodal.data.token_shards import TokenShards
from mixmodal.files import write_whole
from mixmodal.interop.export import CONFIG, WEIGHTS, save_export
from mixmodal.models.packed_rows import AttentionKind
from mixmodal.models.transformer import Transformer, TransformerConfig, save_weights
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.objectives.loss import Sums, TokenLosses, target_weights
from mixmodal.objectives.output_loss import OutputLoss
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.training.config import TrainerConfig
from mixmodal.training.metrics import MetricSums
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import Task, to_device
from mixmodal.training.trainer import FitResult, Trainer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrains a transformer on token shards.

    Args:
        model: shape of the network.
        data: token shards and how documents are varied and packed.
        objective: masks.
        optimizer: AdamW and its schedule.
        trainer: how long, how much, where.
        z_loss_weight: factor of `log(Z)^2` in the loss (Chameleon: 1e-5).
        attention: how it is kept within the documents of a row; the results are the same. `dense` computes whole rows
            under a mask; `documents` (best on the CPU) each document for itself, and nothing in padding; `flex` (CUDA)
            skips empty blocks of the mask; `auto` takes what suits the device.
        text_tokenizer: model file; must be the one that the token shards were made with.
        image_tokenizer: folder; likewise. Without both tokenizers, the network alone is exported.
        card: sections of the exported model card: title, data, attribution, limits.
    """

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig
    objective: CausalMaskedConfig = field(default_factory=CausalMaskedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig
    z_loss_weight: float = 1e-5
    attention: AttentionKind = "auto"
    text_tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    card: dict[str, str] = field(default_factory=dict)


class ModelLosses(NamedTuple):
    """The losses of `OutputLoss`, and norms that tell a divergence early (Chameleon, arXiv 2405.09818, 2.3.2)."""

    objective: Tensor
    metrics: Mapping[str, Sums]


class PretrainTask(Task):
    """What `pretrain` trains.

    Args:
        config: see there.

    Raises:
        ValueError: naming the manifest and the key, where token shards and tokenizers do not belong together; naming
            the model's option that does not fit the data.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.shards = TokenShards.open(config.data.tokens)
        self.vocabulary = self.shards.vocabulary
        self.held_out = TokenShards.open(config.data.held_out_tokens) if config.data.held_out_tokens else None
        if self.held_out:
            made_with = {key: self.shards.manifest[key] for key in ("text_tokenizer_sha256", "image_tokenizer_sha256")}
            self.held_out.check(**made_with, vocabulary_digest=self.vocabulary.digest)
            found, wanted = (shards.manifest["sequence_format"] for shards in (self.held_out, self.shards))
            if found != wanted:
                raise ValueError(
                    f"{self.held_out.manifest_path}: sequence_format is {found}, not {wanted} as in "
                    f"{self.shards.manifest_path}; pretokenize one of them again"
                )
        self._check_tokenizers()
        self.model_config = fit_to_data(config.model, self.vocabulary.size, config.data.seq_len)
        self.objective = CausalMasked(config.objective, self.vocabulary)
        self.figures: dict[str, float | None] = {}
        self._split = (0, 1)

    def _check_tokenizers(self) -> None:
        text, image = self.config.text_tokenizer, self.config.image_tokenizer
        if (text is None) != (image is None):
            raise ValueError("text_tokenizer and image_tokenizer: give both, or none to export the network alone")
        if text is None or image is None:
            if self.config.card:
                raise ValueError("card: a model card is written with both tokenizers only; give them or leave it out")
            return
        from mixmodal.tokenization.image import ImageTokenizer

        self.shards.check(
            text_tokenizer_sha256=TextTokenizer.load(text).sha256, image_tokenizer_sha256=ImageTokenizer.sha256(image)
        )

    def build_model(self) -> nn.Module:
        model = Transformer(self.model_config)
        model.attention_kind = self.config.attention
        return model

    def compile_model(self, model: nn.Module) -> None:
        if self.config.attention == "documents":
            raise ValueError(
                "trainer.compile needs the same shapes in every step, which attention documents does not give; "
                "set attention to auto, or leave trainer.compile out"
            )
        assert isinstance(model, Transformer)
        model.compile_blocks()

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> PackedDocuments:
        self._split = (rank, world_size)
        return PackedDocuments(
            self.shards,
            self.shards.build_format(),
            self.objective,
            self.config.data,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=self.config.trainer.seed,
        )

    def batch_weight(self, batch: Batch) -> Tensor:
        return target_weights(batch.segment_ids, batch.loss_weights).sum()

    def batch_keys(self, batch: Batch) -> list[str]:
        return [key for row in batch.keys for key in row]

    def batch_tokens(self, batch: Batch) -> int:
        return int(batch.num_tokens)

    def flops_per_token(self) -> float:
        """Six operations a weight of the matrix products, and attention over the row (PaLM, 2204.02311, appendix B)."""
        config = self.model_config
        with torch.device("meta"):
            model = Transformer(config)
        tables = [model.embedding.weight, *([model.positions.weight] if model.positions else [])]
        weights = sum(parameter.numel() for parameter in model.parameters()) - sum(table.numel() for table in tables)
        if config.tie_embeddings:  # the table is the output matrix, too
            weights += model.embedding.weight.numel()
        sizes = config.attention_sizes
        attention = 12 * config.num_layers * sizes["num_heads"] * sizes["head_dim"] * self.config.data.seq_len
        return 6.0 * weights + attention

    def losses(self, model: nn.Module, batch: Batch, step: int) -> ModelLosses:
        trainer = self.config.trainer
        logs = (step + 1) % trainer.log_every == 0 or step + 1 == trainer.max_steps
        found, hidden = self._call(model, batch, measure=logs)
        metrics = dict(found.metrics)
        if logs:
            metrics["output_norm"] = mean_norm(hidden, batch.segment_ids)
        return ModelLosses(found.objective, metrics)

    def _call(self, model: nn.Module, batch: Batch, measure: bool = False) -> tuple[TokenLosses, Tensor]:
        """Losses without logits of all positions at once, and the hidden states."""
        loss = OutputLoss(
            batch.tokens,
            batch.segment_ids,
            batch.loss_weights,
            self.vocabulary,
            self.config.z_loss_weight,
            measure=measure,
        )
        reduced, hidden = model(batch.tokens, batch.positions, batch.segment_ids, return_hidden=True, reduce=loss)
        return loss.collect(reduced), hidden

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """The losses on held-out documents as they are stored."""
        if self.held_out is None:
            return {}
        rank, world_size = self._split
        device = next(model.parameters()).device
        sums = MetricSums()
        batches = held_out_batches(
            self.held_out,
            self.objective,
            self.config.data,
            micro_batch_size=self.config.trainer.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for batch in batches:
            sums.add(self._call(model, to_device(batch, device))[0].metrics)
        self.figures = sums.means()
        return self.figures

    def export(self, model: nn.Module, folder: Path) -> None:
        text, image = self.config.text_tokenizer, self.config.image_tokenizer
        if text is None or image is None:
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(model, folder / WEIGHTS)
            config = {"format_version": 1, "model": asdict(self.model_config)}
            write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())
            return
        assert isinstance(model, Transformer)
        counts = self.shards.manifest["counts"]
        data = {name: counts[name] for name in counts if isinstance(counts[name], int)}
        figures = {f"held-out {name}, nats a token": round(v, 4) for name, v in self.figures.items() if v is not None}
        card = {"title": self.config.trainer.run_dir.name, "data": data, "figures": figures, **self.config.card}
        save_export(folder, model, self.shards.build_format(), text, image, card)


def fit_to_data(config: TransformerConfig, vocab_size: int, seq_len: int) -> TransformerConfig:
    """The model's config with the vocabulary's size filled in.

    Raises:
        ValueError: for a vocabulary or rows that the model is too small for.
    """
    if config.vocab_size == 0:
        config = replace(config, vocab_size=vocab_size)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.vocab_size}, but the data's vocabulary has {vocab_size} ids; set it to 0"
        )
    if config.max_seq_len < seq_len:
        raise ValueError(f"model.max_seq_len is {config.max_seq_len}, below data.seq_len {seq_len}; raise it")
    return config


@torch.no_grad()
def mean_norm(vectors: Tensor, segment_ids: Tensor) -> Sums:
    """Sum over tokens `(B, T)` that are not padding of the length of `(B, T, X)`, and their number."""
    real = segment_ids != 0
    norms = torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=torch.float32)
    return Sums((norms * real).sum(), real.sum().float())


def pretrain(config: PretrainConfig) -> FitResult:
    """Trains, and exports to `trainer.run_dir/export`.

    Raises:
        ValueError: where config, data and tokenizers do not fit together.
    """
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(PretrainTask(config))
