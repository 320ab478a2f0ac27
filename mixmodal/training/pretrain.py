"""Pretraining: a transformer on packed documents of text and codes, by the causal masked objective."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL.Image import Image as Picture
from torch import Tensor, nn

from mixmodal.data.held_out import held_out_batches
from mixmodal.data.mixture import counters
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments, open_retrievals, open_sources
from mixmodal.data.token_shards import TokenShards
from mixmodal.evaluation.compression import in_bits
from mixmodal.files import write_whole
from mixmodal.interop.export import CONFIG, WEIGHTS, save_export
from mixmodal.models.packed_rows import AttentionKind
from mixmodal.models.transformer import Transformer, TransformerConfig, save_weights
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.objectives.loss import Sums, TokenLosses, target_weights
from mixmodal.objectives.modality_weights import check_modality_weights, weigh_modalities
from mixmodal.objectives.output_loss import OutputLoss
from mixmodal.tokenization.text_files import load_text_tokenizer
from mixmodal.training.attention_logits import attention_logit_max
from mixmodal.training.base_model import BaseModel, build_shape
from mixmodal.training.config import TrainerConfig
from mixmodal.training.metrics import MetricSums, Peak
from mixmodal.training.operations import Operations, count_operations
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.task import Task, to_device
from mixmodal.training.trainable import TrainableConfig, restrict
from mixmodal.training.trainer import FitResult, Trainer

if TYPE_CHECKING:
    from mixmodal.training.sample_sheet import SampleSheet


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrains a transformer on token shards.

    Args:
        model: shape of the network; with `init_from` left out but for `dropout`, or the same as there.
        init_from: folder of an exported or imported model, from whose weights, stored in any type, training starts.
            Token shards must have its vocabulary. A run that goes on takes those of its checkpoint. Attribution and
            limits of its model card go into the new one.
        trainable: which parameters are trained, and which rows of embedding and output; all by default.
        data: token shards and how documents are varied and packed.
        objective: masks.
        optimizer: AdamW and its schedule.
        trainer: how long, how much, where.
        z_loss_weight: factor of `log(Z)^2` in the loss (Chameleon: 1e-5).
        modality_weights: factors on the loss weights by what is predicted, as `{image: 0.5}`; `text`, `image` and every
            other coded modality, and `control` for control tokens. One that is not named has 1. `loss` is then the
            mean with these weights, and each modality's own mean stays what it is, but for a factor of 0, with which
            it is not logged; held-out losses are not weighed.
        attention: how it is kept within the documents of a row; the results are the same. `dense` computes whole rows
            under a mask; `documents` (best on the CPU) each document for itself, and nothing in padding; `flex` (CUDA)
            skips empty blocks of the mask; `auto` takes what suits the device.
        text_tokenizer: model file; must be the one that the token shards were made with.
        image_tokenizer: folder; likewise. By default both are those of `init_from`; without both, the network alone is
            exported.
        sample_every: evaluations from one sample sheet to the next: pictures for held-out captions, in TensorBoard.
            There is one at the end, too; 0 makes none. It needs both tokenizers and held-out documents.
        num_samples: captions on a sample sheet.
        card: sections of the exported model card: title, data, attribution, limits.
    """

    model: TransformerConfig = field(default_factory=TransformerConfig)
    init_from: Path | None = None
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    data: DataConfig
    objective: CausalMaskedConfig = field(default_factory=CausalMaskedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig
    z_loss_weight: float = 1e-5
    modality_weights: dict[str, float] = field(default_factory=dict)
    attention: AttentionKind = "auto"
    text_tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    sample_every: int = 0
    num_samples: int = 8
    card: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss_weight < float("inf"):
            raise ValueError(f"z_loss_weight is {self.z_loss_weight}; it must not be negative")
        if self.sample_every < 0 or self.num_samples < 1:
            raise ValueError(
                f"sample_every is {self.sample_every} and num_samples {self.num_samples}; at least 0 and 1"
            )
        if self.trainer.eval_every and not self.data.held_out_tokens:
            raise ValueError("trainer.eval_every can not act without data.held_out_tokens; give it, or set it to 0")
        needed = {
            "text_tokenizer": self.text_tokenizer,
            "image_tokenizer": self.image_tokenizer,
            "data.held_out_tokens": self.data.held_out_tokens,
            "trainer.tensorboard": self.trainer.tensorboard,
        }
        missing = [name for name, value in needed.items() if not value]
        if self.sample_every and missing:
            raise ValueError(
                f"sample_every can not act without {', '.join(missing)}; give it, or set sample_every to 0"
            )
        if not self.sample_every and self.num_samples != type(self).__dataclass_fields__["num_samples"].default:
            raise ValueError("num_samples can not act where sample_every is 0; leave it out")


class ModelLosses(NamedTuple):
    """The losses of `OutputLoss`, and norms that tell a divergence early (Chameleon, arXiv 2405.09818, 2.3.2)."""

    objective: Tensor
    metrics: Mapping[str, Sums | Peak]


class PretrainTask(Task):
    """What `pretrain` trains.

    Args:
        config: see there.

    Raises:
        ValueError: naming the manifest and the key, where token shards and tokenizers do not belong together; naming
            the model's option that does not fit the data.
    """

    chunk_elements: int | None = None
    """Logits that stand at a time, for a plan: by default those of the device at hand."""
    trains_pairs = False
    """Whether its documents are pairs of answers, of which no others know what to do."""
    _looked_at = -1  # the step whose attention was looked at last

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        late = [stage.from_step for stage in config.data.stages if stage.from_step >= config.trainer.max_steps]
        if late:
            raise ValueError(
                f"data.stages: from_step {late[0]} is not below trainer.max_steps {config.trainer.max_steps}"
            )
        self.sources = open_sources(config.data)
        self.shards = next(iter(self.sources.values()))
        self.retrievals = open_retrievals(config.data, self.sources)
        self.vocabulary = self.shards.vocabulary
        self.held_out = TokenShards.open(config.data.held_out_tokens) if config.data.held_out_tokens else None
        if self.held_out:
            self.held_out.check_like(self.shards)
        for shards in [*self.sources.values(), *([self.held_out] if self.held_out else [])]:
            shards.check_pairs(self.trains_pairs)
        self.base = BaseModel(config.init_from) if config.init_from else None
        if self.base:
            self.base.check(self.shards)
            self._take_tokenizers(self.base)
        self._check_tokenizers()
        check_modality_weights(config.modality_weights, self.vocabulary)
        self.model_config = build_shape(config.model, self.base, self.vocabulary.size, config.data.seq_len)
        self.objective = CausalMasked(config.objective, self.vocabulary)
        self.figures: dict[str, float | None] = {}
        self.draws_pictures = config.sample_every > 0
        self._sheet = self._build_sheet() if self.draws_pictures else None
        self._text_bytes = self._build_text_bytes()
        self._split = (0, 1)

    def _take_tokenizers(self, base: BaseModel) -> None:
        if base.tokenizers and not (self.config.text_tokenizer or self.config.image_tokenizer):
            text, image = base.tokenizers
            self.config = replace(self.config, text_tokenizer=text, image_tokenizer=image)

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
            text_tokenizer_sha256=load_text_tokenizer(text).sha256, image_tokenizer_sha256=ImageTokenizer.sha256(image)
        )

    def _build_sheet(self) -> SampleSheet:
        from mixmodal.training.sample_sheet import SampleSheet  # and with it an image tokenizer

        config = self.config
        assert self.held_out
        assert config.text_tokenizer
        assert config.image_tokenizer
        files = config.text_tokenizer, config.image_tokenizer
        return SampleSheet(self.held_out, *files, count=config.num_samples, max_len=config.data.seq_len)

    def _build_text_bytes(self) -> Tensor | None:
        """Bytes of UTF-8 that each id stands for, `(V,)`, 0 for what is not text; None without a text tokenizer."""
        if self.config.text_tokenizer is None:
            return None
        table = torch.zeros(self.vocabulary.size)
        pieces = self.vocabulary.ids("text")
        tokenizer = load_text_tokenizer(self.config.text_tokenizer, len(pieces))
        table[pieces.start : pieces.stop] = torch.tensor(tokenizer.piece_bytes, dtype=table.dtype)
        return table

    def build_model(self) -> nn.Module:
        model = self.base.build(self.model_config) if self.base else Transformer(self.model_config)
        model.attention_kind = self.config.attention
        self.restrict(model)
        return model

    def restrict(self, model: nn.Module) -> None:
        """Freezes what is not trained."""
        restrict(model, self.config.trainable, self.vocabulary)

    def recomputed(self, model: nn.Module) -> Iterable[nn.Module]:
        assert isinstance(model, Transformer)
        return model.blocks

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
            self.sources,
            self.shards.build_format(),
            self.objective,
            self.config.data,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            rank=rank,
            world_size=world_size,
            seed=self.config.trainer.seed,
            retrieval=self.retrievals,
        )

    def counters(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        return counters(state)

    def batch_weight(self, batch: Batch) -> Tensor:
        batch = self._weigh(batch)
        return target_weights(batch.segment_ids, batch.loss_weights).sum()

    def _weigh(self, batch: Batch) -> Batch:
        factors = self.config.modality_weights
        weights = weigh_modalities(batch.loss_weights, batch.tokens, factors, self.vocabulary)
        return batch._replace(loss_weights=weights)

    def batch_keys(self, batch: Batch) -> list[str]:
        return [key for row in batch.keys for key in row]

    def batch_tokens(self, batch: Batch) -> int:
        return int(batch.num_tokens)

    @functools.cached_property
    def _operations(self) -> Operations:
        return count_operations(self.model_config)

    def batch_flops(self, batch: Batch) -> float:
        return self._operations.of(batch.document_lengths)

    def flops_per_token(self) -> float:
        """Of a document that fills a row: the most that a token can need."""
        return self._operations.per_token + self._operations.per_pair * self.config.data.seq_len

    def losses(self, model: nn.Module, batch: Batch, step: int) -> ModelLosses:
        batch = self._weigh(batch)
        peaks = self._peaks(model, batch, step)
        found, hidden = self._call(model, batch, measure=self._is_logged(step))
        metrics = {**found.metrics, **peaks}
        if self._is_logged(step):
            metrics["output_norm"] = mean_norm(hidden, batch.segment_ids)
        return ModelLosses(found.objective, metrics)

    def _is_logged(self, step: int) -> bool:
        trainer = self.config.trainer
        return (step + 1) % trainer.log_every == 0 or step + 1 == trainer.max_steps

    def _peaks(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Peak]:
        """The largest attention logit, in steps that are logged, of the first row that this rank trains on."""
        if not self._is_logged(step) or self._looked_at == step:
            return {}
        self._looked_at = step
        row = (batch.tokens[:1], batch.positions[:1], batch.segment_ids[:1])
        return {"attention_logit_max": Peak(attention_logit_max(model, *row))}

    def _call(self, model: nn.Module, batch: Batch, measure: bool = False) -> tuple[TokenLosses, Tensor]:
        """Losses without logits of all positions at once, and the hidden states."""
        loss = OutputLoss(
            batch.tokens,
            batch.segment_ids,
            batch.loss_weights,
            self.vocabulary,
            self.config.z_loss_weight,
            measure=measure,
            chunk_elements=self.chunk_elements,
        )
        reduced, hidden = model(batch.tokens, batch.positions, batch.segment_ids, return_hidden=True, reduce=loss)
        return loss.collect(reduced), hidden

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """The losses on held-out documents as they are stored.

        And in units that other models have, too: nats a code of each coded modality, and, where the text tokenizer is
        given, bits a byte of UTF-8 of text. Both leave the tokens between parts out.
        """
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
            moved = to_device(batch, device)
            found = self._call(model, moved)[0].metrics
            sums.add({**found, **self._units(found, moved)})
        self.figures = sums.means()
        return self.figures

    def _units(self, found: Mapping[str, Sums], batch: Batch) -> dict[str, Sums]:
        units = {f"nats_per_{name}_code": found[f"loss_{name}"] for name in self.vocabulary.config.codebook_sizes}
        if self._text_bytes is not None:
            counted = target_weights(batch.segment_ids, batch.loss_weights) != 0
            num_bytes = (self._text_bytes.to(counted.device)[batch.tokens] * counted).sum()
            units["bits_per_text_byte"] = Sums(in_bits(found["loss_text"].total), num_bytes)
        return units

    def draw(self, model: nn.Module, step: int, last: bool) -> dict[str, Picture]:
        every, trainer = self.config.sample_every, self.config.trainer
        evaluation = step // trainer.eval_every if trainer.eval_every else 0
        if self._sheet is None or (evaluation % every and not last):
            return {}
        return {"samples": self._sheet.draw(model)}

    def export(self, model: nn.Module, folder: Path) -> None:
        text, image = self.config.text_tokenizer, self.config.image_tokenizer
        if text is None or image is None:
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(model, folder / WEIGHTS)
            config = {"format_version": 1, "model": asdict(self.model_config)}
            write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())
            return
        assert isinstance(model, Transformer)
        data: Counter[str] = Counter()
        for shards in self.sources.values():
            counts = shards.manifest["counts"]
            data.update({name: counts[name] for name in counts if isinstance(counts[name], int)})
        units = {name: ", nats a token" if name.startswith("loss") else "" for name in self.figures}
        figures = {f"held-out {name}{units[name]}": round(v, 4) for name, v in self.figures.items() if v is not None}
        card = {"title": self.config.trainer.run_dir.name, "data": dict(data), "figures": figures, **self.config.card}
        if self.base:
            card |= self.base.extend_card(self.config.card)
        save_export(folder, model, self.shards.build_format(), text, image, card, self.conversations)

    @property
    def conversations(self) -> bool:
        """Whether conversations are trained on, or were in the base model."""
        return any(shards.has_loss for shards in self.sources.values()) or bool(self.base and self.base.conversations)


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
