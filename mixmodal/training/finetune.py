"""Instruction tuning: pretraining that goes on from a model, on conversations of which the answers are learnt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mixmodal.data.pipeline import DataConfig
from mixmodal.objectives.causal_masked import CausalMaskedConfig
from mixmodal.training.adapter import AdapterConfig, AdapterTask
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.preference import PreferenceTask, PreferenceTuningConfig
from mixmodal.training.pretrain import PretrainConfig, PretrainTask
from mixmodal.training.trainable import TrainableConfig
from mixmodal.training.trainer import FitResult, Trainer


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """`DataConfig` whose documents are by default trained on as they are stored, as conversations must be.

    Args:
        image_first_share: as in pretraining, but 0 by default; above it, conversations are refused.
        caption_dropout: as in pretraining, but 0 by default; above it, conversations are refused.
    """

    image_first_share: float = 0.0
    caption_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(PretrainConfig):
    """Tunes a model on conversations.

    It is pretraining with the defaults of Chameleon's instruction tuning (arXiv 2405.09818, section 3): loss on
    answers, no masks, a rate of 1e-5. Checkpoints, logs and the exported folder are those of pretraining.

    Args:
        init_from: folder of the exported or imported model that is tuned. Its shape, and where it has them its
            vocabulary and tokenizers, are taken; the model card keeps its attribution.
        data: token shards of conversations, or of anything that is pretrained on.
        objective: masks, by default none. `max_masks` above 0 makes it CM3Leon's (arXiv 2309.02591, section 4).
        optimizer: AdamW and its schedule, with a peak rate of 1e-5 by default.
        preference: trains on pairs of answers (DPO, arXiv 2305.18290) in the place of conversations, with `data` of
            the kind `preferences`; none by default.
        adapter: LoRA or DoRA in the place of the whole network; none by default. It is written to `adapter` of the run
            folder, and merged into the exported model.
    """

    init_from: Path = field()
    data: FinetuneDataConfig
    objective: CausalMaskedConfig = field(default_factory=lambda: CausalMaskedConfig(min_masks=0, max_masks=0))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    preference: PreferenceTuningConfig | None = None
    adapter: AdapterConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter and self.trainable != TrainableConfig():
            raise ValueError("trainable can not act beside adapter, whose targets and rows say what is trained")


def finetune(config: FinetuneConfig) -> FitResult:
    """Trains, and exports to `trainer.run_dir/export`.

    Raises:
        ValueError: where config, data and the model do not fit together.
    """
    task = build_task(config)
    return Trainer(config.trainer, config.optimizer, resolved=config).fit(task)


class AdapterPreferenceTask(PreferenceTask, AdapterTask):
    """Preference tuning of an adapter."""

    def __init__(self, config: PretrainConfig, preference: PreferenceTuningConfig, adapter: AdapterConfig) -> None:
        super().__init__(config, preference, adapter=adapter)
        self.quantize = adapter.quantize


def build_task(config: FinetuneConfig) -> PretrainTask:
    """What is trained."""
    if config.preference and config.adapter:
        return AdapterPreferenceTask(config, config.preference, config.adapter)
    if config.preference:
        return PreferenceTask(config, config.preference)
    return AdapterTask(config, config.adapter) if config.adapter else PretrainTask(config)
