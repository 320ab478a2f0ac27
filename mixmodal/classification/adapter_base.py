"""A diffusion model as a conditional denoiser: what is the same for all families.

Shapes: B batch, N prompts or labels, C h w latents (or pixels), T tokens, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixmodal.classification.denoising import Flow, Kind, Schedule, VariancePreserving, check_kind

Conditions = dict[str, Tensor]
"""Tensors by name, each with the prompts (or a batch of them) in its first dimension."""
PROMPTS_AT_ONCE = 64
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Adapter(ABC):
    """A model as a conditional denoiser.

    Args:
        pipe: the pipeline of diffusers.
        network: its denoiser, in evaluation mode.
        image_size: side of the pictures in pixels; None for what the model was made for.

    Attributes:
        kind: what the network predicts.
        schedule: from times to mixes.
        latent_shape: (C, h, w).
        conditioned_on: `text`, or `label` for numbers of classes.
        caution: what speaks against reading costs as likelihoods; empty for nothing.
        t5_tokenizer: name of the tokenizer of T5, which cuts prompts at `t5_tokens`, not at a length of its own.
    """

    conditioned_on = "text"
    caution = ""
    t5_tokenizer = ""
    t5_tokens = 0

    def __init__(self, pipe: Any, network: Any, image_size: int | None = None) -> None:
        self.pipe, self.network = pipe, network
        self.kind, self.schedule = read_schedule(pipe.scheduler)
        self.vae = getattr(pipe, "vae", None)
        self.factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.default_side()
        if image_size is not None:
            side, rest = divmod(image_size, self.factor)
            if rest or side % self.patch_side():
                raise ValueError(
                    f"image_size {image_size} is no multiple of {self.factor * self.patch_side()}, the patch of this "
                    "model in pixels"
                )
        self.image_size = side * self.factor
        self.latent_shape = (self.num_channels(), side, side)

    @property
    def device(self) -> torch.device:
        """On which the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return next(self.network.parameters()).dtype

    def default_side(self) -> int:
        """Latents on a side, as the model was trained."""
        size = self.network.config.sample_size
        sides = {size} if isinstance(size, int) else set(size or ())
        if len(sides) != 1:
            raise ValueError(f"the network's sample_size is {size}; a square one is needed to know the pictures' size")
        return sides.pop()

    def patch_side(self) -> int:
        """Latents on the side of what the network can not cut."""
        return 1

    def num_channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents, float32 `(B, C, h, w)`, of images `(B, 3, H, W)` in [-1, 1]: the posterior's mode, as scaled.

        The autoencoder runs in its own precision, float32 as `load_adapter` reads it.
        """
        if self.vae is None:
            return images.to(self.device, torch.float32)
        config = self.vae.config
        images = images.to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(images).latent_dist.mode().float()
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(one, device=latents.device).view(1, -1, 1, 1) for one in (mean, std))
            latents = (latents - mean) * config.scaling_factor / std
        else:
            latents = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
        return latents.to(self.device)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of N prompts, in the network's precision and on its device.

        Raises:
            ValueError: where the text encoders have been freed.
        """
        if all(getattr(self.pipe, name, None) is None for name in ENCODERS):
            raise ValueError("the text encoders of this model have been freed; load it again to encode new prompts")
        parts = [
            self._encode(list(prompts[start : start + PROMPTS_AT_ONCE]))
            for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        ]
        found = {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}
        return {name: one.to(self.dtype) if one.is_floating_point() else one for name, one in found.items()}

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditions:
        """Conditions of a few prompts, as the pipeline's own `encode_prompt` makes them."""

    @abstractmethod
    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        """The network's output of B noisy latents.

        Args:
            z: `(B, C, h, w)` in the network's precision.
            model_times: `(B,)` of the schedule.
            conditions: one for each row.

        Returns:
            `(B, C, h, w)`.
        """

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[object, ...]]:
        """What is left of each prompt in all tokenizers: prompts of equal tokens can not be told apart."""
        rows: list[tuple[object, ...]] = [() for _ in prompts]
        for name in TOKENIZERS:
            if (tokenizer := getattr(self.pipe, name, None)) is not None:
                limit = self.t5_tokens if name == self.t5_tokenizer else tokenizer.model_max_length
                ids = tokenizer(self._cleaned(prompts), truncation=True, max_length=limit).input_ids
                rows = [(*row, -1, *found) for row, found in zip(rows, ids)]
        return rows

    def _cleaned(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def free_text_encoders(self) -> None:
        """Lets go of the text encoders; tokenizers stay."""
        for name in ENCODERS:
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read_schedule(scheduler: Any) -> tuple[Kind, Schedule]:
    """What a scheduler of diffusers says about training: the kind of prediction, and the noise at each time.

    Its `add_noise` and `scale_noise` stay out: Euler's does not keep the variance, and both know only times of the
    sampler's own grid.

    Raises:
        ValueError: for a scheduler that names no schedule of training, or an unknown kind.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if "FlowMatch" in name:
        return "flow", Flow(config.num_train_timesteps)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"scheduler {name} has no alphas_cumprod and is no FlowMatch scheduler: its noise is unknown")
    kind: Any = check_kind(config.get("prediction_type", "epsilon"))
    return kind, VariancePreserving(scheduler.alphas_cumprod.double().cpu().numpy())


def without_variance(out: Tensor, num_channels: int) -> Tensor:
    """The first half of the channels, where a network learned the variance, too."""
    return out[:, :num_channels] if out.shape[1] == 2 * num_channels else out
