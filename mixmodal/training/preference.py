"""Preference tuning: pairs of answers, of which the chosen one is to gain on the rejected one (DPO)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmodal.data.held_out import held_out_batches
from mixmodal.data.packing import split_pairs
from mixmodal.data.source import check_equal
from mixmodal.data.token_shards import TokenShards
from mixmodal.objectives.preference import PreferenceConfig, PreferenceLoss, Reduced
from mixmodal.training.engine import init_distributed
from mixmodal.training.metrics import MetricSums
from mixmodal.training.precision import autocast, weight_dtype
from mixmodal.training.pretrain import ModelLosses, PretrainConfig, PretrainTask, mean_norm
from mixmodal.training.reference import AnswerBatch, Reference, load_reference, model_digest
from mixmodal.training.task import to_device

REFERENCE_FILE = "reference.safetensors"
HELD_OUT = "held out"
"""Held-out pairs among the sources, whose names have no space."""


@dataclass(frozen=True, kw_only=True)
class PreferenceTuningConfig(PreferenceConfig):
    """`PreferenceConfig`, and where the reference is kept.

    Args:
        reference_file: log-probabilities of all answers under the model that is tuned, computed before the first step
            where the file is not there, or is of another model or other shards; runs may share it. By default
            `reference.safetensors` in the run folder. What it is of stands beside it, in a file of the ending `.json`.
    """

    reference_file: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_file and self.reference_file.suffix != ".safetensors":
            raise ValueError(f"preference: reference_file is {self.reference_file}; its name must end in .safetensors")


class AnswerLoader:
    """Micro-batches of pairs with their reference, from rows that have each pair as one document.

    Args:
        rows: of pairs, as `PackedDocuments` gives them.
        bos: id of `<s>`.
        reference: of all of them.
        model_sha256: of the reference; a run does not go on with another.
    """

    def __init__(self, rows: Any, bos: int, reference: Reference, model_sha256: str) -> None:
        self._rows, self._bos, self._reference = rows, bos, reference
        self._model_sha256 = model_sha256

    def __iter__(self) -> Iterator[AnswerBatch]:
        return self

    def __next__(self) -> AnswerBatch:
        return self._reference.attach(split_pairs(next(self._rows), self._bos))

    def state_dict(self) -> dict[str, Any]:
        return {**self._rows.state_dict(), "reference_sha256": self._model_sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_equal("init_from", "reference_sha256", self._model_sha256, state.get("reference_sha256"))
        self._rows.load_state_dict(state)


class PreferenceTask(PretrainTask):
    """What `finetune` trains with `preference`.

    The reference is the network as `build_model` gives it, before any step, without dropout and in the precision of
    training.

    Args:
        config: as for `PretrainTask`, with `init_from`, and shards of pairs.
        preference: the loss.
        options: of a task that this is mixed with.

    Raises:
        ValueError: see `PretrainTask`; and naming the option that can not act on pairs.
    """

    trains_pairs = True
    quantize: str | None = None
    """How the weights of the reference are rounded; null as they are stored."""

    def __init__(self, config: PretrainConfig, preference: PreferenceTuningConfig, **options: Any) -> None:
        check_options(config)
        super().__init__(config, **options)
        self.preference = preference
        self._reference: Reference | None = None
        self._model_sha256 = ""

    # the reference

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng():  # with a reference at hand the network must be the same
            self._load_reference()
        return super().build_model()

    def _load_reference(self) -> None:
        assert self.base
        place, trainer = init_distributed(), self.config.trainer
        shards = {**self.sources, **({HELD_OUT: self.held_out} if self.held_out else {})}
        self._model_sha256 = model_digest(self.base.folder)
        settings = {
            "model": self._model_sha256,
            "precision": trainer.precision,
            "seq_len": self.config.data.seq_len,
            "quantize": self.quantize,
            "shards": {name: found.digest for name, found in shards.items()},
        }
        path = self.preference.reference_file or trainer.run_dir / REFERENCE_FILE
        self._reference = load_reference(path, settings, shards, self._score, place.device)

    def _score(self, shards: TokenShards, rank: int, world_size: int) -> Iterable[tuple[list[list[str]], Tensor]]:
        device, precision = init_distributed().device, self.config.trainer.precision
        model = super().build_model().to(device, weight_dtype(precision)).eval()
        for batch in self._stored(shards, rank, world_size):
            blank = AnswerBatch(batch, torch.zeros(len(batch.keys), 2 * max([1, *map(len, batch.keys)])))
            with torch.no_grad(), autocast(precision, device.type):
                _, (_, logps), _ = self._call_pairs(model, to_device(blank, device))
            yield batch.keys, logps

    def _stored(self, shards: TokenShards, rank: int, world_size: int) -> Iterable[Any]:
        """All pairs once, in order, as rows of this rank."""
        batches = held_out_batches(
            shards,
            self.objective,
            self.config.data,
            micro_batch_size=self.config.trainer.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        return (split_pairs(batch, self.vocabulary.bos) for batch in batches)

    # training; a batch is a `AnswerBatch`

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> Any:
        rows = super().build_loader(micro_batch_size, grad_accum_steps, rank, world_size)
        if self._reference is None:
            self._load_reference()
        assert self._reference
        return AnswerLoader(rows, self.vocabulary.bos, self._reference, self._model_sha256)

    def batch_weight(self, batch: Any) -> Tensor:
        return batch.pairs.exist.sum()

    def batch_keys(self, batch: Any) -> list[str]:
        return super().batch_keys(batch.rows)

    def batch_tokens(self, batch: Any) -> int:
        return super().batch_tokens(batch.rows)

    def batch_flops(self, batch: Any) -> float:
        return super().batch_flops(batch.rows)

    def losses(self, model: nn.Module, batch: Any, step: int) -> ModelLosses:
        peaks = self._peaks(model, batch.rows, step)
        loss, reduced, hidden = self._call_pairs(model, batch)
        metrics = {**loss.collect(reduced), **peaks}
        if self._is_logged(step):
            metrics["output_norm"] = mean_norm(hidden, batch.rows.segment_ids)
        return ModelLosses(reduced[0], metrics)

    def _call_pairs(self, model: nn.Module, batch: AnswerBatch) -> tuple[PreferenceLoss, Reduced, Tensor]:
        rows = batch.rows
        loss = PreferenceLoss(batch.pairs, self.vocabulary, self.preference, chunk_elements=self.chunk_elements)
        reduced, hidden = model(rows.tokens, rows.positions, rows.segment_ids, return_hidden=True, reduce=loss)
        return loss, reduced, hidden

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """The metrics of training on held-out pairs, without dropout."""
        if self.held_out is None:
            return {}
        assert self._reference
        device, sums = next(model.parameters()).device, MetricSums()
        for rows in self._stored(self.held_out, *self._split):
            batch = to_device(self._reference.attach(rows, HELD_OUT), device)
            loss, reduced, _ = self._call_pairs(model, batch)
            sums.add(loss.collect(reduced))
        self.figures = sums.means()
        return self.figures


def check_options(config: PretrainConfig) -> None:
    """Whether all that is set acts on pairs.

    Raises:
        ValueError: naming each option that does not, and the value to give it.
    """
    acting = {
        "objective.max_masks": (config.objective.draws, "0 (and min_masks), since an answer is judged as a whole"),
        "data.loss_on": (config.data.loss_on == "all", "flagged, since answers alone are judged"),
        "data.first_part_weight": (config.data.first_part_weight != 1, "1, since log-probabilities have no weights"),
        "modality_weights": (bool(config.modality_weights), "none, since log-probabilities have no weights"),
        "z_loss_weight": (config.z_loss_weight != 0, "0, since the loss is of answers, not of tokens"),
        "sample_every": (config.sample_every > 0, "0, since sheets are of captions"),
    }
    found = [f"{name} to {value}" for name, (acts, value) in acting.items() if acts]
    if found:
        raise ValueError(f"with preference, set {'; '.join(found)}")
