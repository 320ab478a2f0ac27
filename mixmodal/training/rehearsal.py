"""A training step on tensors without data: what forward and backward of a task's own losses add to memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixmodal.data.augment import NUM_DRAWS
from mixmodal.data.packing import Batch
from mixmodal.data.pictures import PictureBatch
from mixmodal.data.token_shards import TokenShards
from mixmodal.models.packed_rows import resolve_kind
from mixmodal.models.transformer import Transformer
from mixmodal.objectives.output_loss import DEFAULT_CHUNK_ELEMENTS
from mixmodal.tokenization.vector_quantizers import MovingAverageQuantizer
from mixmodal.training.adapter import AdapterTask
from mixmodal.training.base_model import BaseModel, build_shape
from mixmodal.training.config import Precision
from mixmodal.training.finetune import FinetuneConfig
from mixmodal.training.image_tokenizer import ImageTokenizerTask, ImageTokenizerTrainingConfig
from mixmodal.training.live_bytes import CastAsOnCuda, LiveBytes
from mixmodal.training.precision import autocast, weight_dtype
from mixmodal.training.pretrain import PretrainConfig, PretrainTask
from mixmodal.training.recomputing import recompute
from mixmodal.training.task import MODEL, Losses, Task
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

TrainingConfig = ImageTokenizerTrainingConfig | PretrainConfig


class Passes(NamedTuple):
    """Bytes that forward and backward add at most, and the most that autograd keeps of them."""

    peak: int
    saved: int


class Rehearsal:
    """The networks of a training and its step.

    Args:
        training: of which command.
        as_on_cuda: it casts (`CastAsOnCuda`), masks and holds as many logits at a time as CUDA does.
        keeps_gradients: whether gradients stand during forward as well; they are then not counted here.
        fake: without data. Real ones tell, in tests, whether the fake ones are right.

    Raises:
        ValueError: where the perceptual network or the vocabulary can not be found.
    """

    def __init__(self, training: TrainingConfig, *, as_on_cuda: bool, keeps_gradients: bool, fake: bool = True) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.training, self.keeps_gradients = training, keeps_gradients
        self._casts = CastAsOnCuda if as_on_cuda else contextlib.nullcontext
        self._tensors = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
        # Image tokenizers are small, and libraries of quantizers and files of weights need real tensors to be built.
        pictures = isinstance(training, ImageTokenizerTrainingConfig)
        self.task: Task = ImageTokenizerTask(training) if pictures else build_dataless(training)
        with torch.device("cpu" if pictures or not fake else "meta"):
            self.networks = {MODEL: self._build_model(as_on_cuda)}
            self.networks |= {name: opponent.model for name, opponent in self.task.build_opponents().items()}
        if training.trainer.activation_checkpointing:
            recompute(self.task.recomputed(self.networks[MODEL]))
        held = [module for module in vars(self.task).values() if isinstance(module, nn.Module)]
        self.frozen = [module for module in held if all(module is not network for network in self.networks.values())]
        """What the task keeps beside the networks that it trains."""
        for network in self.networks.values():
            self._prepare(network)
        if fake:
            with self._tensors:
                drop_data([*self.networks.values(), *self.frozen])
            if isinstance(self.task, PretrainTask):  # hooks of parameters went with their data
                self.task.restrict(self.networks[MODEL])
        for network in self.networks.values():
            for parameter in network.parameters():
                if parameter.requires_grad and keeps_gradients:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def _build_model(self, as_on_cuda: bool) -> nn.Module:
        model = self.task.build_model()
        if isinstance(model, Transformer) and isinstance(self.task, PretrainTask) and as_on_cuda:
            self.task.chunk_elements = DEFAULT_CHUNK_ELEMENTS
            model.attention_kind = resolve_kind(model.attention_kind, "cuda", self.training.trainer.compile)
        return model

    def _prepare(self, network: nn.Module) -> None:
        network.train()
        network.to(weight_dtype(self.training.trainer.precision))
        for module in network.modules():
            if isinstance(module, MovingAverageQuantizer):
                # its library asks for values, which fake tensors have not; what it takes stands in for it
                module.eval()
                module.register_forward_hook(_stand_in_for_update)

    @property
    def modules(self) -> list[nn.Module]:
        """All networks, trained and frozen."""
        return [*self.networks.values(), *self.frozen]

    def passes(self, micro_batch_size: int) -> Passes:
        """One step on one micro-batch: all rounds, each sent backwards before the next, as the trainer does."""
        count = LiveBytes(apart=[t for module in self.modules for t in (*module.parameters(), *module.buffers())])
        with self._tensors, count.counting(), self._casts():
            for _, losses in self.rounds(micro_batch_size):
                losses.objective.backward()
        for network in self.networks.values():
            network.zero_grad()
        return Passes(count.peak, count.saved_peak)

    def rounds(self, micro_batch_size: int) -> Iterator[tuple[str, Losses]]:
        """The task's rounds on a micro-batch of nothing."""
        precision = self.training.trainer.precision
        networks = {name: _AsTrained(network, precision) for name, network in self.networks.items()}
        return self.task.rounds(networks, build_batch(self.training, micro_batch_size), planned_step(self.training))


class DatalessPretrainTask(PretrainTask):
    """Pretraining before there is data: of the vocabulary only the size matters to memory.

    Raises:
        ValueError: where neither config, base model nor data tell that size.
    """

    def __init__(self, config: PretrainConfig) -> None:  # without the parent's, which opens the data
        self.config, self.base = config, None  # of a base model only the shape matters
        base = BaseModel(config.init_from) if config.init_from else None
        size = base.config.vocab_size if base else config.model.vocab_size
        tokens = next(iter(config.data.mixture.values())).tokens  # all sources have one vocabulary
        if (tokens / "manifest.json").exists():
            self.vocabulary = TokenShards.open(tokens).vocabulary
        elif base and base.vocabulary:
            self.vocabulary = base.vocabulary
        elif size < 1:
            raise ValueError(
                f"model.vocab_size is 0, and {tokens} holds no token shards that tell it; give --model.vocab_size"
            )
        else:
            sizes = VocabularyConfig(codebook_sizes={"image": 1}, num_text_pieces=max(1, size - 9), num_sentinels=1)
            self.vocabulary = Vocabulary(sizes)
        self.model_config = build_shape(config.model, base, self.vocabulary.size, config.data.seq_len)


class DatalessAdapterTask(AdapterTask, DatalessPretrainTask):
    """The same with an adapter."""


def build_dataless(config: PretrainConfig) -> DatalessPretrainTask:
    """What is trained, before there is data."""
    adapter = config.adapter if isinstance(config, FinetuneConfig) else None
    return DatalessAdapterTask(config, adapter) if adapter else DatalessPretrainTask(config)


class _AsTrained(nn.Module):
    """A network as the engine calls it."""

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network = network
        self.precision: Precision = precision

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with autocast(self.precision, "cpu"):
            return self.network(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)


def largest_size(peak: Callable[[int], int], known: Mapping[int, int], room: int) -> int:
    """The largest micro-batch whose peak is at most `room`, 0 for none: found by lines through what is known.

    Args:
        peak: bytes by size, rising, and nearly straight.
        known: a size and its peak, or several.
        room: bytes.
    """
    known = {0: 0, **known}
    while True:
        low = max((size for size, needed in known.items() if needed <= room), default=0)
        high = min((size for size, needed in known.items() if needed > room), default=None)
        if room < 0 or high == low + 1:
            return low
        first, second = (low, high) if high else sorted(known)[-2:]
        slope = max(1.0, (known[second] - known[first]) / (second - first))
        guess = max(low + 1, int(low + (room - known[low]) / slope))
        guess = min(guess, high - 1) if high else guess + (guess in known)
        known[guess] = peak(guess)


def drop_data(modules: Iterable[nn.Module]) -> None:
    """Puts tensors of the same shapes on the CPU in place of parameters and buffers; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in (part for whole in modules for part in whole.modules()):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if table is module._parameters else empty
                    )
                table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]


def build_batch(training: TrainingConfig, micro_batch_size: int) -> PictureBatch | Batch:
    """A micro-batch of nothing in the shapes of `training`."""
    if isinstance(training, ImageTokenizerTrainingConfig):
        side = training.tokenizer.image_size
        pixels = torch.zeros(micro_batch_size, 3, side, side, dtype=torch.uint8)
        return PictureBatch(pixels, torch.zeros(micro_batch_size, NUM_DRAWS), [""] * micro_batch_size)
    shape = (micro_batch_size, training.data.seq_len)
    tokens, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    segments = torch.ones(shape, dtype=torch.int64)  # a document a row, of which all is learned: the most there can be
    return Batch(tokens, positions, segments, torch.ones(shape), [[] for _ in range(micro_batch_size)])


def planned_step(training: TrainingConfig) -> int:
    """A step that does all that some step does: with the discriminator, or with the metrics of a logged one."""
    last = training.trainer.max_steps - 1
    if isinstance(training, ImageTokenizerTrainingConfig):
        adversarial = training.adversarial
        return min(adversarial.start_step, last) if adversarial else 0
    return last


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _stand_in_for_update(quantizer: nn.Module, inputs: tuple[Tensor, ...], quantized: Any) -> None:
    """What `VectorQuantize.update_indices` has at its peak: a row of all codes for each latent, int64 and float32."""
    assert isinstance(quantizer, MovingAverageQuantizer)
    latents = inputs[0]
    torch.empty(latents.numel() // latents.shape[1] * quantizer.codebook_size * 12, dtype=torch.uint8)
